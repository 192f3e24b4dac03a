"""The commands of `octavo chat`: lines that begin with a slash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from octavo.cli import common
from octavo.cli.sampling_options import SAMPLING_FIELDS
from octavo.cli.thinking import Thinker, Thinking
from octavo.errors import InvalidArgumentError
from octavo.files import expand_home, read_text, write_text
from octavo.sampling_params import SamplingParams


class Talk(Protocol):
    """What the commands need of a conversation."""

    model: str
    system: str | None
    params: SamplingParams
    turns: list[dict[str, str]]
    thinker: Thinker

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns, after the system message if there is one."""

    def retry(self) -> None:
        """Ask the last question again."""

    def think(self, asked: Thinking) -> None:
        """From now on so."""


HELP = '''\
  /system TEXT     how the model should behave; begins anew
  /set NAME VALUE  change an option of sampling, as in /set temperature 0.9
  /set             show these options
  /thinking WORD   on, off: think before an answer; show, hide: what is thought
  /retry           ask the last question again, with another seed
  /save FILE       write the conversation to a file
  /load FILE       go on with the conversation in a file
  /reset           forget the conversation (the system message stays)
  /help            this list
  /exit            leave (so does Ctrl-D)
  Enter            send; what is pasted stays together, and can be edited first
  Alt-Enter        begin another line (so does a backslash at the end of a line, then Enter)
  """              the first and the last line of a message of several lines
  Ctrl-C           stop the answer, or drop what is typed; leave if nothing is
A line that begins with a space is sent as it is, even with a / behind it.'''


def carry_out(talk: Talk, line: str) -> bool:
    """Carry out a command; False if the line is not one. Raises OctavoError."""
    found = re.fullmatch(r"/([a-z]*)(?:\s+(.*))?", line.rstrip(), flags=re.DOTALL)
    if found is None:
        return False
    name, rest = found[1], (found[2] or "").strip()
    if name not in _COMMANDS:
        common.note(f"(there is no command /{name}; /help lists them)")
    else:
        _COMMANDS[name](talk, rest)
    return True


def _help(talk: Talk, rest: str) -> None:
    common.note(HELP)


def _reset(talk: Talk, rest: str) -> None:
    talk.turns.clear()
    common.note("(the conversation is forgotten)")


def _system(talk: Talk, rest: str) -> None:
    talk.system = rest or None
    talk.turns.clear()
    change = "set" if rest else "the model's own again"
    common.note(f"(system message {change}; the conversation begins anew)")


def _retry(talk: Talk, rest: str) -> None:
    talk.retry()


def _set(talk: Talk, rest: str) -> None:
    """/set NAME VALUE, or /set alone."""
    name, _, value = rest.partition(" ")
    name = name.lstrip("-").replace("-", "_")
    if not name:
        shown = {each: getattr(talk.params, each) for each in SAMPLING_FIELDS}
        common.note("\n".join(f"  {each:<28}{_text(value)}" for each, value in shown.items()))
        return
    if name not in SAMPLING_FIELDS:
        raise InvalidArgumentError(
            f"/set has no option {name!r}; expected one of {', '.join(SAMPLING_FIELDS)}"
        )
    if not value.strip():
        raise InvalidArgumentError(f"/set {name} has no value; expected one, as in /set top_p 0.9")
    talk.params = replace(talk.params, **{name: _value(value.strip())})
    common.note(f"({name} is {_text(getattr(talk.params, name))})")


def _thinking(talk: Talk, rest: str) -> None:
    changes: dict[str, dict[str, bool]] = {
        **{"on": {"think": True}, "off": {"think": False}},
        **{"show": {"hide_thinking": False}, "hide": {"hide_thinking": True}},
    }
    if rest not in changes:
        raise InvalidArgumentError(f"/thinking is {rest!r}; expected one of {', '.join(changes)}")
    talk.think(replace(talk.thinker.asked, **changes[rest]))
    common.note(f"(thinking: {rest})")


def _value(text: str) -> Any:
    """What was typed, as JSON; a text if it is none. "none" is None."""
    try:
        return json.loads({"none": "null", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _text(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _file(name: str, command: str) -> Path:
    if not name:
        raise InvalidArgumentError(f"/{command} names no file; expected /{command} FILE")
    return expand_home(name)


def _save(talk: Talk, rest: str) -> None:
    """The file is a request to /v1/chat/completions, and a line of `octavo batch` on many lines."""
    path = _file(rest, "save")
    content = {"model": talk.model, "messages": talk.messages}
    write_text(path, "the conversation", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    common.note(f"({len(talk.turns) // 2} turns are written to {path})")


def _load(talk: Talk, rest: str) -> None:
    path = _file(rest, "load")
    messages = _messages(path)
    talk.system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    talk.turns = messages
    common.note(f"({len(messages) // 2} turns are read from {path}; the conversation goes on)")


def _messages(path: Path) -> list[dict[str, str]]:
    """The messages of a file that /save wrote, or of a request. Raises InvalidArgumentError."""
    expected = 'a conversation that /save wrote: {"messages": [{"role": …, "content": …}, …]}'
    text = read_text(path, expected)
    try:
        messages = json.loads(text)["messages"]
        found = [
            {
                "role": str(one["role"]),
                "content": one["content"],
                **({"reasoning": str(one["reasoning"])} if one.get("reasoning") else {}),
            }
            for one in messages
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidArgumentError(f"{path} holds something else; expected {expected}") from None
    roles = [message["role"] for message in found]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    is_text = all(isinstance(message["content"], str) for message in found)
    if not found or not is_text or turns != ["user", "assistant"] * (len(turns) // 2):
        raise InvalidArgumentError(
            f"{path} has messages of {', '.join(roles) or 'nobody'}; expected texts of user and "
            "assistant by turns, after one of system or none"
        )
    return found


_COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "help": _help,
    "load": _load,
    "reset": _reset,
    "retry": _retry,
    "save": _save,
    "set": _set,
    "system": _system,
    "thinking": _thinking,
}
