"""Options of the command line for what the text of an answer must look like."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from octavo.cli.options import option
from octavo.errors import InvalidArgumentError
from octavo.files import reading
from octavo.structured_outputs import StructuredOutputs

_structured = partial(option, panel="Structured output")


@dataclass(frozen=True)
class Structured:
    """What the text must look like: one of these, or nothing."""

    json_schema: Annotated[
        Path | None,
        _structured(
            "The answer is JSON of the schema in this file.", "--json-schema", metavar="FILE"
        ),
    ] = None
    regex: Annotated[
        str | None,
        _structured("The whole answer matches this regular expression.", metavar="REGEX"),
    ] = None
    choice: Annotated[
        list[str] | None,
        _structured(
            "The answer is this text. To be given several times, one for each text.",
            metavar="TEXT",
        ),
    ] = None
    grammar: Annotated[
        Path | None,
        _structured("The answer is in the language of this grammar, Lark or GBNF.", metavar="FILE"),
    ] = None


def read_structured(asked: Structured) -> StructuredOutputs | None:
    """What the options ask for together; None: anything. InvalidArgumentError for two of them."""
    given = {"--" + name.replace("_", "-"): value for name, value in vars(asked).items()}
    named = [name for name, value in given.items() if value not in (None, [])]
    if len(named) > 1:
        raise InvalidArgumentError(f"{' and '.join(named)} do not go together; leave one out")
    if not named:
        return None
    schema, grammar = asked.json_schema, asked.grammar
    return StructuredOutputs(
        json=None if schema is None else _read(schema, "a JSON schema"),
        regex=asked.regex,
        choice=asked.choice or None,
        grammar=None if grammar is None else _read(grammar, "a grammar"),
    )


def _read(path: Path, expected: str) -> str:
    with reading(path, expected):
        return path.read_text(encoding="utf-8")
