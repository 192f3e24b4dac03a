"""What the text of an answer must look like: a JSON schema, a regular expression, a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from octavo.errors import InvalidArgumentError

MAX_TEXT = 1 << 20  # characters of a schema or a grammar
MAX_REGEX = 1 << 16
MAX_CHOICES = 10_000
MAX_DEPTH = 512  # lists and objects within each other, those around a server's schema included
_ESCAPED, _STRING = re.compile(rb"\\.", re.DOTALL), re.compile(rb'"[^"]*"?')
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - _STEPS.keys())
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_IGNORED = {"disable_fallback"}  # vLLM's: whether another library may be tried
_SWITCHES = ("disable_any_whitespace", "disable_additional_properties", "strict")


@dataclass(frozen=True)
class StructuredOutputs:
    """A constraint on the text of an answer; exactly one of the first six is given.

    The names are those of vLLM's `StructuredOutputsParams`.

    json: the text is JSON of this schema: an object, True, or the JSON text of one. It is kept as
        JSON text, in the order given, which is the order of the properties in the answer.
    regex: the whole text matches this regular expression (Rust's syntax; no look-around).
    choice: the text is one of these strings.
    grammar: the text is in the language of this grammar, in Lark's or GBNF's syntax.
    json_object: True: the text is any JSON object.
    structural_tag: free text in which some parts follow schemas, expressions or grammars: a mapping
        as xgrammar has it ({"format": ...}, or {"structures", "triggers"}), or its JSON text. It is
        kept as JSON text.
    whitespace_pattern: a regular expression of what may stand between two elements of JSON, where
        anything does; None: up to 64 spaces, tabs and line ends.
    disable_any_whitespace: JSON without whitespace.
    disable_additional_properties: objects of a schema with "properties" have no others, where the
        schema does not say.
    strict: what cannot be enforced of a schema is an error; False: it is left out.

    Raises InvalidArgumentError for what is none of these.
    """

    json: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Mapping[str, Any] | str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidArgumentError(
                f"structured_outputs has {' and '.join(given) or 'nothing to follow'}; expected "
                f"one of {', '.join(_KINDS)}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _json_text(self.json, "the JSON schema"))
        if self.structural_tag is not None:
            text = _json_text(self.structural_tag, "structural_tag")
            if text in ("true", "false"):
                raise InvalidArgumentError(
                    f"structural_tag is {text}; expected an object, or its JSON text"
                )
            object.__setattr__(self, "structural_tag", text)
        if self.choice is not None:
            object.__setattr__(self, "choice", _check_choice(self.choice))
        for name, limit in (("regex", MAX_REGEX), ("grammar", MAX_TEXT)):
            _check_text(name, getattr(self, name), limit)
        _check_text("whitespace_pattern", self.whitespace_pattern, 1000)
        for name in (*_SWITCHES, "json_object"):
            value = getattr(self, name)
            if value not in (False, True, None) or (value is None and name in _SWITCHES):
                raise InvalidArgumentError(
                    f"structured_outputs.{name} is {value!r}; expected True or False"
                )

    @classmethod
    def of(cls, value: StructuredOutputs | Mapping[str, Any]) -> StructuredOutputs:
        """The constraint itself, or made of its fields; a field without a value is as none."""
        if isinstance(value, cls):
            return value
        known = {each.name for each in fields(cls)}
        if not isinstance(value, Mapping):
            raise InvalidArgumentError(
                f"structured_outputs is {value!r}; expected a StructuredOutputs or its fields"
            )
        unknown = sorted(str(name) for name in value.keys() - known - _IGNORED)
        if unknown:
            raise InvalidArgumentError(
                f"structured_outputs has {unknown[0]!r}; expected some of "
                f"{', '.join(sorted(known))}"
            )
        return cls(
            **{name: each for name, each in value.items() if name in known and each is not None}
        )


def _json_text(schema: Any, name: str) -> str:
    try:
        found = _loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        data = text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{name} is no JSON: {error}; expected an object, or its JSON text"
        ) from error
    if not isinstance(found, (Mapping, bool)):
        raise InvalidArgumentError(
            f"{name} is {type(found).__name__}; expected an object, or its JSON text"
        )
    if is_deeper(data, MAX_DEPTH):
        raise InvalidArgumentError(
            f"{name} has more than {MAX_DEPTH} lists and objects within each other: nest them less "
            "deep"
        )
    if len(text) > MAX_TEXT:
        raise InvalidArgumentError(
            f"{name} has {len(text)} characters; expected at most {MAX_TEXT}"
        )
    return text


def is_deeper(data: bytes, limit: int) -> bool:
    """Whether JSON, in UTF-8, has more than `limit` lists and objects within each other.

    Of data that is no JSON the answer may be either.
    """
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    brackets = _STRING.sub(b"", _ESCAPED.sub(b"", data)).translate(None, _NO_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > limit


def _loads(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    return json.loads(text, parse_constant=refuse)


def _check_choice(choice: Sequence[str]) -> tuple[str, ...]:
    if isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
        raise InvalidArgumentError(f"choice is {choice!r}; expected a list of strings")
    for text in choice:
        if not text:
            raise InvalidArgumentError(f"choice holds {text!r}; expected strings, none empty")
        _check_text("choice", text, MAX_TEXT)
    if len(choice) > MAX_CHOICES or sum(map(len, choice)) > MAX_TEXT:
        raise InvalidArgumentError(
            f"choice has {len(choice)} strings of {sum(map(len, choice))} characters; expected at "
            f"most {MAX_CHOICES} of {MAX_TEXT}"
        )
    return tuple(dict.fromkeys(choice))


def _check_text(name: str, text: Any, limit: int) -> None:
    if text is None:
        return
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"{name} is {text!r}; expected a text that is not empty")
    if len(text) > limit:
        raise InvalidArgumentError(f"{name} has {len(text)} characters; expected at most {limit}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{name} holds half a surrogate pair at character {error.start}, which is no text"
        ) from error
