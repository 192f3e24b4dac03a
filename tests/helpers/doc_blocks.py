"""The commands and programs in the documentation, found in its fenced blocks.

What a block is follows from its language:

    python          a program; the blocks of a page are one program
    sh, bash        every line is a command
    console         lines that begin with "$ " are commands, the rest is what they print
    (none)          as console if a line begins with "$ ", as sh if the first one begins with one of
                    PROGRAMS
    any other       text, json, cuda …: not run

A command whose printed output begins with "error:" must fail, with a message that begins alike. A
block behind a line `<!-- not run: REASON -->` is not run. Neither are single commands for which
NOT_RUN has a reason. Both are counted. Blocks that docs/learn/include.py fills are run as files by
tests/docs/test_learn.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("octavo", "make", "python", "python3", "pip", "git", "curl", "cmake", "nvcc")
SHELLS = {"sh", "bash"}
FENCE = re.compile(r"^( *)```(\w*)")
COMMENT = re.compile(r"\s+# .*")
NOT_RUN_MARK = re.compile(r"<!-- not run: (.+?) -->")

# Commands that a machine without a GPU, torch or time cannot run here: pattern -> reason.
NOT_RUN = {
    r"--device cuda|^nvcc ": "needs a GPU or nvcc",
    r"--against hf|--judge": "needs torch and transformers; tests/hf does it",
    r"^(VAR=\S+ )?make |^CUDA_EMULATOR_\w+=": "builds or tests; other stages of CI do it",
    r"pip install|python3 -m venv|^git clone|^cmake |\.venv/bin/activate": "installs octavo",
    r"^python -m pytest": "tests; the stage test of CI does it",
    r"--sensitivity|--bits-per-weight": "measures each matrix, for minutes; see tests/quantization",
    r"^serve run ": "needs Ray; the stage clients of CI does it",
    r"--api-key|lm_eval": "needs another package",
    r"--install-completion": "writes into the files of the reader's shell",
}
# Words of the documentation that stand for the reader's own: pattern -> what is there in the tests.
WORDS = {
    r"--json-schema FILE\b": "--json-schema schema.json",
    r"^\.venv(-demo)?/bin/(octavo|python)\b": r"\2",
    r"\bFILE\.gguf\b": "tiny.gguf",
    r"\bFILE\.json\b": "results.json",
    r"\bORG/NAME\b": "smollm2-135m",
    r"\bQUANTIZED_FOLDER\b": "./smollm2-int8",
    r"\bMODEL_IT_WAS_MADE_FROM\b": "smollm2-135m",
    r"\bMODEL\b": "smollm2-135m",
    r"\bSMALL\b": "smollm2-135m",
    r"\bADAPTER\b": "./sql",
    r"\bbatch IN OUT\b": "batch prompts.jsonl out.jsonl",
    r"\bOUT\b": "./out-{line}",
    r"/adapters/law\b": "$PWD/law",
    r"benchmarks/shapes/llama-3\.2-1b\b": "benchmarks/shapes/tiny",
    r"\ba-smaller-model\b": "smollm2-135m",
}
# Measurements that would take most of the time of all commands, made shorter.
SHORTER = {
    r"^octavo eval(?! .*--text)": "octavo eval --text letter.txt",
    r"-p 512 -n 128 -b 1,4,16,32 -r 5": "-p 64 -n 8 -b 1,4 -r 2",
    r"-d 0,1024": "-d 0,64 -p 64 -n 8 -r 2",
    r"-b 16 --adapter": "-b 4 -p 64 -n 8 -r 2 --adapter",
    r"--users 1,8,64 --prompt-len 32-512 --answer-len 128": "--users 1,2 --answer-len 8",
    r"beam_search\.py --tokens 32": "beam_search.py --tokens 4",
    r"--windows 64": "--windows 2",
    r"--calibrate manual\.txt": "--calibrate letter.txt",
}


class Command(NamedTuple):
    """A command as printed, where it stands, and why it is not run ("": it is)."""

    line: int
    text: str
    printed: str  # the first line of its output, "" if none is shown
    not_run: str

    def substituted(self) -> str:
        """With the words of WORDS and SHORTER."""
        text = self.text
        for pattern, word in {**WORDS, **SHORTER}.items():
            text = re.sub(pattern, word.replace("{line}", str(self.line)), text)
        return text


class Page(NamedTuple):
    """What a page asks its reader to run. program: all Python blocks, at the page's own lines."""

    path: str
    commands: list[Command]
    program: str
    programs_not_run: list[Command]


def read_page(path: Path) -> Page:
    """Find a page's commands and programs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    commands: list[Command] = []
    program = [""] * len(lines)
    programs_not_run = []
    for first, indent, language, block, reason in _blocks(lines):
        if language == "python":
            if reason:
                programs_not_run.append(Command(first, block[0], "", reason))
            elif reason is not None:
                program[first - 1 : first - 1 + len(block)] = [text[indent:] for text in block]
        else:
            commands += _commands(first, [text[indent:] for text in block], language, reason or "")
    return Page(
        path.relative_to(ROOT).as_posix(), commands, "\n".join(program).rstrip(), programs_not_run
    )


def _blocks(lines: list[str]) -> Iterator[tuple[int, int, str, list[str], str | None]]:
    """First line (from 1), indentation, language, content, reason; None: run elsewhere."""
    number = 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        number += 1
        if not opened:
            continue
        first = number
        while not lines[number].strip().startswith("```"):
            number += 1
        before = next((text for text in reversed(lines[: first - 1]) if text.strip()), "")
        mark = NOT_RUN_MARK.search(before)
        reason: str | None = mark[1] if mark else ""
        if before.startswith(("<!-- program", "<!-- output")):
            reason = None
        yield first + 1, len(opened[1]), opened[2], lines[first:number], reason
        number += 1


def _commands(first: int, block: list[str], language: str, reason: str) -> list[Command]:
    has_prompt = any(text.startswith("$ ") for text in block)
    begins = bool(block) and block[0].split()[:1] and block[0].split()[0] in PROGRAMS
    if language not in {*SHELLS, "console", ""} or (not language and not has_prompt and not begins):
        return []
    found: list[Command] = []
    is_console = language == "console" or has_prompt
    number = 0
    while number < len(block):
        text, start = block[number], number
        number += 1
        if not text.strip() or text.startswith("#") or (is_console and not text.startswith("$ ")):
            continue
        text = COMMENT.sub("", text.removeprefix("$ "))
        while text.endswith("\\"):
            text = text[:-1].rstrip() + " " + COMMENT.sub("", block[number].strip())
            number += 1
        while text.count("'") % 2 and number < len(block):  # a quoted text of several lines
            text += "\n" + block[number]
            number += 1
        after = block[number] if is_console and number < len(block) else ""
        why = reason or next((r for p, r in NOT_RUN.items() if re.search(p, text)), "")
        found.append(Command(first + start, text, "" if after.startswith("$ ") else after, why))
    return found


def all_pages() -> list[Page]:
    """README, CONTRIBUTING, and all of docs/."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return [read_page(path) for path in paths]
