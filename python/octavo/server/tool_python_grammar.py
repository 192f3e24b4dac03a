"""Structural tags for the arguments of calls in Python's syntax.

f(a=1, b="x", c=[true, null]): values are JSON, whose words and strings `PythonReader` reads, too. A
truth value or null that is a whole argument may be written as Python has it.
"""

from __future__ import annotations

from octavo.server.tag_parts import Part, json_of, one_of, optional, sequence, text
from octavo.server.tool_calls import is_python_name
from octavo.server.tool_xml import Schema
from octavo.server.tool_xml_grammar import NOTES, members_of

_MOST_PARTS = 3000  # which parameters that may all be left out take for the commas between them
_IDLE = NOTES | {"$defs", "definitions"}  # of a schema, where it says nothing of a value
_WORDS = {"boolean": ("True", "False"), "null": ("None",)}
# Any arguments, as `PythonReader` reads them.
ANY_ARGUMENTS: Part = {
    "type": "grammar",
    "grammar": r"""start: (argument (COMMA argument)*)?
argument: NAME EQUALS value
value: STRING | NUMBER | WORD | OPEN_LIST (value (COMMA value)*)? CLOSE_LIST
  | OPEN_DICT (STRING COLON value (COMMA STRING COLON value)*)? CLOSE_DICT
NAME: /[A-Za-z_][A-Za-z0-9_]{0,127}/
STRING: /"([^"\\\n]|\\.)*"/ | /'([^'\\\n]|\\.)*'/
NUMBER: /-?[0-9]{1,30}(\.[0-9]{1,30})?/
WORD: "True" | "False" | "None" | "true" | "false" | "null"
COMMA: /[ \n]{0,9},[ \n]{0,9}/
COLON: /[ \n]{0,9}:[ \n]{0,9}/
EQUALS: /[ ]?=[ ]?/
OPEN_LIST: /\[[ \n]{0,9}/
CLOSE_LIST: /[ \n]{0,9}\]/
OPEN_DICT: /\{[ \n]{0,9}/
CLOSE_DICT: /[ \n]{0,9}\}/
""",
}


def arguments_of(parameters: Schema, *, strict: bool) -> Part | None:
    """Arguments that follow the schema; None if this notation cannot say it.

    So it is where `members_of` gives none, where a parameter's name is none of Python's, or where
    too many parameters may be left out.
    """
    members = members_of(parameters)
    if members is None or not all(map(is_python_name, members)):
        return None
    required = [is_required for _, is_required in members.values()]
    pairs = [
        sequence(text(f"{key}="), _value(schema, strict)) for key, (schema, _) in members.items()
    ]
    # One of them comes first; the others have a comma before them.
    num_firsts = required.index(True) + 1 if True in required else len(required)
    if num_firsts * len(pairs) > _MOST_PARTS:
        return None
    others = [sequence(text(", "), pair) for pair in pairs]
    others = [o if needed else optional(o) for o, needed in zip(others, required, strict=True)]
    firsts = [sequence(pairs[i], *others[i + 1 :]) for i in range(num_firsts)]
    if not firsts:
        return text("")
    return one_of(firsts) if True in required else optional(one_of(firsts))


def _value(schema: Schema, strict: bool) -> Part:
    words = [text(word) for kind in _plain_types(schema) for word in _WORDS.get(kind, ())]
    return one_of([json_of(dict(schema), strict=strict, closed=True), *words])


def _plain_types(schema: Schema) -> list[str]:
    """The types all of whose values a schema allows, of those that it names."""
    cases = schema.get("anyOf") if schema.keys() - _IDLE == {"anyOf"} else [schema]
    found: list[str] = []
    for case in cases if isinstance(cases, list) else []:
        if isinstance(case, dict) and case.keys() - _IDLE == {"type"}:
            kinds = case["type"] if isinstance(case["type"], list) else [case["type"]]
            found += [kind for kind in kinds if isinstance(kind, str)]
    return found
