"""What the library refuses of a schema: found and named, or left out where that is allowed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.grammar.lark import lark_of_schema
from octavo.grammar.matcher import short_error, start_matcher
from octavo.grammar.recursion import children
from octavo.grammar.schema import SchemaReader, problem_at
from octavo.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_SECONDS = 0.5  # to find the parts that are wrong
_PROBLEM = re.compile(r"failed to compile JSON schema: (.*?)(\n +\d+ \| |$)", re.DOTALL)
# Keywords of which the library follows some uses and not others.
_PARTLY_FOLLOWED = (
    "pattern",
    "patternProperties",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "multipleOf",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "oneOf",
)


class SchemaRepair:
    """Works on one schema that the library has refused."""

    def __init__(
        self, tokens: LLTokenizer, reader: SchemaReader, wanted: StructuredOutputs
    ) -> None:
        self._tokens, self._reader, self._wanted = tokens, reader, wanted
        self._end = time.monotonic() + _SECONDS

    def mend(self) -> None:
        """Leave out of the reader's schema what cannot be followed, if the request is not strict.

        Raises an InvalidArgumentError with the place of what cannot be left out.
        """
        while (matcher := self._start(self._reader.schema)).is_error():
            node, problem = self._innermost(self._reader.schema, problem_of(matcher))
            may_leave_out = not self._wanted.strict and not _is_unmet(problem)
            if not (may_leave_out and self._weaken(node)):
                raise problem_at(self._reader.pointers.get(id(node), ""), problem)

    def _start(self, node: Mapping[str, Any]) -> LLMatcher:
        """A matcher of one schema by itself; references lead to definitions alone."""
        definitions = self._reader.schema.get("$defs")
        whole = {**node, "$defs": definitions} if definitions else node
        return start_matcher(self._tokens, lark_of_schema(whole, self._wanted))

    def _innermost(self, node: dict[str, Any], problem: str) -> tuple[dict[str, Any], str]:
        """The innermost schema that is refused by itself, and why.

        What nothing meets may stand in a place that need not be met, so it is only followed where
        the whole has that very problem.
        """
        while True:
            for holder, key in children(node):
                below = holder[key]
                if time.monotonic() > self._end or not isinstance(below, dict):
                    continue
                matcher = self._start(below)
                if matcher.is_error() and _is_unmet(problem_of(matcher)) == _is_unmet(problem):
                    node, problem = below, problem_of(matcher)
                    break
            else:
                return node, problem

    def _weaken(self, node: dict[str, Any]) -> bool:
        """Leave out one keyword, if that helps, or else all that may be to blame."""
        whole = dict(node)
        present = [key for key in _PARTLY_FOLLOWED if key in node]
        for keys in [present] if len(present) < 2 else [*([key] for key in present), present]:
            for key in keys:
                del node[key]
            if keys and not self._start(node).is_error():
                return True
            node.clear()
            node.update(whole)  # in the same order
        return False


def _is_unmet(problem: str) -> bool:
    return "nsatisfiable" in problem or "no text" in problem


def problem_of(matcher: LLMatcher) -> str:
    """The library's error in octavo's words."""
    problem = short_error(matcher)
    if "NoExtension" in problem:
        return "no text meets it"
    found = _PROBLEM.search(matcher.get_error())
    if found:
        problem = " ".join(found.group(1).split())
    if "coerce_one_of" in problem:
        return (
            '"oneOf" cannot be enforced where a text may meet two of its schemas: write "anyOf", '
            "or ask without strict to read it as such"
        )
    return problem
