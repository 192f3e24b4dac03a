"""`octavo chat` on a terminal: keys, pasted text, Ctrl-C, windows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO

import pytest
from text_helpers import tiny_model

CHAT = ["--load-format", "dummy", "-t", "0", "-n", "4"]
MARKED = "\x1b[?2004h"  # the terminal is to tell what is pasted
SENT = "\x1b[?2004l"  # a message has been taken
PROMPT = "\x1b[?25h"  # the cursor is shown: the prompt is on the screen, and keys are taken


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


class Terminal:
    """A program in a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are real."""

    # The child makes the terminal its controlling one before it becomes the program.
    _START = (
        "import fcntl, os, sys, termios; os.setsid();"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, *arguments: str, stdout: IO[str] | None = None, TERM: str = "xterm") -> None:
        self.descriptor, child = os.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
        command = [sys.executable, "-c", self._START, sys.executable, "-m", "octavo"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=child,
            stdout=stdout or child,
            stderr=child,
            close_fds=True,
            env={**os.environ, "TERM": TERM, "COLUMNS": "", "LINES": ""},
        )
        os.close(child)
        self.seen = ""
        self.all = ""
        self.read_before = ""  # what the last wait went past

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
        self.read_before, _, self.seen = self.seen.partition(text)

    def wait_for_characters(self, count: int) -> None:
        """Read until so much more has come, whatever it is."""
        end = time.monotonic() + 30.0
        while len(self.seen) < count:
            assert time.monotonic() < end, f"not {count} characters, but {self.seen!r}"
            self._read()

    def _read(self) -> None:
        if select.select([self.descriptor], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # Linux's way to say that it has ended
                read = os.read(self.descriptor, 4096).decode(errors="replace")
                self.seen += read
                self.all += read


@pytest.mark.parametrize("leave", ["\x04", "\x03", "/exit\r"], ids=["Ctrl-D", "Ctrl-C", "/exit"])
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path, leave: str):
    # Greedy, this model never ends an answer, and its context is too long to reach the end of.
    path = tiny_model(tmp_path, context=60_000)
    arguments = ["-m", str(path), "--load-format", "dummy", "-t", "0", "-n", "50000"]
    with Terminal("chat", *arguments) as terminal:
        terminal.wait_for("leaves")
        terminal.wait_for(PROMPT)
        terminal.send("tell me more\r")
        terminal.wait_for(SENT)
        terminal.wait_for_characters(40)
        terminal.send("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for(PROMPT)
        terminal.send("not this\x03")  # dropped, and the talk goes on
        terminal.wait_for(SENT)
        terminal.wait_for(PROMPT)
        terminal.send("again\r")
        terminal.wait_for(SENT)
        terminal.wait_for_characters(40)
        terminal.send("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for(PROMPT)
        assert terminal.process.poll() is None
        terminal.send(leave)
        assert terminal.process.wait(timeout=30) == 0


# Each of these is one turn of three lines, whatever Enter is among them.
THREE_LINES = {
    "pasted": "\x1b[200~one\rtwo\rthree\x1b[201~",
    "Alt-Enter": "one\x1b\rtwo\x1b\rthree",
    "backslash": "one\\\rtwo\\\rthree",
}


@pytest.mark.parametrize("way", THREE_LINES)
def test_three_lines_are_one_turn(model, way):
    with Terminal("chat", *CHAT, "-m", model) as terminal:
        terminal.wait_for("leaves")
        terminal.wait_for(PROMPT)
        terminal.send(THREE_LINES[way])
        terminal.wait_for("three")
        time.sleep(0.3)
        assert "tokens/s" not in terminal.all  # nothing is sent before Enter
        terminal.send("\r")
        terminal.wait_for("tokens/s")
        terminal.send("/system one\x1b\r/reset\r")  # nor is a later line a command
        terminal.wait_for("begins anew")
        terminal.send("/exit\r")
        assert terminal.process.wait(timeout=30) == 0
        assert terminal.all.count("tokens/s") == 1 and "forgotten" not in terminal.all


def test_keys_typed_while_the_model_loads_wait_for_the_first_prompt(model):
    with Terminal("chat", *CHAT, "-m", model) as terminal:
        terminal.wait_for(MARKED)  # the keyboard is silent from here on
        terminal.send("fox\r\x1b[200~a\rb\x1b[201~")
        terminal.wait_for("leaves")
        assert "fox" not in terminal.read_before
        terminal.wait_for("fox")
        terminal.wait_for("tokens/s")
        terminal.wait_for("b")
        assert "tokens/s" not in terminal.seen
        terminal.send("\r")
        terminal.wait_for("tokens/s")
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0
        assert termios.tcgetattr(terminal.descriptor)[3] & termios.ECHO


def test_a_dumb_terminal_gets_no_escape_sequences(model):
    with Terminal("chat", *CHAT, "-m", model, TERM="dumb") as terminal:
        terminal.wait_for("> ")
        terminal.send("fox\r")
        terminal.wait_for("tokens/s")
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0
        assert "\x1b" not in terminal.all


def test_answers_to_a_file_leave_the_prompt_on_the_screen(model, tmp_path):
    answers = tmp_path / "answers.txt"
    with answers.open("w") as file, Terminal("chat", *CHAT, "-m", model, stdout=file) as terminal:
        terminal.wait_for("leaves")
        terminal.wait_for(PROMPT)
        terminal.send("fox\r")
        terminal.wait_for("tokens/s")
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0
    assert answers.read_text().count("\n") == 1 and "> " not in answers.read_text()


def test_messages_are_broken_between_words(model):
    with Terminal("chat", *CHAT, "-m", model) as terminal:
        terminal.wait_for("leaves")
        terminal.wait_for(PROMPT)
        terminal.send("/help\r")
        terminal.wait_for("behind it.")
        lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.read_before).split("\r\n")
        lines = lines[[line.startswith("  /system TEXT") for line in lines].index(True) :]
        assert max(map(len, lines)) <= 60
        found = [line for line in lines if line.startswith(" " * 19)]
        assert any("Alt-Enter        begin another line" in line for line in lines)
        assert found and all(line[19] != " " for line in found)  # under what it goes on with


def test_only_a_terminal_needs_prompt_toolkit(model):
    code = (
        "import sys; from octavo.cli import main;"
        f"main(['chat', *{CHAT!r}, '-m', {model!r}]); print('prompt_toolkit' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input="fox\n", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_ctrl_c_ends_generate_with_130_and_keeps_the_text(tmp_path: Path):
    path = tiny_model(tmp_path, context=60_000)
    arguments = ["-m", str(path), "--load-format", "dummy", "-n", "50000"]
    with Terminal("generate", "tell me more", *arguments) as terminal:
        terminal.wait_for("loading")
        terminal.wait_for("\x1b[2K timX")  # the bar has gone, the answer has begun
        terminal.send("\x03")
        assert terminal.process.wait(timeout=30) == 130
