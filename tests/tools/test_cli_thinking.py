"""What a model thinks, in `octavo generate`, `chat` and `batch`: apart from the answer."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from parrot import GO, say, write_parrot
from terminal_helpers import Terminal

from octavo.cli import main
from octavo.cli.conversation import Conversation
from octavo.cli.thinking import Thinking
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

# As Qwen3's: earlier thinking is left out before the last question, an empty one asks for none.
TEMPLATE = (
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}"
    + GO
    + "{% if enable_thinking is false %}<think></think>{% endif %}"
)
OPEN = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}<think>"  # as R1's
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}" + GO
WORDS = ("<think>", "\n", "Hm, a  b.", " So:\n", "</think>", " ", "Yes", ".")
SHOWN = "(thinking)\nHm, a  b. So:\n(done thinking)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that think before they say Yes."""
    made = tmp_path_factory.mktemp("thinkers")
    write_parrot(made / "both", {**say(*WORDS), "</think>": "Yes"}, template=TEMPLATE)
    special = ("<think>", "</think>")
    write_parrot(made / "special", say(*WORDS), template=TEMPLATE, special=special)
    write_parrot(made / "open", say(*WORDS[2:], after="<think>"), template=OPEN)
    write_parrot(made / "plain", say("Yes", "."), template=PLAIN)
    return made


def generate(folder: Path, *words: str) -> int:
    return main(["generate", "What?", "-m", str(folder), "--num-threads", "1", *words])


@pytest.mark.parametrize("name", ["both", "special", "open"])
def test_an_answer_goes_to_stdout_and_what_is_thought_to_stderr(name, folder, capsys):
    assert generate(folder / name, "-q") == 0
    assert capsys.readouterr() == ("Yes.\n", SHOWN)
    assert generate(folder / name, "-q", "--hide-thinking") == 0
    assert capsys.readouterr() == ("Yes.\n", "(thinking)\n")
    assert generate(folder / name, "--json", "-q", "--answers", "2") == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert shown.err == "" and len(record["answers"]) == 2
    for one in (record, *record["answers"]):
        assert (one["reasoning"], one["text"]) == ("Hm, a  b. So:", "Yes.")
    for words in (["--answers", "2"], ["--beams", "2"]):
        assert generate(folder / name, "-q", *words) == 0
        out, err = capsys.readouterr()
        assert out.count("Yes.\n") == err.count(SHOWN) == (2 if "--answers" in words else 1)


def test_thinking_is_turned_off_and_on(folder, capsys):
    assert generate(folder / "both", "-q", "--no-think") == 0
    assert capsys.readouterr() == ("Yes.\n", "")
    for name in ("both", "open"):
        assert generate(folder / name, "-q", "--think") == 0
        assert capsys.readouterr() == ("Yes.\n", SHOWN)
    assert generate(folder / "plain", "-q", "--no-think", "--hide-thinking") == 0
    assert capsys.readouterr() == ("Yes.\n", "")


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("plain", ["--think"], "thinking is asked for (--think), but"),
        ("open", ["--no-think"], "(--no-think), but this model's chat template has no enable_"),
        ("both", ["--raw", "--no-think"], "--think is False, which does nothing here"),
        ("both", ["--raw", "--hide-thinking"], "--hide-thinking is True"),
    ],
)
def test_what_a_model_cannot_do_is_refused(name, words, expected, folder, capsys):
    assert generate(folder / name, *words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and expected in shown.err


def test_a_base_model_does_not_think(tmp_path, capsys):
    write_parrot(tmp_path / "base", say("Yes"), template=None)
    assert generate(tmp_path / "base", "--think") == 2
    assert "no chat template with a place for it" in capsys.readouterr().err
    assert generate(tmp_path / "base", "--no-think", "-q", "-n", "1") == 0


def test_a_text_that_is_continued_keeps_its_tags(folder, capsys):
    words = ["generate", GO, "-m", str(folder / "both"), "--num-threads", "1", "--raw", "-q"]
    assert main(words) == 0
    assert capsys.readouterr() == ("<think>\nHm, a  b. So:\n</think>Yes.\n", "")


def test_what_is_cut_off_says_where(folder, capsys):
    assert generate(folder / "both", "-n", "3") == 0
    shown = capsys.readouterr()
    assert shown.out == "\n" and "cut off within the thinking (--max-tokens 3)" in shown.err
    assert generate(folder / "both", "-n", "6") == 0
    shown = capsys.readouterr()
    assert shown.out == "Yes\n" and "cut off (--max-tokens 6)" in shown.err


@pytest.mark.parametrize("name", ["special", "open"])
def test_a_choice_holds_for_what_stands_behind_the_thinking(name, folder, capsys):
    assert generate(folder / name, "-q", "--choice", "Yes.", "--choice", "No.") == 0
    assert capsys.readouterr() == ("Yes.\n", SHOWN)


def test_a_batch_has_the_fields_of_the_server(folder, tmp_path):
    (tmp_path / "in").write_text('What?\n{"messages": [{"role": "user", "content": "Why?"}]}\n')
    words = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", str(folder / "special")]
    assert main([*words, "-q"]) == 0
    thought = "Hm, a  b. So:"
    for line in (tmp_path / "out").read_text().splitlines():
        message = json.loads(line)["response"]["body"]["choices"][0]["message"]
        assert message == {
            **{"role": "assistant", "content": "Yes."},
            **{"reasoning": thought, "reasoning_content": thought},
        }


PARAMS = SamplingParams(temperature=0.0, max_tokens=60)


def reader(*lines: str) -> Callable[[], str | None]:
    source: Iterator[str] = iter(lines)
    return lambda: next(source, None)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder / "both", num_threads=1)


def test_a_conversation_remembers_what_was_thought(llm, capsys, tmp_path):
    file = tmp_path / "talk.json"
    talk = Conversation(llm, PARAMS, None, quiet=True)
    assert talk.run(reader("What?", f"/save {file}", "/thinking off", "Why?")) == 0
    shown = capsys.readouterr()
    assert shown.out == "Yes.\nYes.\n" and shown.err.startswith(SHOWN)
    assert shown.err.count("(thinking)") == 1  # the second turn does not think
    first = {"role": "assistant", "content": "Yes.", "reasoning": "Hm, a  b. So:"}
    assert talk.turns[1] == first
    assert talk.turns[3] == {"role": "assistant", "content": "Yes."}
    assert talk.thinker.encode(talk.turns).text == (
        "What?<think>Hm, a  b. So:</think>Yes.Why?Yes." + GO + "<think></think>"
    )
    again = Conversation(llm, PARAMS, None, quiet=True)
    again.run(reader(f"/load {file}"))
    assert again.turns == talk.turns[:2]


def test_commands_of_thinking(llm, capsys):
    talk = Conversation(llm, PARAMS, None, thinking=Thinking(hide_thinking=True), quiet=True)
    assert talk.run(reader("What?")) == 0
    assert capsys.readouterr() == ("Yes.\n", "(thinking)\n")
    assert talk.run(reader("/thinking show", "What?", "/thinking", "/thinking maybe")) == 0
    err = capsys.readouterr().err
    assert SHOWN in err and err.count("expected one of on, off, show, hide") == 2
    assert talk.run(reader("/thinking on")) == 0
    assert talk.thinker.asked == Thinking(think=True)
    short = replace(PARAMS, max_tokens=3)
    assert Conversation(llm, short, None, quiet=True).run(reader("What?")) == 0
    assert "(cut off within the thinking: --max-tokens" in capsys.readouterr().err


def test_what_a_model_cannot_do_leaves_a_talk_as_it_is(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/thinking off\nWhat?\n")))
    assert main(["chat", "-m", str(folder / "open"), "-t", "0", "-q", "--num-threads", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Yes.\n" and "has no enable_thinking" in shown.err and SHOWN in shown.err


def test_thinking_is_dim_on_a_terminal(folder):
    words = ["generate", "What?", "-q", "--num-threads", "1", "-m"]
    with Terminal(*words, str(folder / "both")) as terminal:
        terminal.wait_for("Yes.")
        shown = terminal.read_before
        assert terminal.process.wait(timeout=30) == 0
    dim = "".join(re.findall("\x1b\\[2m([^\x1b]*)\x1b\\[0m", shown))
    assert dim == "(thinking)Hm, a  b. So:\r\n(done thinking)"
    assert shown.endswith("\x1b[0m\r\n")  # the answer is not dim
    with Terminal(*words, str(folder / "both"), TERM="dumb") as terminal:
        terminal.wait_for("Yes.")
        assert "\x1b[2m" not in terminal.read_before
