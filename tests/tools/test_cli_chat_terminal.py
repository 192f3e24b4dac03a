"""`octavo chat` on a terminal: keys, pasted text, Ctrl-C, windows."""

from __future__ import annotations

import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from terminal_helpers import MARKED, PROMPT, SENT, Terminal
from text_helpers import tiny_model

CHAT = ["--load-format", "dummy", "-t", "0", "-n", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


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
