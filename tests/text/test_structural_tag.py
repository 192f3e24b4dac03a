"""Structural tags: what they allow, token by token, and what is wrong with them."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest
from grammar_helpers import allowed_tokens, follows, grammars_of_style
from tag_helpers import Judge, random_format

from octavo.errors import InvalidArgumentError
from octavo.grammar.compiler import Grammars
from octavo.structured_outputs import StructuredOutputs
from octavo.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

EXPLORE = bool(os.environ.get("OCTAVO_TEST_EXPLORE"))
NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
ANY: dict[str, Any] = {"type": "any_text"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Grammars]:
    return grammars_of_style("byte_level", tmp_path_factory.mktemp("model"))


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def tag(begin: Any, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(triggers: list[str], *tags: Any, **more: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": triggers, "tags": [*tags], **more}


def wanted(part: Any, **options: Any) -> StructuredOutputs:
    return StructuredOutputs(structural_tag={"type": "structural_tag", "format": part}, **options)


A = tag("<a>", NUMBER, "</a>")
B = tag("<b>", ANY, ["</b>", "!"])
# Each with texts that are of it and texts that are not. xgrammar 0.2.8 says the same of all but
# "[a]b]", which has the end of its tag twice.
FORMATS: list[tuple[Any, list[str], list[str]]] = [
    (
        triggered(["<a"], A),
        ["", "x", "x<", "x<a>5</a>y", "<a>5</a><a>-6</a>", "<<a>5</a>"],
        ["<a", "<a>", "x<a>5</a><a", "<a>x</a>", "<ab"],
    ),
    (
        triggered(["<a", "<b"], A, B),
        ["<a>5</a>é<b><a</b>", "<b>!x"],
        ["<b>", "<a>5</b>", "<b5"],
    ),
    (triggered(["<"], A, B, at_least_one=True), ["<a>5</a>y<b>!"], ["", "x<a>5</a>"]),
    (triggered(["<"], A, stop_after_first=True), ["", "x", "x<a>5</a>"], ["<a>5</a>y"]),
    (
        triggered(["<"], A, stop_after_first=True, at_least_one=True),
        ["<a>5</a>"],
        ["", "x<a>5</a>", "<a>5</a>y"],
    ),
    (triggered(["<"], A, excludes=["foo"]), ["fo", "<a>5</a>fo"], ["foo", "<a>5</a>xfoo"]),
    (tag("[", triggered(["<"], A), "]"), ["[]", "[x<a>5</a>y]"], ["[", "[]]", "[<]", "[]x"]),
    (B, ["<b>!", "<b></b>", "<b>x</c></b>"], ["<b>!!", "<b>x!</b>", "b"]),
    (tag("", ANY, "</t>"), ["</t>", "x</t>"], ["", "</t></t>"]),
    (tag("[", {"type": "or", "elements": [NUMBER, ANY]}, "]"), ["[5]", "[x]"], ["[]]"]),
    (
        tag("[", {"type": "sequence", "elements": [ANY, A, ANY]}, "]"),
        ["[x<a>5</a>y]", "[<a>5</a>]"],
        ["[]<a>5</a>]", "[]"],
    ),
    (tag("<a>", NUMBER, ""), ["<a>5", "<a>-55"], ["<a>", "<a>5x"]),
    (
        {"type": "tags_with_separator", "separator": ", ", "tags": [A, B]},
        ["", "<a>5</a>", "<a>5</a>, <b>!, <a>6</a>"],
        [", ", "<a>5</a>, ", "<a>5</a><a>5</a>", "x"],
    ),
    (
        {
            **{"type": "tags_with_separator", "separator": "", "tags": [A]},
            **{"at_least_one": True, "stop_after_first": True},
        },
        ["<a>5</a>"],
        ["", "<a>5</a><a>5</a>"],
    ),
    ({"type": "sequence", "elements": [ANY, text("END")]}, ["END", "xENDEND"], ["", "x", "ENDx"]),
    (
        {"type": "sequence", "elements": [{"type": "any_text", "max_chars": 3}, A, text(".")]},
        ["<a>5</a>.", "xé\n<a>5</a>."],
        ["xxxx<a>5</a>.", "<a>5</a>"],
    ),
    ({"type": "optional", "content": A}, ["", "<a>5</a>"], ["<a>5</a><a>5</a>"]),
    (tag("[", {"type": "optional", "content": ANY}, "]"), ["[]", "[x]"], ["[x]]"]),
    ({"type": "star", "content": B}, ["", "<b>x!<b></b>"], ["x"]),
    ({"type": "plus", "content": text("ab")}, ["ab", "abab"], ["", "aba"]),
    ({"type": "repeat", "content": A, "min": 1, "max": -1}, ["<a>1</a><a>2</a>"], [""]),
    ({"type": "repeat", "content": text("a"), "min": 0, "max": 2}, ["", "aa"], ["aaa"]),
    (
        {"type": "dispatch", "rules": [["<n>", NUMBER], ["<q>", text("?")]]},
        ["", "x<n>5x<q>?<n>6", "<"],
        ["<n>", "<q>x"],
    ),
    ({"type": "dispatch", "rules": [["<n>", NUMBER]], "loop": False}, ["x", "x<n>5"], ["<n>5x"]),
    (tag("[", {"type": "regex", "pattern": "^[a-z\\]]+$"}, "]"), ["[a]", "[]]"], ["[]", "[a]b]"]),
    (
        tag("[", {"type": "grammar", "grammar": 'root ::= "a" | "(" root ")"'}, "]"),
        ["[((a))]"],
        ["[(a]"],
    ),
    (text('"\\\n\x01::= é'), ['"\\\n\x01::= é'], ["é"]),
]
NEXT = {"type": "regex", "pattern": "[,;] ?"}
THINKING = {"type": "after_thinking", "begin": "<t>", "end": "</t>", "content": NUMBER}
CALL_AFTER = {**THINKING, "content": triggered(["<a>"], A)}
# Those that xgrammar does not have.
FORMATS += [
    (
        {"type": "separated", "content": A, "separator": NEXT},
        ["<a>5</a>", "<a>5</a>,<a>6</a>; <a>7</a>"],
        ["", "<a>5</a>,", "<a>5</a><a>6</a>"],
    ),
    (tag("[", {"type": "separated", "content": B, "separator": NEXT}, "]"), ["[<b>!]"], ["[]"]),
    (
        THINKING,
        ["5", "<t>x", "<t></t>5", " \n<t>x<t></</t>-7", "<t>5"],
        ["x", "<t></t>", "<t></t>x", "</t>5", "5<t></t>5", "x<t></t>5"],
    ),
    ({**THINKING, "begin": None}, ["", "5", "x", "x</t>5", "<t>x</t>5"], ["x</t>", "</t>x"]),
    (
        CALL_AFTER,
        ["x", "<a>5</a>", "<t><a>x</t>y<a>5</a>", "<t><a>x", "x<t><a>5</a></t>"],
        ["<a>x", "<t>x</t><a>x", "x<t><a>x</t>"],
    ),
]


@pytest.mark.parametrize(("part", "good", "bad"), FORMATS, ids=lambda each: str(each)[:60])
def test_what_follows_a_format(
    made: tuple[Tokenizer, Grammars], part: Any, good: list[str], bad: list[str]
) -> None:
    for each in (*good, *bad):
        assert follows(made[1], wanted(part), each) == (each in good), each


def test_the_older_form_is_triggered_tags(made: tuple[Tokenizer, Grammars]) -> None:
    structures = [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": '{"type": "null"}', "end": "</f>"},
    ]
    older = {"type": "structural_tag", "structures": structures, "triggers": ["<f="]}
    for given in (older, json.dumps(older)):
        asked = StructuredOutputs(structural_tag=given)
        for each in ("", "x<f=a>5</f>y<f=b>null</f>"):
            assert follows(made[1], asked, each)
        for each in ("<f=", "<f=c>", "<f=a>null</f>"):
            assert not follows(made[1], asked, each)


def test_special_tokens_may_stand_for_what_they_read(made: tuple[Tokenizer, Grammars]) -> None:
    tokenizer, grammars = made
    special = sorted(tokenizer.special_ids.difference(tokenizer.eos_token_ids))[0]
    name = tokenizer.token(special)
    assert name is not None
    (end_of_text, *_) = sorted(tokenizer.eos_token_ids)
    for begin in (name, {"type": "token", "token": name}, {"type": "token", "token": special}):
        free = {"type": "sequence", "elements": [ANY, tag(begin, NUMBER, f"{name}.")]}
        matcher = grammars.compile(wanted(free)).matcher(continues=True)
        five = tokenizer.encode("5", add_special_tokens=False)[0]
        dot = tokenizer.encode(".", add_special_tokens=False)[0]
        for token in (five, special, five, special, dot):
            allowed, may_end = allowed_tokens(matcher)
            assert token in allowed and not may_end
            matcher.accept(token)
        assert allowed_tokens(matcher) == (set(), True)
        assert follows(grammars, wanted(free), f"{name}5{name}.") == isinstance(begin, str)
    free_text = grammars.compile(wanted(ANY)).matcher(continues=True)
    assert special not in allowed_tokens(free_text)[0]
    with pytest.raises(InvalidArgumentError, match="is no special token within a text"):
        grammars.compile(wanted({"type": "token", "token": end_of_text}))


def test_special_tokens_may_stand_within_what_ends_free_text(
    made: tuple[Tokenizer, Grammars],
) -> None:
    tokenizer, grammars = made
    special = sorted(tokenizer.special_ids.difference(tokenizer.eos_token_ids))[0]
    name = f"\n{tokenizer.token(special)}."
    five, line, dot = (tokenizer.encode(t, add_special_tokens=False)[0] for t in "5\n.")
    called = [five, line, line, special, dot, five, line, special, dot]
    for part, tokens, written in (
        (tag("", ANY, name), called[:5], f"5\n{name}"),
        ({"type": "sequence", "elements": [ANY, text(name)]}, called[:5], f"5\n{name}"),
        (triggered([name], tag(name, NUMBER, name)), called, f"5\n{name}5{name}"),
    ):
        matcher = grammars.compile(wanted(part)).matcher(continues=True)
        assert special not in allowed_tokens(matcher)[0]
        for token in tokens:
            assert token in allowed_tokens(matcher)[0]
            matcher.accept(token)
        assert matcher.allowed()[1]
        assert follows(grammars, wanted(part), written)


def test_special_tokens_may_stand_in_free_text(made: tuple[Tokenizer, Grammars]) -> None:
    """But those that are named, and none behind the beginning of a pattern."""
    tokenizer, grammars = made
    first, second = sorted(tokenizer.special_ids.difference(tokenizer.eos_token_ids))[:2]
    named = tokenizer.token(second)
    for loop, but in ((True, []), (False, []), (True, [named])):
        part = {"type": "dispatch", "rules": [["<a>", NUMBER]], "loop": loop, "special_but": but}
        matcher = grammars.compile(wanted(part)).matcher(continues=True)
        so_far = ""
        for token in [first, "x", first, "<", "a", "b", first, "<", "a", ">", "5"]:
            allowed, may_end = allowed_tokens(matcher)
            free = set() if so_far.endswith(("<", "<a", "<a>")) else {first, second}
            assert allowed & {first, second} == free - ({second} if but else set()), so_far
            assert may_end == (not so_far.endswith("<a>"))
            number = (
                tokenizer.encode(token, add_special_tokens=False)[0] if token != first else first
            )
            matcher.accept(number)
            so_far += token if isinstance(token, str) else "#"
        assert matcher.allowed()[1]
    # The end of a tag around it is none of them, whether it is text or a token.
    for end in (named, {"type": "token", "token": named}):
        part = {"type": "dispatch", "rules": [["<a>", NUMBER]], "special_but": []}
        matcher = grammars.compile(wanted(tag("", part, end))).matcher(continues=True)
        for token in (first, second):
            assert token in allowed_tokens(matcher)[0]
            matcher.accept(token)
        assert allowed_tokens(matcher) == (set(), True)


def test_special_tokens_may_stand_around_thinking(made: tuple[Tokenizer, Grammars]) -> None:
    """As if they were not there: not between the two halves of what it begins with."""
    tokenizer, grammars = made
    special = sorted(tokenizer.special_ids.difference(tokenizer.eos_token_ids))[0]
    free = {"type": "dispatch", "rules": [["<a>", NUMBER]], "special_but": ["<t>"]}
    asked = wanted({**THINKING, "content": free})
    cases: list[tuple[list[str], bool]] = [
        (["#", " ", "#", "<t><a>x", "#", "</t>", "#", "<a>5"], True),
        (["#", "x<t>", "#", "<a>5"], True),
        (["#", "x<t><a>x"], False),
        (["#", "<t", "#"], False),
        (["#", "<t></t", "#"], False),
        (["#", "<t></t><a>x"], False),
    ]
    for parts, is_one in cases:
        matcher = grammars.compile(asked).matcher(continues=True)
        tokens = [
            token
            for part in parts
            for token in ([special] if part == "#" else tokenizer.encode(part, False))
        ]
        for token in tokens[:-1]:
            assert token in allowed_tokens(matcher)[0], (parts, tokenizer.token(token))
            matcher.accept(token)
        assert (tokens[-1] in allowed_tokens(matcher)[0]) == is_one, parts


def test_a_schema_is_closed_by_itself(made: tuple[Tokenizer, Grammars]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for closed in (True, False, None):
        for others_closed in (True, False):
            part = {"type": "json_schema", "json_schema": schema, "closed": closed}
            whole = {"type": "sequence", "elements": [NUMBER, text(" "), part]}
            asked = wanted(whole, disable_additional_properties=others_closed)
            is_open = not (others_closed if closed is None else closed)
            assert follows(made[1], asked, '5 {"b":1}') == is_open
            assert follows(made[1], asked, '5 {"a":1}')


ENDLESS = "nothing says where this text ends"
WRONG: list[tuple[Any, str]] = [
    ({"type": "sequence", "elements": [ANY, NUMBER]}, rf"format\.elements\[0\]: {ENDLESS}"),
    (triggered(["<"], tag("<a>", ANY, "")), ENDLESS),
    ({"type": "sequence", "elements": [{"type": "star", "content": ANY}, NUMBER]}, ENDLESS),
    ({"type": "star", "content": {"type": "sequence", "elements": [A, ANY]}}, ENDLESS),
    ({"type": "separated", "content": ANY, "separator": NUMBER}, ENDLESS),
    ({"type": "sequence", "elements": [THINKING, NUMBER]}, ENDLESS),
    ({"type": "exclude_token"}, r"tag\.format: Input tag 'exclude_token' found .* 'const_string'"),
    ({"type": "tag", "begin": "x"}, "Field required"),
    (tag("<", {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, ">"), "style: "),
    ({"type": "any_text", "max_tokens": 5}, r"any_text\.max_tokens: Input should be null"),
    ({"type": "any_text", "min_chars": 5}, r"any_text\.min_chars: Extra inputs"),
    (triggered(["<", "<a"], A), r"'<a>' begins with \['<', '<a'\]; expected one of the triggers"),
    (triggered(["<", "("], A), r"no tag begins with the trigger '\('"),
    (triggered(["("], A), r"begins with \[\]; expected one"),
    (triggered([], A), "triggers: List should have at least 1 item"),
    ({"type": "repeat", "content": A, "min": 3, "max": 2}, "min is 3 and max 2"),
    ({"type": "repeat", "content": A, "min": 0, "max": 0}, "min is 0 and max 0; expected no less"),
    ({"type": "token", "token": "a"}, "'a' is no special token within a text"),
    (
        tag("<", {"type": "json_schema", "json_schema": {"properties": {"a": {"not": {}}}}}, ">"),
        r"format\.content: the JSON schema cannot be followed at /properties/a: \"not\" cannot",
    ),
    (
        tag("<", {"type": "json_schema", "json_schema": {"type": "strin"}}, ">"),
        r"format\.content: the JSON schema cannot be followed at its root: Invalid type",
    ),
    (
        {"type": "or", "elements": [A, {"type": "regex", "pattern": "(?=a)"}]},
        r"format\.elements\[1\]: the regex cannot be followed: .*look-around",
    ),
    (
        {"type": "dispatch", "rules": [["a" * 300, A]], "excludes": ["b" * 213], "special_but": []},
        r"tag\.format: special_but goes with .* at most 512 .*; these have 513",
    ),
    (tag("<", {"type": "grammar", "grammar": "start: x"}, ">"), r"content: the grammar cannot be"),
    (tag("<", {"type": "grammar", "grammar": 'root ::= "'}, ">"), r"content: the grammar is in GB"),
]


@pytest.mark.parametrize(("part", "message"), WRONG, ids=lambda each: str(each)[:60])
def test_what_is_wrong_is_named(made: tuple[Tokenizer, Grammars], part: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        made[1].compile(wanted(part))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "structural_tag is no JSON"),
        ([], "structural_tag is list; expected an object"),
        (True, "structural_tag is true; expected an object"),
        ({}, r"structural_tag\.format: Field required"),
        ({"structures": 5}, "structures is no list of objects"),
        ({"structures": [{"begin": "<", "schema": "{", "end": ">"}]}, "a schema is no JSON"),
        ({"structures": [{"schema": {}}], "triggers": ["<"]}, "begin: Field required"),
        ({"structures": [{"begin": "<", "schema": {}, "end": ">"}]}, "triggers: Field required"),
    ],
)
def test_what_is_no_structural_tag(
    made: tuple[Tokenizer, Grammars], given: Any, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        made[1].compile(StructuredOutputs(structural_tag=given))


def test_a_tag_that_is_too_large_is_refused(made: tuple[Tokenizer, Grammars]) -> None:
    deep: Any = NUMBER
    for _ in range(65):
        deep = {"type": "optional", "content": deep}
    many = {"type": "or", "elements": [{"type": "or", "elements": [text("a")] * 100}] * 100}
    for part in (deep, many):
        with pytest.raises(InvalidArgumentError, match="too large; expected at most 10000 formats"):
            made[1].compile(wanted(part))
    for _ in range(300):
        deep = {"type": "optional", "content": deep}
    with pytest.raises(InvalidArgumentError, match="structural_tag"):
        made[1].compile(wanted(deep))


def test_what_is_not_strict_is_left_out(made: tuple[Tokenizer, Grammars]) -> None:
    schema = {"type": "string", "pattern": "(?=a)b", "not": {"const": "c"}}
    loose = {"type": "json_schema", "json_schema": schema, "strict": False}
    asked = wanted({"type": "sequence", "elements": [NUMBER, loose]})
    assert follows(made[1], asked, '5"c"') and not follows(made[1], asked, "5c")
    lenient = wanted(tag("", {**loose, "strict": None}, "."), strict=False)
    assert follows(made[1], lenient, '"c".')


def test_what_is_drawn_at_random_follows_random_formats(made: tuple[Tokenizer, Grammars]) -> None:
    """And a text with a planted change follows only if the other way to tell says so, too."""
    tokenizer, grammars = made
    seed = random.randrange(2**32) if EXPLORE else 7
    print(f"seed {seed}")
    rng = random.Random(seed)
    num_texts = num_violations = 0
    for _ in range(1500 if EXPLORE else 60):
        part = random_format(rng)
        asked = wanted(part, disable_any_whitespace=True)
        try:
            grammars.compile(asked)
        except InvalidArgumentError as error:
            assert ENDLESS in str(error), part
            continue
        for _ in range(3):
            drawn = _draw(rng, tokenizer, grammars, asked)
            if drawn is None:
                continue
            num_texts += 1
            assert Judge(drawn).is_whole(part), (part, drawn)
            place = rng.randrange(len(drawn) + 1)
            change = rng.choice(["", "a", "<", "!", "é"])
            changed = drawn[:place] + change + drawn[place + rng.randrange(2) :]
            if not Judge(changed).is_whole(part):
                num_violations += 1
                assert not follows(grammars, asked, changed), (part, changed)
    assert num_texts > 60 and num_violations > 20


def _draw(
    rng: random.Random, tokenizer: Tokenizer, grammars: Grammars, asked: StructuredOutputs
) -> str | None:
    """A text of random tokens, those of the formats being likelier; None: it had no end soon."""
    matcher, found = grammars.compile(asked).matcher(continues=True), b""
    for _ in range(40):
        allowed, may_end = allowed_tokens(matcher)
        if may_end and (not allowed or rng.random() < 0.25):
            return found.decode()
        liked = [t for t in allowed if tokenizer.bytes_of(t)[:1] in b'<>/ab[]!xyz{}"0123,:\xc3\xa9']
        token = rng.choice(sorted(liked if liked and rng.random() < 0.9 else allowed))
        matcher.accept(token)
        found += tokenizer.bytes_of(token)
    return None
