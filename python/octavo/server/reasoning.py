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
        self._space: list[str] = []  # held back, in as many parts as it came in
        self._held = ""  # behind it: what may be the beginning of a tag
        self._may_begin = start != "behind"  # with the first tag
        self._is_bare = start == "inside"  # nothing but space has come behind the last tag

    def push(self, text: str) -> list[str | Reasoning]:
        """What this text makes certain."""
        text, self._held = self._held + text, ""
        if self._may_begin:
            begin, found = self._tags.begin, text.lstrip()
            self._space.append(text[: len(text) - len(found)])
            if begin.startswith(found) and found != begin:
                self._held = found
                return []
            self._may_begin, text = False, found
            if found.startswith(begin):
                text = found[len(begin) :]
                self._space, self._place, self._is_bare = [], "inside", True
            elif self._place == "before":
                self._place = "behind"
        pieces: list[str | Reasoning] = []
        if self._place == "inside":
            thought, found, text = text.partition(self._tags.end)
            if not found:
                thought, self._held = before_tag(thought, self._tags.end)
            shown = thought.rstrip()
            if shown:
                pieces = [Reasoning(self._with_space(shown))]
            self._space.append(thought[len(shown) :])
            if not found:
                return pieces
            self._space, self._place, self._is_bare = [], "behind", True
        answer = self._with_space(text)
        return [*pieces, answer] if answer else pieces

    def finish(self) -> list[str | Reasoning]:
        """What is left at the end."""
        held = "".join([*self._space, self._held])
        self._space, self._held = [], ""
        if not held.strip() and self._place == "inside":
            return []
        return [held if self._place != "inside" else Reasoning(held)] if held else []

    def _with_space(self, text: str) -> str:
        """This text behind the space before it, which counts for nothing beside a tag."""
        text, self._space = "".join([*self._space, text]), []
        if self._is_bare:
            text = text.lstrip()
            self._is_bare = not text
        return text


def before_tag(text: str, *tags: str) -> tuple[str, str]:
    """The text up to where one of these tags may begin, and the rest, which is shorter than a tag.

    None of the tags is in the text.
    """
    first = max(0, len(text) - max(map(len, tags)) + 1)
    ends = (at for at in range(first, len(text)) if any(tag.startswith(text[at:]) for tag in tags))
    cut = next(ends, len(text))
    return text[:cut], text[cut:]
