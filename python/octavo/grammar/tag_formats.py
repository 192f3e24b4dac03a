"""The formats of structural tags, as xgrammar names them and vLLM takes them, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from octavo.errors import InvalidArgumentError

MAX_FORMATS = 10_000
MAX_DEPTH = 64  # formats within formats
MAX_NAMES = 1000  # triggers, ends or excluded strings
MAX_REPEAT = 10_000

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Count = Annotated[int, Field(ge=0, le=MAX_REPEAT)]


class Format(BaseModel):
    """A part of a structural tag. Fields and values that octavo does not offer are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    _place: str = PrivateAttr("")

    @property
    def place(self) -> str:
        """Where it stands, as in "structural_tag.format.tags[0]"."""
        return self._place

    def _made(self, kind: type[Format], **fields: Any) -> Format:
        """Another format that stands in its place."""
        found = kind.model_construct(**fields)
        found._place = self._place
        return found


class ConstString(Format):
    """This text."""

    type: Literal["const_string"] = "const_string"
    value: str


class JsonSchema(Format):
    """JSON of a schema. strict and closed are octavo's own; None: as the structured outputs say.

    closed: what they call disable_additional_properties.
    """

    type: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any] | bool
    strict: bool | None = None
    closed: bool | None = None
    style: Literal["json"] = "json"
    any_order: Literal[False] = False
    max_whitespace_cnt: None = None
    excludes: Annotated[list[str], Field(max_length=0)] = []


class Regex(Format):
    """A text that matches an expression."""

    type: Literal["regex"] = "regex"
    pattern: Name


class GrammarText(Format):
    """A text in the language of a grammar, which is in Lark's or GBNF's syntax."""

    type: Literal["grammar"] = "grammar"
    grammar: Name


class AnyText(Format):
    """Free text, up to what ends it."""

    type: Literal["any_text"] = "any_text"
    excludes: Names = []
    max_chars: Count | None = None
    max_tokens: None = None


class Token(Format):
    """A special token, by its text or its number."""

    type: Literal["token"] = "token"
    token: int | str


class Repeated(Format):
    """Once or not at all; any number of times; at least once."""

    type: Literal["optional", "star", "plus"]
    content: AnyFormat


class Repeat(Format):
    """From min to max times; max is -1 for no limit."""

    type: Literal["repeat"] = "repeat"
    content: AnyFormat
    min: Count
    max: Annotated[int, Field(ge=-1, le=MAX_REPEAT)]

    @model_validator(mode="after")
    def _has_room(self) -> Repeat:
        if self.max == 0 or 0 < self.max < self.min:
            raise ValueError(
                f"min is {self.min} and max {self.max}; expected no less, and 1 at least"
            )
        return self


class Sequence(Format):
    """All of them, one after the other."""

    type: Literal["sequence"] = "sequence"
    elements: Annotated[list[AnyFormat], Field(min_length=1, max_length=MAX_FORMATS)]


class Or(Format):
    """One of them."""

    type: Literal["or"] = "or"
    elements: Annotated[list[AnyFormat], Field(min_length=1, max_length=MAX_FORMATS)]


class Tag(Format):
    """begin, content and one of the ends."""

    type: Literal["tag"] = "tag"
    begin: str | Token
    content: AnyFormat
    end: str | Annotated[Names, Field(min_length=1)] | Token


class Dispatch(Format):
    """Free text in which what follows each pattern is of the pattern's format.

    special_but is octavo's own: special tokens but these stand in free text, too; None: none do.
    """

    type: Literal["dispatch"] = "dispatch"
    rules: Annotated[list[tuple[Name, AnyFormat]], Field(min_length=1, max_length=MAX_FORMATS)]
    loop: bool = True
    excludes: Names = []
    special_but: Names | None = None


class TriggeredTags(Format):
    """Free text in which each trigger begins one of the tags."""

    type: Literal["triggered_tags"] = "triggered_tags"
    triggers: Annotated[Names, Field(min_length=1)]
    tags: Annotated[list[Tag], Field(min_length=1, max_length=MAX_FORMATS)]
    at_least_one: bool = False
    stop_after_first: bool = False
    excludes: Names = []

    @model_validator(mode="after")
    def _each_has_its_own(self) -> TriggeredTags:
        for tag in self.tags:
            found = [each for each in self.triggers if str(tag.begin).startswith(each)]
            if isinstance(tag.begin, Token) or len(found) != 1:
                raise ValueError(f"{tag.begin!r} begins with {found}; expected one of the triggers")
        for each in self.triggers:
            if not any(str(tag.begin).startswith(each) for tag in self.tags):
                raise ValueError(f"no tag begins with the trigger {each!r}")
        return self

    def as_dispatch(self) -> Format:
        """The same in simpler formats."""
        first = self._made(Or, elements=self.tags)
        if self.at_least_one and self.stop_after_first:
            return first
        rules = []
        for trigger in self.triggers:
            tags = [
                tag.model_copy(update={"begin": str(tag.begin)[len(trigger) :]})
                for tag in self.tags
                if str(tag.begin).startswith(trigger)
            ]
            rules.append((trigger, self._made(Or, elements=tags)))
        found = self._made(
            Dispatch, rules=rules, loop=not self.stop_after_first, excludes=self.excludes
        )
        if self.at_least_one:
            return self._made(Sequence, elements=[first, found])
        return found


class TagsWithSeparator(Format):
    """Tags with the same text between every two, and nothing else."""

    type: Literal["tags_with_separator"] = "tags_with_separator"
    tags: Annotated[list[Tag], Field(min_length=1, max_length=MAX_FORMATS)]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False

    def as_sequence(self) -> Format:
        """The same in simpler formats."""
        found = self._made(Or, elements=self.tags)
        if not self.stop_after_first:
            between = self._made(ConstString, value=self.separator)
            further = self._made(Sequence, elements=[between, found])
            others = self._made(Repeated, type="star", content=further)
            found = self._made(Sequence, elements=[found, others])
        if not self.at_least_one:
            found = self._made(Repeated, type="optional", content=found)
        return found


class Separated(Format):
    """octavo's own: the content once or more, and the separator between every two of them."""

    type: Literal["separated"] = "separated"
    content: AnyFormat
    separator: AnyFormat

    def as_sequence(self) -> Format:
        """The same in simpler formats."""
        further = self._made(Sequence, elements=[self.separator, self.content])
        others = self._made(Repeated, type="star", content=further)
        return self._made(Sequence, elements=[self.content, others])


class SpecialTokens(Format):
    """Any number of special tokens, with space before them; no part of a user's structural tag."""

    type: Literal["special_tokens"] = "special_tokens"
    but: Names


class AfterThinking(Format):
    """octavo's own: the content, or what a model thinks, and the content behind it.

    begin: what the thinking begins with, behind space; None: it has begun. It ends with `end`, or
    with the text. There may be special tokens in it, and before it.
    """

    type: Literal["after_thinking"] = "after_thinking"
    begin: Name | None = None
    end: Name
    content: AnyFormat

    def as_dispatch(self) -> Format:
        """The same in simpler formats."""
        rules = [(self.end, self.content)]
        thinking = self._made(Dispatch, rules=rules, loop=False, special_but=[])
        if self.begin is None:
            return thinking
        hidden = self._made(SpecialTokens, but=[self.begin])
        space = self._made(Regex, pattern=r"\s*")
        begin = self._made(ConstString, value=self.begin)
        first = self._made(Sequence, elements=[hidden, space, begin, thinking])
        return self._made(Or, elements=[first, self.content])


AnyFormat = Annotated[
    ConstString
    | JsonSchema
    | Regex
    | GrammarText
    | AnyText
    | Token
    | Repeated
    | Repeat
    | Sequence
    | Or
    | Tag
    | Dispatch
    | TriggeredTags
    | TagsWithSeparator
    | Separated
    | AfterThinking,
    Field(discriminator="type"),
]
_SIMPLER = (Repeated, Repeat, Sequence, Or, Tag, Dispatch)
for _each in (*_SIMPLER, TriggeredTags, TagsWithSeparator, Separated, AfterThinking):
    _each.model_rebuild()


class _Whole(BaseModel):
    """The newer form."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["structural_tag"] = "structural_tag"
    format: AnyFormat


def read_structural_tag(text: str) -> Format:
    """The format of a structural tag, which is JSON, in the newer form or the older one.

    Raises InvalidArgumentError with the place of what is wrong or not offered.
    """
    try:
        found = _Whole.model_validate_json(json.dumps(newer_form(text))).format
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        at = "".join(f"[{i}]" if isinstance(i, int) else f".{i}" for i in problem["loc"])
        wrong = problem["msg"].removeprefix("Value error, ")
        raise InvalidArgumentError(f"structural_tag{at}: {wrong}") from error
    waiting: list[tuple[Format, str, int]] = [(found, "structural_tag.format", 0)]
    number = 0
    while waiting:
        part, place, depth = waiting.pop()
        part._place = place
        number += 1
        if number > MAX_FORMATS or depth > MAX_DEPTH:
            raise InvalidArgumentError(
                f"{place}: too large; expected at most {MAX_FORMATS} formats, and {MAX_DEPTH} "
                "within each other"
            )
        waiting += [(each, place + at, depth + 1) for each, at in _inside(part)]
    return found


def _inside(part: Format) -> Iterator[tuple[Format, str]]:
    for name, value in part:
        for index, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
            at = f".{name}" if index is None else f".{name}[{index}]"
            if isinstance(each, tuple):
                each, at = each[1], f"{at}[1]"
            if isinstance(each, Format):
                yield each, at


def newer_form(text: str) -> dict[str, Any]:
    """A structural tag, which is JSON, in the newer form; it may be wrong."""
    given: dict[str, Any] = json.loads(text)
    if "structures" not in given:
        return given
    structures = given["structures"]
    if not isinstance(structures, list) or not all(isinstance(each, dict) for each in structures):
        raise InvalidArgumentError(
            'structural_tag.structures is no list of objects; expected {"begin", "schema", "end"}'
        )
    tags = []
    for each in structures:
        schema = each.get("schema", {})
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise InvalidArgumentError(
                    f"structural_tag.structures: a schema is no JSON: {error}"
                ) from error
        content = {"type": "json_schema", "json_schema": schema}
        others = {name: value for name, value in each.items() if name != "schema"}
        tags.append({**others, "type": "tag", "content": content})
    others = {name: value for name, value in given.items() if name not in ("structures", "type")}
    return {"format": {**others, "type": "triggered_tags", "tags": tags}}
