"""The formats of structural tags that the server writes, as `octavo.grammar.tag_formats` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Part = dict[str, Any]


def text(value: str) -> Part:
    """This text."""
    return {"type": "const_string", "value": value}


def any_text(*excludes: str) -> Part:
    """Free text, up to what ends it, without these strings."""
    return {"type": "any_text", "excludes": excludes}


def regex(pattern: str) -> Part:
    """A text that matches an expression."""
    return {"type": "regex", "pattern": pattern}


def json_of(schema: Any, *, strict: bool, closed: bool) -> Part:
    """JSON of a schema. closed: objects have no other members, where it says nothing of them."""
    return {"type": "json_schema", "json_schema": schema, "strict": strict, "closed": closed}


def sequence(*elements: Part) -> Part:
    """All of them, one after the other."""
    return {"type": "sequence", "elements": elements}


def one_of(elements: Sequence[Part]) -> Part:
    """One of them."""
    return {"type": "or", "elements": elements} if len(elements) > 1 else elements[0]


def optional(content: Part) -> Part:
    """The content, or nothing."""
    return {"type": "optional", "content": content}


def star(content: Part) -> Part:
    """The content any number of times."""
    return {"type": "star", "content": content}


def tag(begin: str, content: Part, end: str) -> Part:
    """The content between two texts."""
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def tags_with_separator(tags: Sequence[Part], separator: str, *, many: bool) -> Part:
    """One of the tags, or, if there may be many, one or more of them."""
    return {
        **{"type": "tags_with_separator", "tags": tags, "separator": separator},
        **{"at_least_one": True, "stop_after_first": not many},
    }


def separated(content: Part, separator: Part) -> Part:
    """The content once or more, and the separator between every two of them."""
    return {"type": "separated", "content": content, "separator": separator}
