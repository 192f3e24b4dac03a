"""Structural tags for calls in the notation of `octavo.server.tool_xml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.server.tool_xml import Schema, schemas_of, types_of

_OF_PARAMETERS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}
_OF_STRINGS = {"type", "enum", "const", "$defs", "definitions"}


def tag_of_call(function: Mapping[str, Any], parameters: Schema) -> dict[str, Any] | None:
    """A call of this function; None if its schema cannot be said in tags.

    So it is where a value could be a string or something else, where a string has a pattern or a
    length, where the parameters depend on each other, or where the schema is malformed.
    """
    required, properties = parameters.get("required", []), parameters.get("properties", {})
    if not isinstance(required, list) or not isinstance(properties, Mapping):
        return None
    schemas = schemas_of([{"function": {"name": "", "parameters": parameters}}], "")
    is_known = (
        parameters.keys() <= _OF_PARAMETERS | _NOTES
        and isinstance(parameters.get("additionalProperties", False), bool)
        and schemas.keys() == properties.keys()
        and all(isinstance(key, str) and key in schemas for key in required)
        and all(map(_is_plain, (function["name"], *schemas)))
    )
    values = [_value(schema, function.get("strict") is True) for schema in schemas.values()]
    if not is_known or None in values:
        return None
    elements: list[dict[str, Any]] = []
    for key, value in zip(schemas, values, strict=True):
        tag = {"type": "tag", "begin": f"<parameter={key}>\n", "content": value}
        tag["end"] = "\n</parameter>\n"
        elements.append(tag if key in required else {"type": "optional", "content": tag})
    return {
        "type": "tag",
        "begin": f"<tool_call>\n<function={function['name']}>\n",
        "content": {"type": "sequence", "elements": elements or [_text("")]},
        "end": "</function>\n</tool_call>",
    }


def _is_plain(name: str) -> bool:
    return bool(name) and not set(name) & set("<>\n")


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _value(schema: Schema, strict: bool) -> dict[str, Any] | None:
    types = types_of(schema)
    if types != {"string"}:
        is_known = types and "string" not in types
        wanted = {"type": "json_schema", "json_schema": dict(schema), "strict": strict}
        return wanted if is_known else None
    if not schema.keys() <= _OF_STRINGS | _NOTES:
        return None
    if "enum" not in schema and "const" not in schema:
        return {"type": "any_text"}
    given = [schema["const"]] if "const" in schema else schema["enum"]
    texts = [each for each in given if isinstance(each, str)] if isinstance(given, list) else []
    return {"type": "or", "elements": [_text(each) for each in texts]} if texts else None
