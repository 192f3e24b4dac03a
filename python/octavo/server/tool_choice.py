"""Which calls of tools a body wants, and what they are to follow."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from octavo.errors import OctavoError
from octavo.server.errors import bad_request
from octavo.server.protocol import ChatBody
from octavo.server.structured import demands_json, structured_field
from octavo.server.tool_calls import is_python_name
from octavo.server.tool_grammar import PYTHON_FORMATS, Tool
from octavo.server.tools import CallMode, ToolFormat
from octavo.structured_outputs import StructuredOutputs


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


def call_mode(body: ChatBody, tool_format: ToolFormat | None) -> CallMode | None:
    """How calls are in the answer; None: it holds none.

    Raises an ApiError where the text is to follow something that leaves no room for what is asked
    of the tools.
    """
    is_forced, field = forced_tools(body) is not None, structured_field(body)
    if tool_format is None or not body.tools or body.tool_choice == "none":
        return None
    if is_forced:
        if field is not None:
            raise bad_request(f"{field} is given, but tool_choice leaves no room for it", field)
        return "only"
    stricts = [strict for _, _, strict in _known(body, tool_format, "steered")]
    if field is None:
        return "free" if set(stricts) <= {None} else "steered"
    kind = (body.response_format or {}).get("type") if field == "response_format" else None
    is_json = kind in ("json_schema", "json_object")
    if is_json and stricts and tool_format != "llama3_json":
        return "either"
    if demands_json(body) or (is_json and True in stricts):  # even where it looks like a call
        return None
    if True in stricts:
        raise bad_request(
            f"{field} says what the text is, so the calls in it need not follow the schemas of "
            "tools with strict: leave out one of the two",
            field,
        )
    return "free"


def tools_of(body: ChatBody, tool_format: ToolFormat, mode: CallMode) -> list[Tool]:
    """The tools that may be called. Raises an ApiError for parameters that are no schema."""
    found = []
    for number, function, strict in _known(body, tool_format, mode):
        place = f"tools[{number}].function.parameters"
        parameters = {} if strict is None else _parameters(function, place)
        found.append(Tool(function["name"], place, parameters, strict))
    return found


def may_be_many(body: ChatBody) -> bool:
    """Whether an answer may hold more than one call."""
    return not isinstance(body.tool_choice, dict) and body.parallel_tool_calls is not False


def _known(
    body: ChatBody, tool_format: ToolFormat, mode: CallMode
) -> list[tuple[int, dict[str, Any], bool | None]]:
    """Of the tools that may be called: number, function, and `strict` as `Tool` has it.

    Where calls are in Python's syntax, a tool whose name is none of Python's cannot be called.
    """
    tools, numbers = body.tools or [], forced_tools(body)
    functions = [
        (i, tools[i]["function"]) for i in (range(len(tools)) if numbers is None else numbers)
    ]
    if tool_format in PYTHON_FORMATS and mode != "only":
        functions = [(i, each) for i, each in functions if is_python_name(each["name"])]
    return [(i, each, _strict(body, each, mode)) for i, each in functions]


def _strict(body: ChatBody, function: dict[str, Any], mode: CallMode) -> bool | None:
    given = function.get("strict")
    if given is True or mode != "steered":
        return given is True
    # A default must not have refused what goes without it.
    can_be = not body.ignore_eos and find_spec("llguidance") is not None
    return False if given is not False and body.follows_schemas and can_be else None


def _parameters(function: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object in any case."""
    schema = function.get("parameters")
    try:
        text = str(StructuredOutputs(json={} if schema is None else schema).json)
    except OctavoError as error:
        raise bad_request(str(error), place) from error
    found = json.loads(text)
    found = {} if found is True else found
    kinds = found.get("type", "object") if isinstance(found, dict) else []
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise bad_request(
            f"the parameters are {'false' if found is False else f'of type {kinds!r}'}; expected a "
            "schema of objects, which arguments are",
            place,
        )
    if "$ref" in found:  # beside which an old "$schema" would have nothing count
        found.pop("$schema", None)
    return {**found, "type": "object"}
