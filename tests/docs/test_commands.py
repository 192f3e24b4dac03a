"""Every command and every Python program of README, CONTRIBUTING and docs/ runs as printed.

`doc_blocks` says how they are found and marked, `doc_folder` where they run. What is not run is
skipped with its reason, one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_blocks import Command, Page, all_pages, read_page
from doc_folder import Shell, make_folder, make_home

PAGES = all_pages()
# Before a page's commands: what its reader has from elsewhere.
SETUP = {
    "docs/cli.md": [
        "octavo batch prompts.txt log.jsonl --max-tokens 16 --event-log auto",
        'cp "$(ls -t "$OCTAVO_HOME"/logs/*.jsonl | head -1)" events.jsonl',
    ],
    "docs/scheduler.md": [
        "octavo batch prompts.txt log.jsonl --max-tokens 16 --event-log events.jsonl"
    ],
    "docs/slurm.md": ["cp slurm/clusters/pace.yaml cluster.yaml", "cp prompts.jsonl in.jsonl"],
    "docs/eval.md": ["octavo quantize smollm2-135m ./smollm2-int8 --scheme int8"],
    "docs/plan.md": [
        'cp -r "$OCTAVO_HOME/models/smollm2-135m" my-model',
        "sed -i 's/_embeddings\": 8192/_embeddings\": 131072/' my-model/config.json",
    ],
}
# Pages whose searches allow few tokens that end an answer.
ONE_END = {"docs/search.md"}
# Before a page's Python: names that its text has introduced.
IMPORTS = {
    "docs/adapters.md": "from octavo import LLM",
    "docs/logprobs.md": "from octavo import LLM, SamplingParams; llm = LLM('smollm2-135m')",
    "docs/search.md": "prompt_token_ids = [504, 3575, 282]",
    "docs/speculation.md": "from octavo import LLM",
}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def shell(tmp_path: Path, home: Path) -> Iterator[Shell]:
    make_folder(tmp_path, home)
    shell = Shell(tmp_path, home)
    yield shell
    shell.close()


def run_page(page: Page, shell: Shell) -> list[str]:
    """What is wrong, with page and line."""
    problems = []
    if page.path in ONE_END:
        shell.environment["OCTAVO_HOME"] = str(make_home(shell.folder / "home", ends=[2]))
    before = [Command(0, text, "", "") for text in SETUP.get(page.path, [])]
    for command in [*before, *page.commands]:
        if not command.not_run and (wrong := shell.run(command)):
            problems.append(f"{page.path}:{command.line}: {command.text}\n{wrong}")
    if page.program.strip():
        program = IMPORTS.get(page.path, "") + shell.on_own_port(page.program)
        (shell.folder / "page.py").write_text(
            program.replace("~/.cache/octavo", shell.environment["OCTAVO_HOME"]).replace(
                "a-smaller-model", "smollm2-135m"
            ),
            encoding="utf-8",
        )
        code, output = shell.execute([sys.executable, "page.py"])
        if code:
            problems.append(f"{page.path}: its Python (lines are the page's): {output}")
    return problems


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.path) for page in PAGES if page.commands or page.program.strip()],
)
def test_commands_run_as_printed(page: Page, shell: Shell) -> None:
    problems = run_page(page, shell)
    assert not problems, "\n\n".join(problems)


NOT_RUN = [
    pytest.param(command, id=f"{page.path}:{command.line}")
    for page in PAGES
    for command in [*page.commands, *page.programs_not_run]
    if command.not_run
]


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_is_not_run_says_why(command: Command) -> None:
    assert len(command.not_run) > 10
    pytest.skip(f"{command.text}: {command.not_run}")


def test_a_wrong_command_is_found(shell: Shell) -> None:
    """The runner itself: planted mistakes in a page of each kind."""
    path = Path(__file__).with_name("planted.md")
    page = read_page(path)
    problems = run_page(page, shell)
    lines = path.read_text(encoding="utf-8").splitlines()
    wrong = [number for number, text in enumerate(lines, 1) if text.endswith("# wrong")]
    found = [int(problem.split(":")[1]) for problem in problems[:-1]]
    assert found == wrong and "line 21" in problems[-1]
    assert [command.line for command in page.commands if command.not_run] == [27]
