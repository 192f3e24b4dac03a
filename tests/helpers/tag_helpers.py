"""Structural tags: random ones, and whether a text is of one, by another way than octavo's."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema

WORDS = ["a", "b", "ab", "<a>", "</a>", "<b", "é"]
SCHEMAS: list[Any] = [
    {"type": "integer", "minimum": 0, "maximum": 30},
    {"enum": ["a", "<a>", "</a>"]},
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
]
TAGS = ["<a>", "<b>", "<ab>", "["]
COMBINED = ["sequence", "or", "optional", "star", "plus", "repeat", "tag", "dispatch"]


def random_format(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A format; what follows free text in it may be nothing that says where the text ends."""
    kind = rng.choice([*COMBINED, "triggered_tags", "tags_with_separator", "tag"])
    if depth > 3 or rng.random() < 0.3:
        kind = rng.choice(["const_string", "json_schema", "regex", "any_text", "grammar"])

    def inner() -> dict[str, Any]:
        return random_format(rng, depth + 1)

    def tag() -> dict[str, Any]:
        end = rng.choice(["</a>", "!", ["</a>", "!"]])
        return {"type": "tag", "begin": rng.choice(TAGS), "content": inner(), "end": end}

    fields: dict[str, Any] = {"type": kind}
    if kind == "const_string":
        fields["value"] = rng.choice(WORDS)
    elif kind == "json_schema":
        fields["json_schema"] = rng.choice(SCHEMAS)
    elif kind == "regex":
        fields["pattern"] = rng.choice(["[ab]+", "a|bb", "b*", "[0-9]{2}", "(ab)*"])
    elif kind == "grammar":
        fields["grammar"] = rng.choice(['root ::= "a" | "b" root "b"', 'root ::= ("x" "y")* "z"'])
    elif kind == "any_text":
        fields["excludes"] = rng.choice([[], ["a"], ["ba", "é"]])
    elif kind in ("sequence", "or"):
        fields["elements"] = [inner() for _ in range(rng.randrange(1, 4))]
    elif kind in ("optional", "star", "plus"):
        fields["content"] = inner()
    elif kind == "repeat":
        fields |= {"content": inner(), "min": rng.randrange(2), "max": rng.choice([-1, 1, 2])}
    elif kind == "tag":
        return tag()
    elif kind == "dispatch":
        fields |= {"rules": [[rng.choice(TAGS), inner()]], "loop": rng.random() < 0.5}
    else:
        fields["tags"] = [tag() for _ in range(rng.randrange(1, 4))]
        fields |= {name: rng.random() < 0.3 for name in ("at_least_one", "stop_after_first")}
        if kind == "triggered_tags":
            begins = sorted({each["begin"] for each in fields["tags"]})
            fields["triggers"] = sorted({begin[0] for begin in begins})
        else:
            fields["separator"] = rng.choice([",", "", "\n"])
    return fields


class Judge:
    """Says of one text where a format that begins at a place of it may end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[tuple[int, int], set[int]] = {}

    def is_whole(self, part: dict[str, Any]) -> bool:
        return len(self._text) in self.ends(part, 0)

    def ends(self, part: dict[str, Any], begin: int) -> set[int]:
        key = id(part), begin
        if key not in self._known:
            self._known[key] = getattr(self, f"_{part['type']}")(part, begin)
        return self._known[key]

    def _literal(self, literal: str, begin: int) -> set[int]:
        return {begin + len(literal)} if self._text.startswith(literal, begin) else set()

    def _const_string(self, part: Any, begin: int) -> set[int]:
        return self._literal(part["value"], begin)

    def _regex(self, part: Any, begin: int) -> set[int]:
        pattern, places = re.compile(part["pattern"]), range(begin, len(self._text) + 1)
        return {end for end in places if pattern.fullmatch(self._text, begin, end)}

    def _grammar(self, part: Any, begin: int) -> set[int]:
        pattern = re.compile("(b*)a(b*)" if '"b"' in part["grammar"] else "(?:xy)*z()()")
        found = [pattern.fullmatch(self._text, begin, end) for end in range(len(self._text) + 1)]
        return {each.end() for each in found if each and (each[1] or "") == (each[2] or "")}

    def _json_schema(self, part: Any, begin: int) -> set[int]:
        found = set()
        for end in range(begin + 1, len(self._text) + 1):
            try:
                jsonschema.validate(json.loads(self._text[begin:end]), part["json_schema"])
                found.add(end)
            except (ValueError, jsonschema.ValidationError):
                continue
        return found

    def _any_text(self, part: Any, begin: int) -> set[int]:
        places = range(begin, len(self._text) + 1)
        excludes = part.get("excludes", [])
        return {e for e in places if not any(each in self._text[begin:e] for each in excludes)}

    def _sequence(self, part: Any, begin: int) -> set[int]:
        found = {begin}
        for each in part["elements"]:
            found = {end for place in found for end in self.ends(each, place)}
        return found

    def _or(self, part: Any, begin: int) -> set[int]:
        return {end for each in part["elements"] for end in self.ends(each, begin)}

    def _times(self, part: Any, begin: int, least: int, most: float) -> set[int]:
        found, reached, number = set[int](), {begin}, 0
        while reached:
            found |= reached if number >= least else set()
            if number >= most or number > len(self._text) + 1:
                break
            reached = {e for place in reached for e in self.ends(part["content"], place)}
            number += 1
        return found

    def _optional(self, part: Any, begin: int) -> set[int]:
        return self._times(part, begin, 0, 1)

    def _star(self, part: Any, begin: int) -> set[int]:
        return self._times(part, begin, 0, float("inf"))

    def _plus(self, part: Any, begin: int) -> set[int]:
        return self._times(part, begin, 1, float("inf"))

    def _repeat(self, part: Any, begin: int) -> set[int]:
        most = float("inf") if part["max"] == -1 else part["max"]
        return self._times(part, begin, part["min"], most)

    def _tag(self, part: Any, begin: int) -> set[int]:
        closing = part["end"] if isinstance(part["end"], list) else [part["end"]]
        opened = self._literal(part["begin"], begin)
        inside = {end for place in opened for end in self.ends(part["content"], place)}
        return {end for place in inside for each in closing for end in self._literal(each, place)}

    def _free(self, begin: int, triggers: list[str]) -> set[int]:
        """Text in which no trigger is."""
        places = range(begin, len(self._text) + 1)
        return {e for e in places if not any(each in self._text[begin:e] for each in triggers)}

    def _dispatch(self, part: Any, begin: int) -> set[int]:
        triggers = [pattern for pattern, _ in part["rules"]]

        def case(place: int) -> set[int]:
            return {
                end
                for free in self._free(place, triggers)
                for pattern, then in part["rules"]
                for opened in self._literal(pattern, free)
                for end in self.ends(then, opened)
            }

        return self._cases(part["loop"], begin, case, triggers)

    def _cases(self, loop: bool, begin: int, case: Any, triggers: list[str]) -> set[int]:
        if not loop:
            return case(begin) | self._free(begin, triggers)
        reached, waiting = {begin}, [begin]
        while waiting:
            new = case(waiting.pop()) - reached
            reached |= new
            waiting += new
        return {end for place in reached for end in self._free(place, triggers)}

    def _triggered_tags(self, part: Any, begin: int) -> set[int]:
        tags, triggers, once = part["tags"], part["triggers"], part["stop_after_first"]
        firsts = {begin}
        if part["at_least_one"]:
            firsts = {end for tag in tags for end in self.ends(tag, begin)}
            if once:
                return firsts

        def case(place: int) -> set[int]:
            places = self._free(place, triggers)
            return {end for p in places for tag in tags for end in self.ends(tag, p)}

        return {e for first in firsts for e in self._cases(not once, first, case, triggers)}

    def _tags_with_separator(self, part: Any, begin: int) -> set[int]:
        found = set() if part["at_least_one"] else {begin}
        reached = {e for tag in part["tags"] for e in self.ends(tag, begin)}
        while not reached <= found:
            found |= reached
            if part["stop_after_first"]:
                break
            parted = {e for place in reached for e in self._literal(part["separator"], place)}
            reached = {e for place in parted for tag in part["tags"] for e in self.ends(tag, place)}
        return found
