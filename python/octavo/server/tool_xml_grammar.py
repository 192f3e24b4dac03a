"""Structural tags for calls in the notation of `octavo.server.tool_xml`."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.server.tag_parts import (
    Part,
    any_text,
    json_of,
    one_of,
    optional,
    regex,
    sequence,
    star,
    tag,
    text,
)
from octavo.server.tool_xml import Schema, schemas_of, types_of

_OF_PARAMETERS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}
_OF_STRINGS = {"type", "enum", "const", "$defs", "definitions"}
_ENDS = ("</parameter>", "</tool_call>")  # which none of several strings may hold


def members_of(parameters: Schema) -> dict[str, tuple[Schema, bool]] | None:
    """The schema of each parameter, and whether it is required.

    None where they depend on each other, where others may come whose values have a schema, or where
    the schema is malformed.
    """
    required, properties = parameters.get("required", []), parameters.get("properties", {})
    if not isinstance(required, list) or not isinstance(properties, Mapping):
        return None
    schemas = schemas_of([{"function": {"name": "", "parameters": parameters}}], "")
    is_known = (
        parameters.keys() <= _OF_PARAMETERS | NOTES
        and isinstance(parameters.get("additionalProperties", False), bool)
        and schemas.keys() == properties.keys()
        and all(isinstance(key, str) and key in schemas for key in required)
    )
    return {key: (each, key in required) for key, each in schemas.items()} if is_known else None


def tag_of_call(
    name: str, parameters: Schema, *, strict: bool, excludes: tuple[str, ...] = ()
) -> Part | None:
    """A call of this function; None if its schema cannot be said in tags.

    So it is where `members_of` gives none, where a value could be a string or something else, or
    where a string has a pattern, a length, or an end of a parameter in it. excludes: what no string
    holds.
    """
    members = members_of(parameters)
    if members is None or not all(map(_is_plain, (name, *members))):
        return None
    elements = []
    for key, (schema, is_required) in members.items():
        value = _value(schema, strict, excludes)
        if value is None:
            return None
        element = tag(f"<parameter={key}>\n", value, "\n</parameter>\n")
        elements.append(element if is_required else optional(element))
    return _call(name, sequence(*(elements or [text("")])))


def tag_of_any_call(name: str) -> Part | None:
    """A call of this function with any parameters; None where tags cannot say its name."""
    value = tag(">\n", any_text("</tool_call>"), "\n</parameter>\n")
    parameter = sequence(text("<parameter="), regex(r"[^<>\n]{1,200}"), value)
    return _call(name, star(parameter)) if _is_plain(name) else None


def _call(name: str, parameters: Part) -> Part:
    return tag(f"<tool_call>\n<function={name}>\n", parameters, "</function>\n</tool_call>")


def _is_plain(name: str) -> bool:
    return bool(name) and not set(name) & set("<>\n")


def _value(schema: Schema, strict: bool, excludes: tuple[str, ...]) -> Part | None:
    types = types_of(schema)
    if types != {"string"}:
        is_known = types and "string" not in types
        return json_of(dict(schema), strict=strict, closed=True) if is_known else None
    if not schema.keys() <= _OF_STRINGS | NOTES:
        return None
    if "enum" not in schema and "const" not in schema:
        return any_text(*excludes)
    given = [schema["const"]] if "const" in schema else schema["enum"]
    texts = [each for each in given if isinstance(each, str)] if isinstance(given, list) else []
    if not texts or any(end in each for end in _ENDS for each in texts):
        return None
    return one_of([*map(text, texts)])
