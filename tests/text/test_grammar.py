"""Grammars: what they allow, token by token, and what is wrong with them."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from grammar_helpers import allowed_tokens, follows, grammars_of_style
from text_helpers import STYLES

from octavo.errors import InvalidArgumentError
from octavo.grammar import compiler
from octavo.grammar.compiler import Grammars
from octavo.structured_outputs import StructuredOutputs
from octavo.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

Make = Callable[[str], tuple[Tokenizer, Grammars]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tokenizer of each style, and its grammars; three more tokens than it has."""
    made: dict[str, tuple[Tokenizer, Grammars]] = {}

    def of_style(style: str) -> tuple[Tokenizer, Grammars]:
        if style not in made:
            made[style] = grammars_of_style(style, tmp_path_factory.mktemp(style))
        return made[style]

    return of_style


@pytest.fixture
def grammars(make: Make) -> Grammars:
    return make("byte_level")[1]


def text_of(tokenizer: Tokenizer, tokens: Iterable[int], continues: bool) -> bytes:
    pipeline = tokenizer.pipeline(at_start=not continues, errors="surrogateescape")
    text = "".join(pipeline.push(tokenizer.token(token) or "") for token in tokens)
    return (text + pipeline.finish()).encode(errors="surrogateescape")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("continues", [True, False])
def test_a_token_is_allowed_if_the_text_with_it_begins_a_choice(
    make: Make, style: str, continues: bool
) -> None:
    """Against the definition, with every token of the vocabulary tried at every step."""
    tokenizer, grammars = make(style)
    choices = ["Paris", "Paris of the seas", " the little ship", "thé ship", "12,5", 'a "b"\\\n']
    if style == "metaspace":
        choices = choices[:3]  # it has no tokens for all bytes
    grammar = grammars.compile(StructuredOutputs(choice=choices))
    rng = random.Random(7)
    plain = [t for t in range(tokenizer.vocab_size) if t not in tokenizer.special_ids]
    met = set()
    for _ in range(12):
        matcher, tokens = grammar.matcher(continues=continues), list[int]()
        while True:
            found, may_end = allowed_tokens(matcher)
            so_far = text_of(tokenizer, tokens, continues)
            expected = set()
            for token in plain:
                text = text_of(tokenizer, [*tokens, token], continues)
                begins = any(choice.encode().startswith(text) for choice in choices)
                if begins and text != so_far:
                    expected.add(token)
            assert found == expected
            assert may_end == (so_far.decode(errors="replace") in choices)
            if may_end and (not found or rng.random() < 0.5):
                met.add(so_far)
                break
            tokens.append(rng.choice(sorted(found)))
            matcher.accept(tokens[-1])
    assert len(met) >= 2


def test_the_space_that_sentencepiece_drops_is_dropped_here(make: Make) -> None:
    """In a chat "▁the" reads "the"; in a completion " the"."""
    tokenizer, grammars = make("sentencepiece")
    token = tokenizer.token_id("\u2581the")
    assert token is not None
    grammar = grammars.compile(StructuredOutputs(choice=["the ship"]))
    assert token in allowed_tokens(grammar.matcher(continues=False))[0]
    assert token not in allowed_tokens(grammar.matcher(continues=True))[0]


@pytest.mark.parametrize(
    ("regex", "texts", "others"),
    [
        (r"^\d{2}-(ab|é)$", ["12-ab", "00-é"], ["1-ab", "12-a", "12-abc", "²2-ab"]),
        (r"a*", ["", "aaa"], ["b"]),
        (r"x/y\$", ["x/y$"], ["x/y", "x/y\\"]),
        (r"(?i)yes|no", ["YES", "no"], ["y"]),
        (r"[^\"]+\n", ["🎉\n"], ['"\n', "\n"]),
        (r"\w+", ["a_1"], ["é", "a b"]),
    ],
)
def test_a_regular_expression(
    grammars: Grammars, regex: str, texts: list[str], others: list[str]
) -> None:
    wanted = StructuredOutputs(regex=regex)
    assert [follows(grammars, wanted, text) for text in texts] == [True] * len(texts)
    assert [follows(grammars, wanted, text) for text in others] == [False] * len(others)
    assert all(re.fullmatch(regex, text) for text in texts)


GBNF = 'root ::= "yes" more? | [0-9]{2,3} # comment\nmore ::= (", " root)+\n'
LARK = 'start: "yes" more? | /[0-9]{2,3}/\nmore: (", " start)+\n'


def test_escapes_of_characters_in_gbnf(grammars: Grammars) -> None:
    asked = StructuredOutputs(
        grammar=r'root ::= "\\u0041\u0041" [\u0400-\u04ff\u005d] "\u00e9\U0001F389\x41\u0022"'
    )
    for text in ('\\u0041AЖé🎉A"', '\\u0041A]é🎉A"'):
        assert follows(grammars, asked, text)
    assert not follows(grammars, asked, '\\u0041Axé🎉A"')


@pytest.mark.parametrize("grammar", [GBNF, LARK], ids=["gbnf", "lark"])
def test_a_grammar(grammars: Grammars, grammar: str) -> None:
    wanted = StructuredOutputs(grammar=grammar)
    for text in ("yes", "123", "yes, 12", "yes, yes, 99"):
        assert follows(grammars, wanted, text), text
    for text in ("", "no", "1", "1234", "yes,12", "yes, "):
        assert not follows(grammars, wanted, text), text


def test_any_json_object(grammars: Grammars) -> None:
    wanted = StructuredOutputs(json_object=True)
    for text in ('{"a": [1, {"b": null}], "é": "\\u0007"}', "{}", '{\n  "a": -1.5e3\n}'):
        assert json.loads(text) is not None and follows(grammars, wanted, text), text
    for text in ("[]", '{"a": 01}', '{"a"}', '{"a": 1', '{"a": "\n"}', "{'a': 1}", '{"a": 1,}'):
        assert not follows(grammars, wanted, text), text


def test_whitespace_has_an_end(grammars: Grammars) -> None:
    text = '{"a":%s1}'
    wanted = StructuredOutputs(json_object=True)
    assert follows(grammars, wanted, text % ("\n" + " " * 63))
    assert not follows(grammars, wanted, text % (" " * 65))
    compact = StructuredOutputs(json_object=True, disable_any_whitespace=True)
    assert follows(grammars, compact, text % "")
    assert not follows(grammars, compact, text % " ")
    two = StructuredOutputs(json_object=True, whitespace_pattern=" {2}")
    assert follows(grammars, two, text % "  ") and not follows(grammars, two, text % " ")


def test_additional_properties_can_be_closed(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert follows(grammars, StructuredOutputs(json=schema), '{"b": 1}')
    closed = StructuredOutputs(json=schema, disable_additional_properties=True)
    assert not follows(grammars, closed, '{"b": 1}') and follows(grammars, closed, '{"a": 1}')


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


WRONG: list[tuple[Any, str]] = [
    ({"properties": {"a~/b": {"not": {"type": "null"}}}}, r"at /properties/a~0~1b: .*\"not\""),
    ({"items": [{}, {"uniqueItems": True}]}, r"at /items/1: .*uniqueItems"),
    ({"allOf": [{}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"if": {}, "then": {}}}}, "/defs/x: "),
    ({"type": "strin"}, "at its root: Invalid type: strin"),
    ({"properties": {"a": {"items": {"pattern": "(("}}}}, "/properties/a/items: .*unclosed"),
    ({"properties": {"a": {"pattern": "(?=a)"}}}, "/properties/a: .*look-around"),
    (
        {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]},
        "at /properties/a: Unsat",
    ),
    (
        {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 3}]},
        "at /anyOf/0: Unsat",
    ),
    ({"$ref": "#"}, "at its root: its recursion has no end"),
    (
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "at /properties/a: its recursion has no end",
    ),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "at /properties/a: .*nothing at this place"),
    ({"$ref": "http://example.com/x.json"}, "leads out of the schema, and nothing is fetched"),
    ({"$ref": "ftp://example.org/schema.json"}, "nothing is fetched"),
    ({"properties": []}, r'at its root: "properties" is \[\]'),
    ({"items": 5}, "at /items: this is 5"),
    ({"oneOf": [{"minimum": 3}, {"maximum": 5}]}, 'at its root: "oneOf" cannot be enforced'),
    ({"properties": {"a": {"multipleOf": 123456789}}}, "at /properties/a: .*at most four digits"),
    ({"items": {"const": 2**53 + 1}}, 'at /items: "const" has 9007199254740993, which is no float'),
    ({"enum": [1, {"a": [2**60 + 1]}]}, 'at its root: "enum" has 1152921504606846977'),
    ({"const": 10**400}, "would be rounded"),
    (nested(70), "(/items){65}: nested too deeply"),
    ({"enum": list(range(20_000))}, "at /enum: 20000 entries are too many"),
    (
        {"items": {"properties": {f"p{i}": {} for i in range(1001)}}},
        "at /items/properties: 1001 entries are too many",
    ),
    ({"$defs": {str(i): {} for i in range(3)}, "anyOf": [{}] * 10_001}, "too large"),
    (False, "at its root: nothing meets false"),
]


BASE = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
MORE = {"type": "object", "properties": {"b": {"type": "null"}}}
A, AB, AC = '{"a":null}', '{"a":null,"b":null}', '{"a":null,"c":1}'


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (BASE, [A], [AB, AC]),
        ({"anyOf": [BASE, MORE]}, [A, '{"b":null}'], [AB, AC]),
        ({"allOf": [{"$ref": "#/$defs/base"}]}, [A], [AB, AC]),
        ({"allOf": [{"$ref": "#/$defs/base"}, MORE]}, [A, AB], ["{}"]),
        ({**MORE, "$ref": "#/$defs/base"}, [A, '{"b":null,"a":null}'], ["{}"]),
        (
            {"properties": {"x": {"$ref": "#/$defs/base"}}, "allOf": [{"$ref": "#/$defs/base"}]},
            [f'{{"x":{A},"a":null}}'],
            [f'{{"x":{AB},"a":null}}'],
        ),
    ],
)
def test_objects_are_closed_unless_several_schemas_name_their_members(
    grammars: Grammars, schema: Any, good: list[str], bad: list[str]
) -> None:
    whole = {**schema, "$defs": {"base": BASE}}
    asked = StructuredOutputs(json=whole, disable_additional_properties=True)
    assert [follows(grammars, asked, text) for text in good] == [True] * len(good)
    assert [follows(grammars, asked, text) for text in bad] == [False] * len(bad)


def test_no_text_begins_what_has_no_end(grammars: Grammars) -> None:
    """Recursion without an end where it need not be met: nothing else would ever follow."""
    node = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v", "next"],
    }
    properties = {**node["properties"], "list": {"items": {"$ref": "#/$defs/node"}}}
    root = {**node, "properties": properties, "required": ["v"], "$defs": {"node": node}}
    asked = StructuredOutputs(json=root, disable_additional_properties=True)
    matcher = grammars.compile(asked).matcher(continues=True)
    tokenizer = grammars._tokenizer
    assert tokenizer is not None
    for token in tokenizer.encode('{"v":1,"', add_special_tokens=False):
        matcher.accept(token)
    texts = {tokenizer.bytes_of(token) for token in allowed_tokens(matcher)[0]}
    assert b"l" in texts and b"n" not in texts
    assert follows(grammars, asked, '{"v":1,"list":[]}')
    assert not follows(grammars, asked, '{"v":1,"next":{"v":1}}')


@pytest.mark.parametrize(("schema", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_what_cannot_be_followed_is_refused_with_its_place(
    grammars: Grammars, schema: Any, message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidArgumentError, match=message.replace("/defs", r"/\$defs")):
        grammars.compile(StructuredOutputs(json=schema))
    assert time.monotonic() - start < 30


def test_without_strict_what_cannot_be_enforced_is_left_out(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"not": {"type": "null"}, "uniqueItems": True, "type": "array"}},
        "oneOf": [{"minProperties": 0}, {"maxProperties": 9}],
        "required": ["a"],
    }
    with pytest.raises(InvalidArgumentError, match="ask without strict"):
        grammars.compile(StructuredOutputs(json=schema))
    assert follows(grammars, StructuredOutputs(json=schema, strict=False), '{"a": [1, 1]}')
    # What the library alone refuses: a pattern that looks ahead, counts of optional properties.
    schema = {
        "type": "object",
        "properties": {"a": {"pattern": "(?=a)", "maxLength": 2}, "b": {"minimum": 1e300}},
        "minProperties": 2,
    }
    lenient = StructuredOutputs(json=schema, strict=False)
    assert follows(grammars, lenient, '{"a": "xy", "b": 0}')
    assert not follows(grammars, lenient, '{"a": "xyz", "b": 0}')
    with pytest.raises(InvalidArgumentError, match="Unsatisfiable"):
        unmet = {"type": "integer", "minimum": 5, "maximum": 3}
        grammars.compile(StructuredOutputs(json=unmet, strict=False))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"regex": "(?=a)b"}, "the regex cannot be followed: .*look-around"),
        ({"regex": "["}, "the regex cannot be followed: .*unclosed"),
        ({"grammar": "start: foo"}, 'the grammar cannot be followed: unknown name: "foo", at line'),
        ({"grammar": "root ::= foo"}, "GBNF's syntax, and wrong"),
        ({"grammar": 'root ::= start\nstart ::= "a"'}, "GBNF's syntax, and wrong: Rule 'start' al"),
        ({"grammar": "start: X\nX: /a/ & /b/"}, "no text meets it"),
        ({"json": "{"}, "the JSON schema is no JSON"),
        ({"json": "5"}, "the JSON schema is int"),
        ({"json": {"const": float("nan")}}, "the JSON schema is no JSON"),
        ({"json": '{"a":' * 513 + "1" + "}" * 513}, "JSON schema has more than 512 lists and obj"),
        ({"choice": []}, "choice is"),
        ({"choice": ["a", ""]}, "choice holds ''"),
        ({"choice": "ab"}, "choice is 'ab'"),
        ({"choice": ["\ud800"]}, "half a surrogate pair"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice"),
        ({}, "nothing to follow"),
        ({"json_object": False}, "nothing to follow"),
        ({"jsn": {}}, "has 'jsn'"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": "a" * 70_000}, "regex has 70000 characters"),
        ({"grammar": 5}, "grammar is 5"),
        ({"json_object": True, "strict": "yes"}, "strict is 'yes'"),
    ],
)
def test_what_is_no_structured_output(
    grammars: Grammars, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        grammars.compile(StructuredOutputs.of(wanted))


def test_references_of_every_kind(grammars: Grammars) -> None:
    schema = {
        "$id": "http://x/root.json",
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/a%20b"},
            "b": {"$ref": "item.json#/$defs/n"},
            "c": {"$ref": "#here"},
            "d": {"$ref": "http://x/item.json"},
            "e": {"$ref": "#/unknown/0/part"},
        },
        "additionalProperties": False,
        "unknown": [{"part": {"const": 5}}],
        "$defs": {
            "a b": {"const": 1},
            "item": {"$id": "item.json", "const": 4, "$defs": {"n": {"const": 2}}},
            "c": {"$anchor": "here", "const": 3},
        },
    }
    wanted = StructuredOutputs(json=schema)
    text = '{"a":1,"b":2,"c":3,"d":4,"e":5}'
    assert follows(grammars, wanted, text)
    for digit in "12345":
        assert not follows(grammars, wanted, text.replace(f":{digit}", ":7"))
    old = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "items": {"$ref": "#/definitions/a", "const": 9},
        "definitions": {"a": {"minimum": 3, "exclusiveMinimum": True}},
    }
    assert follows(grammars, StructuredOutputs(json=old), "[4]")
    assert not follows(grammars, StructuredOutputs(json=old), "[3]")


CLASSES = [
    r'[^"]',
    r"[^\\]",
    r'[^"\\x]',
    r"[^\]a]",
    r"[^]a]",
    r"[\x00-!]",
    r"[\u0000-\u005b]",
    r'[^a-z"]',
    r"\[\^x",
    r'(a|[^"])',
    r'[^\x00-\x1f"]',
    r"\D",
    r"\W",
    r"\S",
    r".",
    r"[ -~]",
    r'[^\s"]',
    r"[^/]",
    r"a[^\]\[]",
]


@pytest.mark.parametrize("pattern", CLASSES)
def test_a_pattern_allows_what_it_says_and_no_more(grammars: Grammars, pattern: str) -> None:
    """Of strings that need escapes above all."""
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    names = {"type": "object", "patternProperties": {f"^{pattern}$": {}}}
    names["additionalProperties"] = False
    # In Rust's syntax a bracket may come first; in Python's not behind \x00.
    judge = re.compile(f"^(?:{pattern})$", re.ASCII)
    lost = 0
    texts = ['"', "\\", "x", "a", "]", "[", "/", "\n", "\x07", "!", "é", "[^x", "ax", 'a"', " "]
    for text in texts:
        quoted = json.dumps(text, ensure_ascii=False)
        got = follows(grammars, StructuredOutputs(json=schema), quoted)
        name = follows(grammars, StructuredOutputs(json=names), f"{{{quoted}: 1}}")
        assert not (got or name) or judge.search(text), text
        lost += bool(judge.search(text)) != (got and name)
    assert lost <= 1


def test_kept_grammars_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = make("byte_level")
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    monkeypatch.setattr(compiler, "MAX_GRAMMARS", 3)
    wanted = [StructuredOutputs(regex=f"a{{{i}}}") for i in range(1, 6)]
    for each in wanted:
        grammars.compile(each)
    assert grammars.num_compiled == 5 and len(grammars._kept) == 3
    grammars.compile(wanted[4])
    assert grammars.num_compiled == 5
    grammars.compile(wanted[0])
    assert grammars.num_compiled == 6
    monkeypatch.setattr(compiler, "MAX_KEPT_TEXT", 10_000)
    grammars.compile(StructuredOutputs(regex="b" * 9_900))
    assert len(grammars._kept) == 2  # itself, and the one before it
    assert grammars._kept_text == sum(size for _, size in grammars._kept.values())


def test_threads_compile_and_copy_at_the_same_time(make: Make) -> None:
    tokenizer, _ = make("byte_level")
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    found: list[bool] = []

    def work(number: int) -> None:
        for index in range(6):
            wanted = StructuredOutputs(regex=f"x{{{(number + index) % 4 + 1}}}")
            found.append(follows(grammars, wanted, "x" * ((number + index) % 4 + 1)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 24


def test_a_grammar_that_is_too_ambiguous_says_so(grammars: Grammars) -> None:
    """The library then allows the end alone, which would cut the text."""
    matcher = grammars.compile(StructuredOutputs(regex="ab")).matcher(continues=True)
    with pytest.raises(ValueError, match="does not go on with token"):
        matcher.accept(0)
    with pytest.raises(ValueError, match="cannot be followed"):
        matcher.allowed()
