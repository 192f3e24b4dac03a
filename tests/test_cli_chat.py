"""octavo chat: turns, commands, memory, and Ctrl-C in a real terminal."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from octavo.cli import main
from octavo.cli.chat import Conversation
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from text_helpers import tiny_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=6)


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


def test_ctrl_c_at_the_prompt_does_not_leave(llm, capsys):
    lines: Iterator[str | None] = iter(["interrupt", "fox", None])

    def read() -> str | None:
        line = next(lines)
        if line == "interrupt":
            raise KeyboardInterrupt
        return line

    assert Conversation(llm, PARAMS, None, quiet=True).run(read) == 0
    assert "/exit leaves" in capsys.readouterr().err


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


class Terminal:
    """A program in a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are real."""

    # The child makes the terminal its controlling one before it becomes the program.
    _START = (
        "import fcntl, os, sys, termios; os.setsid();"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, *arguments: str) -> None:
        self.descriptor, child = os.openpty()
        command = [sys.executable, "-c", self._START, sys.executable, "-m", "octavo.cli"]
        self.process = subprocess.Popen(
            [*command, *arguments], stdin=child, stdout=child, stderr=child, close_fds=True
        )
        os.close(child)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.descriptor)

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Read until `text` has come; it and all before it are then forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come; there is {self.seen[-500:]!r}"
            self._read()
        self.seen = self.seen.partition(text)[2]

    def wait_for_characters(self, count: int) -> None:
        """Read until so much more has come, whatever it is."""
        end = time.monotonic() + 30.0
        while len(self.seen) < count:
            assert time.monotonic() < end, f"not {count} characters, but {self.seen!r}"
            self._read()

    def _read(self) -> None:
        if select.select([self.descriptor], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # Linux's way to say that it has ended
                self.seen += os.read(self.descriptor, 4096).decode(errors="replace")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path):
    # Greedy, this model never ends an answer, and its context is too long to reach the end of.
    path = tiny_model(tmp_path, context=60_000)
    arguments = ["-m", str(path), "--load-format", "dummy", "-t", "0", "-n", "50000"]
    with Terminal("chat", *arguments) as terminal:
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.send("tell me more\n")
        terminal.wait_for("more\r\n")
        terminal.wait_for_characters(40)
        terminal.send("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        time.sleep(0.5)  # readline shows its prompt a moment before it listens
        terminal.send("\x03")
        terminal.wait_for("/exit leaves")
        terminal.send("again\n")
        terminal.wait_for("again\r\n")
        terminal.wait_for_characters(40)
        terminal.send("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        assert terminal.process.poll() is None
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_ends_generate_with_130_and_keeps_the_text(tmp_path: Path):
    path = tiny_model(tmp_path, context=60_000)
    arguments = ["-m", str(path), "--load-format", "dummy", "-n", "50000"]
    with Terminal("generate", "tell me more", *arguments) as terminal:
        terminal.wait_for("loading")
        terminal.wait_for("\x1b[2K timX")  # the bar has gone, the answer has begun
        terminal.send("\x03")
        assert terminal.process.wait(timeout=30) == 130
