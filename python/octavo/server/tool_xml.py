"""Calls of tools as Qwen3-Coder writes them, a tag a parameter, whose values have no quotes.

<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call>

What a value is, the tool's schema says: of a string it is the text, of all else JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from octavo.server.reasoning import before_tag
from octavo.server.tool_calls import (
    Arguments,
    Piece,
    PythonReader,
    Quotes,
    ToolCall,
    read_json,
    read_json_calls,
    to_json,
)
from octavo.server.tool_forced import ForcedParser
from octavo.server.tool_parsers import MarkedParser, ToolParser, Tools

Schema = Mapping[str, Any]

# The beginning of a call, a parameter and the end of the call, as models write them.
_AS_IT_COMES = (
    re.compile(r"\s*<function=([^>\n]+)>"),
    re.compile(
        r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=[^>\n]+>|</function>))",
        re.DOTALL,
    ),
    re.compile(r"\s*</function>"),
)
# The same as a grammar writes them. No JSON has a line break in a string.
_BY_GRAMMAR = (
    re.compile(r"\s*<function=([^>\n]+)>\n"),
    re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.DOTALL),
    re.compile(r"</function>"),
)
_MOST_SCHEMAS = 128  # that are looked at for the types of one value
_NAMES = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))


class Qwen3CoderParser(MarkedParser):
    """Qwen3-Coder; <tool_call> may be missing, as it is in many of its answers.

    Within <tool_call> there may be JSON, too, as a grammar has it where tags cannot say a schema.
    """

    opens, close = ("<tool_call>", "<function="), "</tool_call>"

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        if _is_json(text):
            in_json, rest = read_json_calls(text)
            return ([], "") if rest.strip() else (in_json, "")
        calls = []
        text, at = ("" if mark == "<tool_call>" else mark) + text, 0
        function, one_parameter, end_of_call = _AS_IT_COMES if self._names is None else _BY_GRAMMAR
        while head := function.match(text, at):
            schemas, found, at = schemas_of(self._tools, head[1]), dict[str, Any](), head.end()
            while parameter := one_parameter.match(text, at):
                key, value, at = parameter[1], parameter[2], parameter.end()
                found[key] = typed(value, schemas.get(key))
            end = end_of_call.match(text, at)
            if end is None:
                return [], ""
            at = end.end()
            try:
                calls.append(ToolCall(head[1], to_json(found)))
            except ValueError:  # one value was just not too deep by itself
                return [], ""
        return ([], "") if text[at:].strip() else (calls, "")

    def new_quotes(self) -> Quotes:
        return _Values(by_grammar=self._names is not None)


class _Values(Quotes):
    """Whether a call goes on: within a string of JSON, or within a value, which has no quotes.

    A value ends with its function. by_grammar: as a grammar writes it, on a line of its own.
    """

    def __init__(self, *, by_grammar: bool) -> None:
        super().__init__('"')
        self._is_json: bool | None = None  # None: it is not known yet
        self._by_grammar, self._has_any, self._last = by_grammar, False, ""

    def read(self, text: str) -> bool:
        if self._is_json is None and text.strip():
            self._is_json = _is_json(text)
        if self._is_json:
            return super().read(text)
        text = self._last + text
        self._has_any = self._has_any or "<parameter=" in text
        self._last = text[-100:]
        if self._by_grammar:
            return not self._last.endswith("\n</function>\n")
        return self._has_any and not self._last.rstrip().endswith("</function>")


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


class ForcedXmlParser(ToolParser):
    """Reads an answer that is calls and nothing else, and gives each parameter as it is complete.

    Where the schema of a tool cannot be said in tags, the answer has JSON within <tool_call>.
    """

    _START = re.compile(r"<tool_call>\s*(?:(\{)|<function=([^>\n]+)>\n)")
    _PARAMETER, _CLOSE = re.compile(r"<parameter=([^>\n]+)>\n"), "\n</parameter>\n"

    def __init__(self, tools: Tools = ()) -> None:
        super().__init__(tools)
        self._json: ForcedParser | None = None
        self._schemas: Mapping[str, Schema] | None = None  # of the call that is being read
        self._begin = "{"  # of the next parameter
        self._key: str | None = None  # of the parameter that is being read
        self._value: list[str] = []

    @property
    def is_inside(self) -> bool:
        return self._schemas is not None if self._json is None else self._json.is_inside

    def push(self, text: str) -> list[Piece]:
        if self._json is not None:
            return self._json.push(text)
        self._held += text
        pieces: list[Piece] = []
        while True:
            if self._schemas is None:
                start = self._START.search(self._held)
                if start is None:
                    return pieces
                if start[1]:
                    self._json = ForcedParser()
                    return pieces + self._json.push(self._held)
                pieces.append(ToolCall(start[2], ""))
                self._schemas, self._begin = schemas_of(self._tools, start[2]), "{"
                self._held = self._held[start.end() :]
            if self._key is None and self._held.startswith("</function>"):
                pieces.append(Arguments("{}" if self._begin == "{" else "}"))
                self._held, self._schemas = self._held.removeprefix("</function>"), None
                continue
            if self._key is None:
                head = self._PARAMETER.match(self._held)
                if head is None:
                    return pieces
                self._key, self._held = head[1], self._held[head.end() :]
            more, end, self._held = self._held.partition(self._CLOSE)
            if not end:
                more, self._held = before_tag(more, self._CLOSE)
            self._value.append(more)
            if not end:
                return pieces
            value = to_json(typed("".join(self._value), self._schemas.get(self._key)))
            pieces.append(Arguments(f"{self._begin}{json.dumps(self._key)}: {value}"))
            self._key, self._value, self._begin = None, [], ", "

    def finish(self) -> list[Piece]:
        """Nothing: the parameters of a call that was cut off have been given."""
        return []


def schemas_of(tools: Tools, name: str) -> dict[str, Schema]:
    """The schemas of the parameters of a function, each with the definitions it may refer to."""
    functions = (tool.get("function") for tool in tools)
    found = next((f for f in functions if isinstance(f, Mapping) and f.get("name") == name), {})
    schema = found.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping) or not isinstance(properties, Mapping):
        return {}
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {
        key: {**shared, **each} for key, each in properties.items() if isinstance(each, Mapping)
    }


def typed(value: str, schema: Schema | None) -> Any:
    """What a text is by its schema: the text itself, unless another type is allowed and fits."""
    types = types_of(schema)
    if types <= {"string"}:
        return value
    for read in (_as_json, _as_python):
        try:
            found = read(value.strip())
            to_json(found)
        except ValueError:
            continue
        if _types_of_value(found) & types and not isinstance(found, str):
            return found
    return value


def _as_json(text: str) -> Any:
    found, end = read_json(text)
    if end < len(text):
        raise ValueError("more than a value")
    return found


def _as_python(text: str) -> Any:
    """As templates write what is no string: True, None, 1.5."""
    return PythonReader(text).literal()


def types_of(schema: Schema | None) -> set[str]:
    """The types that a schema names; none if it does not say."""
    return _types(schema, schema or {}, set())


def _types(schema: Any, root: Schema, seen: set[int]) -> set[str]:
    """seen: the schemas that were looked at, each of which may refer to all the others."""
    if not isinstance(schema, Mapping) or id(schema) in seen or len(seen) == _MOST_SCHEMAS:
        return set()
    seen.add(id(schema))
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {each for each in given if isinstance(each, str)}
    if isinstance(schema.get("enum"), list):
        return set().union(*map(_types_of_value, schema["enum"]))
    if "const" in schema:
        return _types_of_value(schema["const"])
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        for each in schema[key] if isinstance(schema.get(key), list) else ():
            found |= _types(each, root, seen)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        found |= _types(target, root, seen)
    return found


def _types_of_value(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    name = next((name for kind, name in _NAMES if isinstance(value, kind)), "object")
    name = "integer" if isinstance(value, float) and value.is_integer() else name
    return {"integer", "number"} if name == "integer" else {name}
