"""Structural tags for the calls of tools, as a model writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.server.errors import bad_request
from octavo.server.tag_parts import (
    Part,
    json_of,
    one_of,
    optional,
    regex,
    separated,
    sequence,
    star,
    tag,
    tags_with_separator,
    text,
)
from octavo.server.tool_parsers import SPACE, LeadingParser
from octavo.server.tool_python_grammar import ANY_ARGUMENTS, arguments_of
from octavo.server.tool_xml_grammar import members_of, tag_of_any_call, tag_of_call
from octavo.server.tools import CallMode, ToolFormat, Writing, parser_of, writing_of
from octavo.structured_outputs import StructuredOutputs

PYTHON_FORMATS: tuple[ToolFormat, ...] = ("pythonic", "olmo3")
_PUNCTUATION = re.compile(r"[\s{}\[\]:,;]+")  # what JSON may have space around
_MAY_BE_LEFT_OUT = "<tool_call>\n"  # by Qwen3-Coder, before "<function="


@dataclass(frozen=True)
class Tool:
    """A tool that may be called.

    place: where its schema stands in the body. parameters: that schema, of objects. strict: what
    cannot be enforced of it is an error; False: it is left out; None: so is all of the schema.
    """

    name: str
    place: str
    parameters: dict[str, Any]
    strict: bool | None

    def schema(self) -> StructuredOutputs:
        """What its arguments follow."""
        return StructuredOutputs(
            json=self.parameters,
            strict=self.strict is True,
            disable_additional_properties=True,
        )

    def may_lack_arguments(self) -> bool:
        """Whether a call without arguments follows the schema."""
        members = members_of(self.parameters)
        has_none = members is not None and not any(needed for _, needed in members.values())
        return self.strict is None or has_none

    def json(self) -> Part:
        """Its arguments as JSON."""
        if self.strict is None:
            return json_of({"type": "object"}, strict=False, closed=False)
        return json_of(self.parameters, strict=self.strict, closed=True)

    def xml(self, excludes: tuple[str, ...] = ()) -> Part | None:
        """A call of it in tags, if they can say it."""
        if self.strict is None:
            return tag_of_any_call(self.name)
        return tag_of_call(self.name, self.parameters, strict=self.strict, excludes=excludes)

    def python(self) -> Part:
        """Its arguments in Python's syntax. Raises an ApiError where that cannot say the schema."""
        found = None
        if self.strict is not None:
            found = arguments_of(self.parameters, strict=self.strict)
        if found is None and self.strict:
            raise bad_request(
                f"{self.place} cannot be enforced where a model writes calls in Python's syntax; "
                'expected {"type": "object", "properties": {…}, "required": […]} with names that '
                "Python allows, or no strict",
                self.place,
            )
        return found or ANY_ARGUMENTS


@dataclass(frozen=True)
class _Call:
    """A call of one tool: its arguments, and what stands around them.

    is_json: there may be space between its parts. may_lack: it may have no arguments.
    """

    begin: str
    between: str
    arguments: Part
    end: str
    is_json: bool = False
    may_lack: bool = False

    def exactly(self) -> Part:
        """As a model is taught to write it."""
        return tag(self.begin + self.between, self.arguments, self.end)

    def behind(self, begin: str) -> Part:
        """What follows the beginning of its beginning."""
        rest = self.begin.removeprefix(begin)
        if not self.is_json:
            return tag(rest + self.between, self.arguments, self.end)
        arguments = sequence(*_loosely(self.between), self.arguments)
        arguments = optional(arguments) if self.may_lack else arguments
        return sequence(*_loosely(rest), arguments, *_loosely(self.end))


class CallGrammar:
    """What the calls of one answer follow. many: there may be more than one."""

    def __init__(self, tools: Sequence[Tool], tool_format: ToolFormat, *, many: bool) -> None:
        self._tools, self._format, self._many = tools, tool_format, many

    def alone(self, mode: CallMode) -> Part:
        """Calls and nothing else."""
        writing = writing_of(self._format, must_come=mode == "only")
        calls = [call.exactly() for call in self._calls(mode)]
        begins, end = writing.begins, text(writing.end)
        if mode == "either" and self._format == "pythonic":
            # JSON may begin as the list does, so it is one text with the name.
            first = one_of([{**call, "begin": begins[0] + call["begin"]} for call in calls])
            further = star(sequence(text(writing.separator), one_of(calls)))
            return sequence(first, *([further] if self._many else []), end)
        block = tags_with_separator(calls, writing.separator, many=self._many)
        return sequence(one_of([*map(text, begins)]), block, end)

    def in_text(self, special_but: Sequence[str]) -> Part:
        """Free text in which what opens a call must go on as one.

        Behind calls there is more text where a mark says that they have ended. special_but: the
        special tokens that stand in no text.
        """
        parser, calls = parser_of(self._format), self._calls("steered")
        writing = writing_of(self._format, must_come=False)
        separator = sequence(*_loosely(writing.separator))
        call = one_of([call.behind("") for call in calls])
        block = [separated(call, separator) if self._many else call, *_loosely(writing.end)]
        if issubclass(parser, LeadingParser):
            tail = optional(text(parser.tail))
            behind_mark = sequence(*_loosely(writing.begins[0]), *block, tail)
            # No special tokens but the marks: behind one that is not shown a text would be read as
            # the beginning of the answer.
            free = _free_text({mark: [behind_mark] for mark in parser.marks}, None)
            # The name of a tool says that an answer begins with a call.
            begun = []
            for tool, each in zip(self._tools, calls, strict=True):
                name = writing.first(tool.name)
                rest = each.behind(writing.before + name)
                begun.append(sequence(regex(parser.lead), text(name), rest))
            more = [star(sequence(separator, call))] if self._many else []
            return one_of([sequence(one_of(begun), *more, *_loosely(writing.end), tail), free])
        if writing.begins == ("",):
            further = star(one_of([call.exactly() for call in calls]))
            more = [further] if self._many and not parser.close else []
            cases = {
                mark: [
                    sequence(each.behind(begin), *more)
                    for begin in (mark, _MAY_BE_LEFT_OUT + mark)
                    for each in calls
                    if each.begin.startswith(begin)
                ]
                for mark in parser.opens
            }
        else:
            cases = {m: [sequence(*_loosely(_rest(writing, m)), *block)] for m in parser.opens}
        return _free_text(cases, special_but, loop=self._many and parser.close != "")

    def _calls(self, mode: CallMode) -> list[_Call]:
        """A call of each tool."""
        found = [self._call(tool, mode) for tool in self._tools]
        if self._format != "qwen3_coder":
            return found
        tags = [tool.xml(("</tool_call>",) if mode == "steered" else ()) for tool in self._tools]
        if mode != "steered" and None in tags:  # whose parser takes one way of writing them
            return found
        return [
            other if xml is None else _Call(xml["begin"], "", xml["content"], xml["end"])
            for xml, other in zip(tags, found, strict=True)
        ]

    def _call(self, tool: Tool, mode: CallMode) -> _Call:
        writing = writing_of(self._format, must_come=mode == "only")
        begin = writing.before + writing.first(tool.name)
        if self._format in PYTHON_FORMATS and mode != "only":
            return _Call(begin, "", tool.python(), writing.after)
        if not writing.is_quoted:
            return _Call(begin, "", tool.json(), writing.after)
        between, may_lack = writing.between, tool.may_lack_arguments()
        return _Call(begin, between, tool.json(), writing.after, True, may_lack)


def _rest(writing: Writing, mark: str) -> str:
    """What follows a mark before the first call."""
    if writing.begins[0].startswith(mark):
        return writing.begins[0].removeprefix(mark)
    return "" if mark.endswith("[") else "["


def _loosely(literal: str) -> list[Part]:
    """A text, with space around what may have some in JSON."""
    found, last = list[Part](), 0
    for each in _PUNCTUATION.finditer(literal):
        found += [text(literal[last : each.start()])] if each.start() > last else []
        signs = (re.escape(sign) + SPACE for sign in each[0] if not sign.isspace())
        found.append(regex(SPACE + "".join(signs)))
        last = each.end()
    return [*found, text(literal[last:])] if last < len(literal) or not found else found


def _free_text(
    cases: Mapping[str, Sequence[Part]], special_but: Sequence[str] | None, *, loop: bool = False
) -> Part:
    """Free text, and behind each mark one of its cases; loop: and free text behind them."""
    return {
        "type": "dispatch",
        "rules": [(mark, one_of(found)) for mark, found in cases.items() if found],
        "excludes": [mark for mark, found in cases.items() if not found],
        "special_but": special_but,
        "loop": loop,
    }
