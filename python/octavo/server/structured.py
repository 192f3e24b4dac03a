"""What a body wants of the answer's text, and the same behind what the model thinks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from octavo.errors import InvalidArgumentError
from octavo.grammar.tag_formats import newer_form
from octavo.server.errors import bad_request
from octavo.server.protocol import SamplingBody
from octavo.server.reasoning import ReasoningTags
from octavo.server.tag_parts import Part, any_text, one_of, optional, regex, sequence, tag, text
from octavo.structured_outputs import StructuredOutputs

# vLLM's older spelling.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}


def structured_outputs(body: SamplingBody) -> StructuredOutputs | None:
    """What the text of the answer is to be; None: anything. Raises an ApiError."""
    field, asked = structured_field(body), _asked(body)
    if len(asked) > 1:
        raise bad_request(f"{field} is given beside {list(asked)[1]}: leave one out", field)
    if field is None:
        return None
    wanted = asked[field]
    if body.guided_whitespace_pattern is not None:
        wanted = {"whitespace_pattern": body.guided_whitespace_pattern, **wanted}
    try:
        return StructuredOutputs.of(wanted)
    except InvalidArgumentError as error:
        raise bad_request(str(error), field) from error


def structured_field(body: SamplingBody) -> str | None:
    """The field that says what the text is to be."""
    return next(iter(_asked(body)), None)


def part_of(wanted: StructuredOutputs) -> Part:
    """The same as a part of a structural tag, but for its options."""
    if wanted.structural_tag is not None:
        found: Part = newer_form(str(wanted.structural_tag)).get("format", {})
        return found
    if wanted.regex is not None:
        return regex(wanted.regex)
    if wanted.grammar is not None:
        return {"type": "grammar", "grammar": wanted.grammar}
    if wanted.choice is not None:
        return one_of([*map(text, wanted.choice)])
    schema = {"type": "object"} if wanted.json is None else json.loads(str(wanted.json))
    return {"type": "json_schema", "json_schema": schema}


def as_tag(part: Part, wanted: StructuredOutputs | None = None) -> StructuredOutputs:
    """A structural tag with the options of `wanted`."""
    whole: dict[str, Any] = {"structural_tag": {"format": part}}
    if wanted is None:
        return StructuredOutputs(**whole)
    others = ("json", "regex", "choice", "grammar", "json_object")
    nothing: dict[str, Any] = dict.fromkeys(others)
    return replace(wanted, **nothing, **whole)


def after_reasoning(
    wanted: StructuredOutputs, tags: ReasoningTags, is_inside: bool
) -> StructuredOutputs:
    """The same behind what the model thinks, if it does. is_inside: it does already."""
    thinking = tag("" if is_inside else tags.begin, any_text(), tags.end)
    before = sequence(thinking, regex(r"[ \n]*"))
    whole = sequence(before if is_inside else optional(before), part_of(wanted))
    return as_tag(whole, wanted)


def demands_json(body: SamplingBody) -> bool:
    """Whether the text is to be JSON of a schema."""
    return any(wanted.get("json") is not None for wanted in _asked(body).values())


def _asked(body: SamplingBody) -> dict[str, Any]:
    """The fields that constrain the text, each with the fields of a StructuredOutputs."""
    found: dict[str, Any] = {}
    wanted = _response_format(body.response_format or {})
    if wanted is not None:
        found["response_format"] = wanted
    if body.structured_outputs:
        found["structured_outputs"] = body.structured_outputs
    for name, kind in _GUIDED.items():
        value = getattr(body, name)
        if value is not None and value is not False:
            found[name] = {kind: value}
    return found


def _response_format(given: dict[str, Any]) -> dict[str, Any] | None:
    kind = given.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")  # llama.cpp's and others' addition
        return {"json_object": True} if schema is None else {"json": schema, "strict": False}
    if kind == "structural_tag":
        wanted = {name: value for name, value in given.items() if name != "strict"}
        return {"structural_tag": wanted, "strict": given.get("strict") is True}
    if kind != "json_schema":
        raise bad_request(
            f"response_format is of type {kind!r}; expected 'text', 'json_object', 'json_schema' "
            "or 'structural_tag'",
            "response_format",
        )
    inner = given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise bad_request(
            "response_format has no schema; expected {'type': 'json_schema', 'json_schema': "
            "{'name': …, 'schema': {…}}}",
            "response_format",
        )
    return {"json": schema, "strict": isinstance(inner, dict) and inner.get("strict") is True}
