"""Structured outputs as grammars in llguidance's variant of Lark's syntax."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo.errors import InvalidArgumentError
from octavo.grammar.schema import SchemaReader
from octavo.structured_outputs import StructuredOutputs

# Any way of cutting the text into tokens is allowed, not the tokenizer's own alone: what is masked
# follows from the text, and the model decides among the rest.
ANY_TOKENS = '\n%llguidance {"no_forcing": true}\n'
# A model that is unsure tends to write spaces for ever; no indentation is deeper.
WHITESPACE = r"[ \n\r\t]{1,64}"


def lark_of(wanted: StructuredOutputs) -> tuple[str, SchemaReader | None]:
    """The grammar of these structured outputs, and the schema that is the whole of it, if one is.

    Raises InvalidArgumentError.
    """
    if wanted.json is not None or wanted.json_object:
        text = '{"type": "object"}' if wanted.json is None else str(wanted.json)
        reader = SchemaReader(
            text,
            strict=wanted.strict,
            disable_additional_properties=wanted.disable_additional_properties,
        )
        return lark_of_schema(reader.schema, wanted), reader
    if wanted.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return f"start: CHOICE\nCHOICE: {texts}{ANY_TOKENS}", None
    if wanted.regex is not None:
        return f"start: /{_lark_regex(wanted.regex)}/{ANY_TOKENS}", None
    return f"{_lark_grammar(str(wanted.grammar))}{ANY_TOKENS}", None


def lark_of_schema(schema: Mapping[str, Any], wanted: StructuredOutputs) -> str:
    """A grammar for one schema, as `SchemaReader` gives it."""
    return f"start: {json_rule(schema, wanted)}{ANY_TOKENS}"


def json_rule(schema: Mapping[str, Any], wanted: StructuredOutputs) -> str:
    """What may stand in a rule of a grammar for JSON of this schema."""
    options: dict[str, Any] = {"whitespace_pattern": wanted.whitespace_pattern or WHITESPACE}
    if wanted.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    if not wanted.strict:
        options["coerce_one_of"] = True
    text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
    return "%json " + text.replace("::=", "\\u003a:=")  # which would make the whole a GBNF


def _lark_regex(regex: str) -> str:
    r"""The whole text is matched anyway, so anchors at its ends say nothing more.

    \d and \w are ASCII's, as in JSON schemas.
    """
    from llguidance import regex_to_lark

    begin = regex.startswith("^")
    body = regex[begin:]
    escapes = len(body) - 1 - len(body[:-1].rstrip("\\"))
    if body.endswith("$") and escapes % 2 == 0:
        body = body[:-1]
    return str(regex_to_lark(body, "dw"))


def _lark_grammar(grammar: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except (Exception, RecursionError) as error:
        raise InvalidArgumentError(
            f"the grammar is in GBNF's syntax, and wrong: {error}; expected rules such as "
            'root ::= "yes" | "no"'
        ) from error
