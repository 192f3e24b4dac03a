"""What a body wants of the answer's text: structured outputs, and tools that must be called."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.grammar.tag_formats import newer_form
from octavo.server.errors import ApiError, bad_request, field_of
from octavo.server.protocol import ChatBody, SamplingBody
from octavo.server.reasoning import ReasoningTags
from octavo.server.tool_xml_grammar import tag_of_call
from octavo.server.tools import ToolFormat, Writing, writing_of
from octavo.structured_outputs import StructuredOutputs

# An error about the parameters of a tool; see `calls_of_tools`.
_OF_TOOL = re.compile(
    r"structural_tag\.format\.elements\[1\]\.tags\[(\d+)\]\.content[^:]*: (.*)", re.DOTALL
)
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


def after_reasoning(
    wanted: StructuredOutputs, tags: ReasoningTags, is_inside: bool
) -> StructuredOutputs:
    """The same behind what the model thinks, if it does. is_inside: it does already."""
    parts: dict[str, Any] = {
        "json": lambda: {"type": "json_schema", "json_schema": json.loads(str(wanted.json))},
        "json_object": lambda: {"type": "json_schema", "json_schema": {"type": "object"}},
        "regex": lambda: {"type": "regex", "pattern": wanted.regex},
        "grammar": lambda: {"type": "grammar", "grammar": wanted.grammar},
        "choice": lambda: {
            "type": "or",
            "elements": [{"type": "const_string", "value": text} for text in wanted.choice or ()],
        },
        "structural_tag": lambda: newer_form(str(wanted.structural_tag)).get("format", {}),
    }
    kind = next(kind for kind in parts if getattr(wanted, kind) is not None)
    thinking: dict[str, Any] = {
        "type": "tag",
        "begin": "" if is_inside else tags.begin,
        "content": {"type": "any_text"},
        "end": tags.end,
    }
    space = {"type": "regex", "pattern": r"[ \n]*"}
    before: dict[str, Any] = {"type": "sequence", "elements": [thinking, space]}
    if not is_inside:
        before = {"type": "optional", "content": before}
    whole = {"format": {"type": "sequence", "elements": [before, parts[kind]()]}}
    changed: dict[str, Any] = {kind: None, "structural_tag": whole}
    return replace(wanted, **changed)


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


def forced_tools(body: ChatBody) -> list[int] | None:
    """The numbers of the tools one of which must be called; None where the model may choose."""
    choice = body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    tools = body.tools or []
    if not tools:
        raise bad_request(f"tool_choice is {choice!r}, but there are no tools", "tool_choice")
    if choice == "required":
        return list(range(len(tools)))
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    names = [(tool.get("function") or {}).get("name") for tool in tools]
    if name is None or name not in names:
        raise bad_request(
            f"tool_choice is {choice!r}; expected 'none', 'auto', 'required' or {{'type': "
            f"'function', 'function': {{'name': …}}}} with the name of a tool ({names})",
            "tool_choice",
        )
    return [names.index(name)]


def calls_of_tools(
    body: ChatBody, numbers: list[int], tool_format: ToolFormat
) -> StructuredOutputs:
    """Calls of these tools, written as the model writes them.

    One call; several where any tool will do and the body does not forbid it. Raises an ApiError
    that names the tool whose parameters are no schema.
    """
    writing = writing_of(tool_format)
    functions = [(body.tools or [])[number]["function"] for number in numbers]
    parameters = [_parameters(f, number) for f, number in zip(functions, numbers, strict=True)]
    tags: list[dict[str, Any] | None] = [None]
    if tool_format == "qwen3_coder":
        tags = [tag_of_call(*each) for each in zip(functions, parameters, strict=True)]
    if None in tags:
        tags = [_tag(writing, *each) for each in zip(functions, parameters, strict=True)]
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": writing.separator,
        "at_least_one": True,
        "stop_after_first": body.tool_choice != "required" or body.parallel_tool_calls is False,
    }
    begins = [{"type": "const_string", "value": text} for text in writing.begins]
    frame = [{"type": "or", "elements": begins}, calls]
    frame.append({"type": "const_string", "value": writing.end})
    whole = {"format": {"type": "sequence", "elements": frame}}
    return StructuredOutputs(structural_tag=whole, disable_additional_properties=True)


def _tag(writing: Writing, function: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """One call, whose arguments are JSON."""
    name = json.dumps(function["name"]) if writing.is_quoted else function["name"]
    content = {
        "type": "json_schema",
        "json_schema": parameters,
        "strict": function.get("strict") is True,
    }
    begin = f"{writing.before}{name}{writing.between}"
    return {"type": "tag", "begin": begin, "content": content, "end": writing.after}


def _parameters(function: dict[str, Any], number: int) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object in any case."""
    schema = function.get("parameters")
    try:
        text = str(StructuredOutputs(json={} if schema is None else schema).json)
    except OctavoError as error:
        raise bad_request(str(error), f"tools[{number}].function.parameters") from error
    found = json.loads(text)
    found = {} if found is True else found
    kinds = found.get("type", "object") if isinstance(found, dict) else []
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise bad_request(
            f"the parameters are {'false' if found is False else f'of type {kinds!r}'}; expected a "
            "schema of objects, which arguments are",
            f"tools[{number}].function.parameters",
        )
    if "$ref" in found:  # beside which an old "$schema" would have nothing count
        found.pop("$schema", None)
    return {**found, "type": "object"}


def compile_error(error: InvalidArgumentError, body: SamplingBody) -> ApiError:
    """The error about what the text is to be, with its field, which may be one of the tools."""
    numbers = forced_tools(body) if isinstance(body, ChatBody) else None
    of_tool = None if numbers is None else _OF_TOOL.match(str(error))
    if numbers is not None and of_tool is not None:
        number, message = numbers[int(of_tool[1])], of_tool[2]
        return bad_request(message, f"tools[{number}].function.parameters")
    field = structured_field(body) or "tool_choice"
    return bad_request(str(error), field_of(str(error)) or field)
