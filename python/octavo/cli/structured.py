"""Options of the command line for what the text of an answer must look like."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from octavo.cli.options import option
from octavo.errors import InvalidArgumentError
from octavo.files import reading
from octavo.structured_outputs import StructuredOutputs

_structured = partial(option, panel="Structured output")

JsonSchemaOption = Annotated[
    Path | None,
    _structured("The answer is JSON of the schema in this file.", "--json-schema", metavar="FILE"),
]
RegexOption = Annotated[
    str | None,
    _structured("The whole answer matches this regular expression.", metavar="REGEX"),
]
ChoiceOption = Annotated[
    list[str] | None,
    _structured("The answer is this text. To be given several times, one for each text."),
]
GrammarOption = Annotated[
    Path | None,
    _structured("The answer is in the language of this grammar, Lark or GBNF.", metavar="FILE"),
]


def read_structured(
    json_schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> StructuredOutputs | None:
    """What the options ask for together; None: anything. InvalidArgumentError for two of them."""
    given = {
        "--json-schema": json_schema,
        "--regex": regex,
        "--choice": choice or None,
        "--grammar": grammar,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidArgumentError(f"{' and '.join(named)} do not go together; leave one out")
    if not named:
        return None
    return StructuredOutputs(
        json=None if json_schema is None else _read(json_schema, "a JSON schema"),
        regex=regex,
        choice=choice or None,
        grammar=None if grammar is None else _read(grammar, "a grammar"),
    )


def _read(path: Path, expected: str) -> str:
    with reading(path, expected):
        return path.read_text(encoding="utf-8")
