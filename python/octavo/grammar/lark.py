"""Structured outputs as grammars in llguidance's variant of Lark's syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError
from octavo.grammar.schema import SchemaReader
from octavo.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from octavo.grammar.tag_formats import GrammarText, JsonSchema, Regex

# Any way of cutting the text into tokens is allowed, not the tokenizer's own alone: what is masked
# follows from the text, and the model decides among the rest.
ANY_TOKENS = '\n%llguidance {"no_forcing": true}\n'
# A model that is unsure tends to write spaces for ever; no indentation is deeper.
WHITESPACE = r"[ \n\r\t]{1,64}"

# What tells a grammar in Lark's syntax from one in GBNF's, which may have a rule of this name.
_LARK = re.compile(r"^\s*(%llguidance\b|start\s*(\[[^\]]*\])?\s*:(?!:=))", re.MULTILINE)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A schema, an expression or a grammar by itself, and where it stands in a structural tag.

    reader: of a schema. A schema that is changed there changes in the whole, too. lark: a grammar.
    """

    wanted: StructuredOutputs
    place: str = ""
    reader: SchemaReader | None = None
    lark: str | None = None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors say where it stands."""
        try:
            yield
        except InvalidArgumentError as error:
            raise type(error)(f"{self.place}: {error}" if self.place else str(error)) from error


@dataclass
class LarkText:
    """Rules of a grammar, of which `start` is the first, and the pieces that they name.

    pieces: number i is the rule json_i if it is a schema, and the grammar grammar_i if it is one.
    """

    rules: str = ""
    pieces: list[Piece] = field(default_factory=list)

    def __str__(self) -> str:
        """As the library takes it."""
        rules, grammars = [self.rules], []
        for number, piece in enumerate(self.pieces):
            if piece.reader is not None:
                rules.append(f"json_{number}: {json_rule(piece.reader.schema, piece.wanted)}")
            elif piece.lark is not None:
                grammars.append({"name": f"grammar_{number}", "lark_grammar": piece.lark})
        lark = "\n".join(rules) + ANY_TOKENS
        return json.dumps({"grammars": [{"lark_grammar": lark}, *grammars]}) if grammars else lark


def lark_of(wanted: StructuredOutputs, special: Mapping[str, int]) -> LarkText:
    """The grammar of these structured outputs.

    special: tokens that no text is made of, by what they read; a structural tag may name them.
    Raises InvalidArgumentError.
    """
    if wanted.structural_tag is not None:
        return _lark_of_tag(wanted, special)
    if wanted.json is not None or wanted.json_object:
        return LarkText("start: json_0", [Piece(wanted, "", _reader_of(wanted))])
    if wanted.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return LarkText(f"start: CHOICE\nCHOICE: {texts}")
    if wanted.regex is not None:
        return LarkText(f"start: /{_lark_regex(wanted.regex)}/")
    return LarkText(_lark_grammar(str(wanted.grammar)))


def _lark_of_tag(wanted: StructuredOutputs, special: Mapping[str, int]) -> LarkText:
    from octavo.grammar.tag_formats import read_structural_tag
    from octavo.grammar.tag_rules import TagRules

    found = LarkText()

    numbers: dict[StructuredOutputs, int] = {}  # what stands in several places is one piece

    def add(piece: Piece) -> int:
        if piece.wanted in numbers:
            return numbers[piece.wanted]
        with piece.named():
            if piece.wanted.json is not None:
                piece = replace(piece, reader=_reader_of(piece.wanted))
            if piece.wanted.grammar is not None:
                piece = replace(piece, lark=_lark_grammar(piece.wanted.grammar))
        found.pieces.append(piece)
        return numbers.setdefault(piece.wanted, len(found.pieces) - 1)

    def leaf(part: JsonSchema | GrammarText) -> str:
        if part.type == "grammar":
            return f"@grammar_{add(Piece(StructuredOutputs(grammar=part.grammar), part.place))}"
        strict = wanted.strict if part.strict is None else part.strict
        closed = wanted.disable_additional_properties if part.closed is None else part.closed
        alone = replace(
            wanted,
            structural_tag=None,
            json=part.json_schema,
            strict=strict,
            disable_additional_properties=closed,
        )
        return f"json_{add(Piece(alone, part.place))}"

    regexes: dict[str, str] = {}

    def regex(part: Regex) -> str:
        if part.pattern not in regexes:
            add(Piece(StructuredOutputs(regex=part.pattern), part.place))
            regexes[part.pattern] = _lark_regex(part.pattern)
        return regexes[part.pattern]

    found.rules = TagRules(special, leaf, regex).write(
        read_structural_tag(str(wanted.structural_tag))
    )
    return found


def _reader_of(wanted: StructuredOutputs) -> SchemaReader:
    return SchemaReader(
        '{"type": "object"}' if wanted.json is None else str(wanted.json),
        strict=wanted.strict,
        disable_additional_properties=wanted.disable_additional_properties,
    )


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
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if _LARK.search(grammar):
        return grammar
    try:
        return gbnf_to_lark(_ESCAPE.sub(_plain_escape, grammar))
    except (Exception, RecursionError) as error:
        raise InvalidArgumentError(
            f"the grammar is in GBNF's syntax, and wrong: {error}; expected rules such as "
            'root ::= "yes" | "no"'
        ) from error


def _plain_escape(found: re.Match[str]) -> str:
    """A character by its number, which llguidance 1.9 would write without leading zeros."""
    number = int(found[1][1:], 16) if found[1][0] in "uU" else -1
    if number < 0 or 0xD800 <= number < 0xE000 or number > 0x10FFFF:
        return found[0]
    return chr(number) if number > 0x9F else f"\\x{number:02x}"
