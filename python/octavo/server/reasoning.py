"""What a model thinks before it answers, told from the answer by the tags around it.

Qwen3, DeepSeek-R1, SmolLM3, Granite and others write <think>…</think>, Magistral [THINK]…[/THINK].
Some chat templates write the first tag themselves, as the end of the prompt; some write both, for
an answer without thinking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# Where an answer begins: within the thinking, before it if there is any, or behind it.
Start = Literal["inside", "before", "behind"]


@dataclass(frozen=True)
class ReasoningTags:
    """What stands before and behind the thinking. always: no answer comes without thinking."""

    begin: str
    end: str
    always: bool = False

    def start(self, prompt: str | None) -> Start:
        """Where an answer to this prompt begins; None: its text is not known."""
        text = (prompt or "").rstrip()
        if text.endswith(self.end):
            return "behind"
        return "inside" if self.always or text.endswith(self.begin) else "before"


_THINK = ReasoningTags("<think>", "</think>")
_MISTRAL = ReasoningTags("[THINK]", "[/THINK]")
# By the names of vLLM's parsers. deepseek_r1 is for templates that leave the first tag out.
REASONING = {
    "qwen3": _THINK,
    "deepseek_r1": replace(_THINK, always=True),
    "mistral": _MISTRAL,
}


def detect_reasoning(template: str) -> ReasoningTags | None:
    """The tags that a chat template knows; None where it knows none."""
    return next((tags for tags in (_THINK, _MISTRAL) if tags.end in template), None)


@dataclass(frozen=True)
class Reasoning:
    """Some of what the model thinks."""

    text: str


class ReasoningParser:
    """Cuts the thinking out of one answer. White space beside the tags belongs to neither part.

    Where an answer begins within the thinking, the first tag may come nonetheless.
    """

    def __init__(self, tags: ReasoningTags, start: Start) -> None:
        self._tags = tags
        self._place: Start = start
        self._held = ""
        self._may_begin = start != "behind"  # with the first tag
        self._is_bare = start == "inside"  # nothing but space has come behind the last tag

    def push(self, text: str) -> list[str | Reasoning]:
        """What this text makes certain."""
        self._held += text
        pieces: list[str | Reasoning] = []
        if self._may_begin:
            begin, found = self._tags.begin, self._held.lstrip()
            if begin.startswith(found) and found != begin:
                return []
            self._may_begin = False
            if found.startswith(begin):
                self._held, self._place, self._is_bare = found[len(begin) :], "inside", True
            elif self._place == "before":
                self._place = "behind"
        if self._place == "inside":
            thought, found, rest = self._held.partition(self._tags.end)
            if not found:
                cut = len(thought) - overlap(thought, self._tags.end)
                thought, rest = thought[:cut], thought[cut:]
            shown = thought.rstrip()
            self._held = rest if found else thought[len(shown) :] + rest
            pieces += [Reasoning(text)] if (text := self._past_space(shown)) else []
            if not found:
                return pieces
            self._place, self._is_bare = "behind", True
        shown, self._held = self._past_space(self._held), ""
        return [*pieces, shown] if shown else pieces

    def finish(self) -> list[str | Reasoning]:
        """What is left at the end."""
        held, self._held = self._held, ""
        if not held.strip() and self._place == "inside":
            return []
        return [held if self._place != "inside" else Reasoning(held)] if held else []

    def _past_space(self, text: str) -> str:
        if self._is_bare:
            text = text.lstrip()
            self._is_bare = not text
        return text


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    lengths = range(min(len(text), len(tag) - 1), 0, -1)
    return next((length for length in lengths if tag.startswith(text[-length:])), 0)
