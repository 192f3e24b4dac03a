"""octavo chat: turns, commands, memory; test_cli_chat_terminal.py has keys and Ctrl-C."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from text_helpers import tiny_model

from octavo.cli import main
from octavo.cli.chat import read_message
from octavo.cli.conversation import Conversation
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=6)
CHAT = ["--load-format", "dummy", "-t", "0", "-n", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model, load_format="dummy")


def reader(lines: list[str]) -> Callable[[], str | None]:
    source: Iterator[str] = iter(lines)
    return lambda: next(source, None)


def test_every_turn_sees_the_ones_before(llm, capsys):
    conversation = Conversation(llm, PARAMS, "Be terse.", quiet=True)
    assert conversation.run(reader(["fox", "", "  dog  "])) == 0
    history = [{"role": "system", "content": "Be terse."}]
    answers = []
    for question in ("fox", "dog"):
        history.append({"role": "user", "content": question})
        text = llm.chat(history, PARAMS, progress=False)[0].text
        answers.append(text.lstrip())
        history.append({"role": "assistant", "content": text.strip()})
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)
    assert conversation.turns == history[1:]


def test_commands(llm, capsys):
    conversation = Conversation(llm, PARAMS, None, quiet=True)
    lines = ["fox", "/system You are a pirate.", "/help", "/nope", "/exit", "never asked"]
    assert conversation.run(reader(lines)) == 0
    shown = capsys.readouterr()
    assert conversation.system == "You are a pirate." and conversation.turns == []
    assert "/reset" in shown.err and "no command /nope" in shown.err
    conversation.run(reader(["fox", "/reset"]))
    assert conversation.turns == [] and conversation.system == "You are a pirate."
    conversation.run(reader(["/system"]))
    assert conversation.system is None


def test_a_path_and_an_indented_slash_are_no_commands(llm, capsys):
    conversation = Conversation(llm, PARAMS, None, quiet=True)
    conversation.run(reader(["/etc/passwd is what?", " /help"]))
    questions = [turn["content"] for turn in conversation.turns if turn["role"] == "user"]
    assert questions == ["/etc/passwd is what?", "/help"]
    assert capsys.readouterr().out.count("\n") == 2


def test_the_oldest_turns_are_dropped_and_it_is_said(llm, capsys):
    conversation = Conversation(llm, replace(PARAMS, max_tokens=40), "Be terse.", quiet=True)
    questions = [f"question {number}" for number in range(8)]
    assert conversation.run(reader(questions)) == 0
    said = capsys.readouterr().err
    assert "dropped from memory" in said and "256 tokens" in said
    assert 2 <= len(conversation.turns) < 16
    assert conversation.turns[0]["role"] == "user"
    assert conversation.turns[-2]["content"] == "question 7"


def test_a_message_that_never_fits_is_refused_and_the_talk_goes_on(llm, capsys):
    conversation = Conversation(llm, PARAMS, None, quiet=True)
    assert conversation.run(reader(["fox", "dog " * 300, "ship"])) == 1
    assert "shorten it" in capsys.readouterr().err
    # What had to make room is gone with the attempt; the talk goes on from there.
    assert conversation.turns[-2] == {"role": "user", "content": "ship"}


def test_a_conversation_is_saved_and_goes_on(llm, capsys, tmp_path):
    file = tmp_path / "talk.json"
    first = Conversation(llm, PARAMS, "Be terse.", model="tiny", quiet=True)
    assert first.run(reader(["fox", f"/save {file}", "dog"])) == 0
    saved = json.loads(file.read_text())
    assert saved == {"model": "tiny", "messages": first.messages[:3]}
    second = Conversation(llm, PARAMS, None, quiet=True)
    assert second.run(reader([f"/load {file}", "dog"])) == 0
    assert second.messages == first.messages  # the same answer, from the same history
    assert "1 turns are written" in capsys.readouterr().err


def test_options_left_out_are_as_the_model_recommends(tmp_path, monkeypatch, capsys):
    model = str(tiny_model(tmp_path / "tiny"))
    recommended = {"eos_token_id": 0, "temperature": 0.25, "top_k": 3, "do_sample": True}
    words = ["chat", "-m", model, "--load-format", "dummy", "-n", "2"]
    for content, more, expected in (
        (recommended, [], (0.25, 3, 0.9)),
        (recommended, ["-t", "0.6", "--top-p", "0.5"], (0.6, 3, 0.5)),
        ({"eos_token_id": 0}, ["--top-k", "7"], (0.6, 7, 0.9)),
    ):
        (tmp_path / "tiny" / "generation_config.json").write_text(json.dumps(content))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/set\n")))
        assert main([*words, *more]) == 0
        said = capsys.readouterr().err.splitlines()
        shown = dict(line.split(maxsplit=1) for line in said if line.startswith("  "))
        found = [json.loads(shown[name]) for name in ("temperature", "top_k", "top_p")]
        assert tuple(found) == expected


BAD_TALKS = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[1, 2]",
    "no text": '{"messages": [{"role": "user", "content": [1]}]}',
    "no answer": '{"messages": [{"role": "user", "content": "x"}]}',
    "order": '{"messages": [{"role": "tool", "content": ""}, {"role": "user", "content": ""}]}',
    "empty": '{"messages": []}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_TALKS)
def test_a_file_that_is_no_conversation_changes_nothing(name, llm, tmp_path, capsys):
    (tmp_path / "bad").write_text(BAD_TALKS[name])
    conversation = Conversation(llm, PARAMS, "Be terse.", quiet=True)
    conversation.run(reader(["fox", f"/load {tmp_path / 'bad'}", "/load", "/load /no/such"]))
    assert len(conversation.turns) == 2 and conversation.system == "Be terse."
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 3 and str(tmp_path / "bad") in errors


@pytest.mark.parametrize("place", ["/no/such/file", "/dev/full", "/", ""])
def test_a_conversation_that_cannot_be_saved_goes_on(place, llm, capsys):
    conversation = Conversation(llm, PARAMS, None, quiet=True)
    assert conversation.run(reader(["fox", f"/save {place}", "dog"])) == 0
    assert len(conversation.turns) == 4 and capsys.readouterr().err.count("error: ") == 1


def test_retry_asks_again_with_another_seed(llm, capsys):
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=8)
    conversation = Conversation(llm, params, None, quiet=True)
    conversation.run(reader(["/retry", "fox"]))
    assert "nothing was asked yet" in capsys.readouterr().err
    before = list(conversation.turns)
    conversation.run(reader(["/retry"]))
    assert conversation.params.seed == 2 and len(conversation.turns) == 2
    assert conversation.turns[0] == before[0] and conversation.turns[1] != before[1]
    conversation.run(reader(["/set temperature 0", "/retry"]))
    assert "the same answer comes" in capsys.readouterr().err and len(conversation.turns) == 2


def test_options_of_sampling_are_set_between_turns(llm, capsys):
    conversation = Conversation(llm, PARAMS, None, quiet=True)
    conversation.run(
        reader(["/set temperature 0.25", "/set --top-p 0.5", "/set stop ship", "/set"])
    )
    assert conversation.params == replace(PARAMS, temperature=0.25, top_p=0.5, stop=("ship",))
    assert re.search(r"top_p +0\.5\n", capsys.readouterr().err)
    conversation.run(
        reader(["/set max_tokens none", "/set ignore_eos true", '/set stop ["a", "b"]'])
    )
    assert conversation.params.max_tokens is None and conversation.params.ignore_eos
    assert conversation.params.stop == ("a", "b")
    before = conversation.params
    capsys.readouterr()
    wrong = [
        "top_p 2",
        "top_p much",
        "tempature 1",
        "n 3",
        "top_k",
        "stop {}",
        "stop 3",
        "seed [1]",
    ]
    conversation.run(reader([f"/set {words}" for words in wrong]))
    assert conversation.params == before
    assert capsys.readouterr().err.count("error: ") == len(wrong)


def test_a_message_of_several_lines_where_lines_are_read_one_by_one(llm):
    lines = ['"""', "/reset", "fox", '"""', "dog\\", "ship", '"""one"""', '"""', "open"]
    messages = []
    source = reader(lines)
    while (message := read_message(source)) is not None:
        messages.append(message.strip())
    assert messages == ["/reset\nfox", "dog\nship", "one", "open"]
    pasted = '"""Doc."""\nimport this'
    assert read_message(reader([pasted])) == pasted


def test_over_a_pipe(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fox\r\n/reset\ndog")))
    arguments = ["chat", "-m", model, "--load-format", "dummy", "-t", "0", "-n", "4"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 2 and "> " not in shown.out
    assert "(the conversation is forgotten)\n" in shown.err and "tokens/s" not in shown.err


def test_a_base_model_cannot_chat(tmp_path, capsys):
    path = tiny_model(tmp_path, chat_template=None)
    assert main(["chat", "-m", str(path), "--load-format", "dummy"]) == 2
    assert "no chat template" in capsys.readouterr().err
