"""Structural tags as rules of a grammar.

Free text ends where it first reads as what ends it: both are one terminal, which the library ends
as soon as it can. So a format is written together with what ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping

from octavo.errors import InvalidArgumentError
from octavo.grammar.tag_formats import (
    AfterThinking,
    AnyText,
    ConstString,
    Dispatch,
    Format,
    GrammarText,
    JsonSchema,
    Or,
    Regex,
    Repeat,
    Repeated,
    Separated,
    Sequence,
    SpecialTokens,
    Tag,
    TagsWithSeparator,
    Token,
    TriggeredTags,
)

# One of these ends a format: a text, or a special token by its number.
# (): something else follows; None: nothing does.
Ends = tuple[str | int, ...] | None

_EMPTY = '""'
_ANY = "/(?s:.*)/"
_SPACE = r"/\s*/"
_MOST_GUARDED = 512  # characters of the strings whose beginnings are named one by one
_SIGNS = {"optional": "?", "star": "*", "plus": "+"}


class TagRules:
    """Writes the rules of one structural tag.

    special: the tokens that no text is made of, by what they read. leaf: gives a rule for a schema
    or a grammar. regex: an expression as a grammar has it between two slashes.
    """

    def __init__(
        self,
        special: Mapping[str, int],
        leaf: Callable[[JsonSchema | GrammarText], str],
        regex: Callable[[Regex], str],
    ) -> None:
        self._special, self._leaf, self._regex = special, leaf, regex
        longest_first = sorted(special, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._names: dict[
            tuple[str, str], str
        ] = {}  # by the letter and the options, and what they are
        # By the format, the ends behind it, and the end of the tag around it; a format is kept, so
        # its id is no other's.
        self._written: dict[tuple[int, Ends, Ends], tuple[Format, str]] = {}
        self._terminals: dict[tuple[int, Ends, Ends], tuple[Format, str | None]] = {}
        self._closing: Ends = ()  # what ends the tag that is being written: no text in it holds it

    def write(self, whole: Format) -> str:
        """All rules, `start` being the first. Raises InvalidArgumentError with the place."""
        start = f"start: {self._write(whole, None)}"
        rules = (f"{name}{kind[1:]}: {is_}" for (kind, is_), name in self._names.items())
        return "\n".join([start, *rules])

    def _write(self, part: Format, ends: Ends) -> str:
        """The name of a rule for a format and one of the ends behind it."""
        key = id(part), ends, self._closing
        if key not in self._written:
            self._written[key] = part, self._name(self._expression(part, ends))
        return self._written[key][1]

    def _name(self, expression: str, options: str = "", letter: str = "r") -> str:
        name = f"{letter}{len(self._names)}"
        return self._names.setdefault((letter + options, expression), name)

    def _expression(self, part: Format, ends: Ends) -> str:
        if ends == () and _is_free(part):
            raise InvalidArgumentError(
                f"{part.place}: nothing says where this text ends; expected it last, in a tag that "
                "has an end, or before a const_string, a token or a tag that has a begin"
            )
        terminal = self._terminal(part, ends)
        if terminal is not None:
            return self._until(self._name(terminal, letter="T"), ends)
        if isinstance(part, (TriggeredTags, AfterThinking)):
            return self._write(part.as_dispatch(), ends)
        if isinstance(part, (TagsWithSeparator, Separated)):
            return self._write(part.as_sequence(), ends)
        if isinstance(part, Dispatch):
            return self._dispatch(part, ends)
        if isinstance(part, Sequence):
            return self._sequence(part, ends)
        if isinstance(part, Or):
            return " | ".join(self._write(each, ends) for each in part.elements)
        if isinstance(part, Tag):
            return self._tag(part, ends)
        if isinstance(part, Repeated) and part.type == "optional":
            return f"{self._write(part.content, ends)} | {self._one_of(ends) or _EMPTY}"
        return f"{self._write(part, ())} {self._one_of(ends)}" if ends else self._closed(part)

    def _closed(self, part: Format) -> str:
        """A format that says itself where it ends."""
        if isinstance(part, ConstString):
            return self._spell(part.value)
        if isinstance(part, Token):
            return self._spell(self._number(part))
        if isinstance(part, Repeated):
            return self._write(part.content, ()) + _SIGNS[part.type]
        if isinstance(part, Repeat):
            return self._write(part.content, ()) + _times(part)
        if isinstance(part, (JsonSchema, GrammarText)):
            return self._leaf(part)
        if isinstance(part, SpecialTokens):
            tokens = self._special_tokens(part.but)
            return f"({self._name(_SPACE, letter='T')} {tokens})*" if tokens else _EMPTY
        raise TypeError(f"{type(part).__name__} is no format")

    def _terminal(self, part: Format, ends: Ends = None) -> str | None:
        """A format in which all is text and expressions, as one expression."""
        key = id(part), ends, self._closing
        if key not in self._terminals:
            self._terminals[key] = part, self._as_terminal(part, ends)
        return self._terminals[key][1]

    def _as_terminal(self, part: Format, ends: Ends) -> str | None:
        if isinstance(part, AnyText):
            return self._free(part, ends)
        if isinstance(part, Regex):
            return f"/{self._regex(part)}/"
        if isinstance(part, ConstString) and not self._special_text.search(part.value):
            return json.dumps(part.value, ensure_ascii=False)
        inner = part.elements if isinstance(part, (Sequence, Or)) else []
        if isinstance(part, (Repeated, Repeat)):
            inner = [part.content]
        found = [each for one in inner if (each := self._terminal(one, ends)) is not None]
        if not found or len(found) < len(inner):
            return None
        sign = _SIGNS[part.type] if isinstance(part, Repeated) else ""
        sign = _times(part) if isinstance(part, Repeat) else sign
        return f"({(' | ' if isinstance(part, Or) else ' ').join(found)}){sign}"

    def _until(self, terminal: str, ends: Ends) -> str:
        """A terminal and the first of the ends, wherever it comes."""
        if not ends:
            return terminal
        texts = [json.dumps(end, ensure_ascii=False) for end in ends if isinstance(end, str)]
        found = [self._name(f"{terminal} ({' | '.join(texts)})", "[lazy]")] if texts else []
        for end in ends:
            if isinstance(end, int):
                found.append(f"{terminal} {self._spell(end)}")
            elif special := self._special_text.search(end):  # which no terminal holds
                before, rest = end[: special.start()], end[special.start() :]
                text = f"{terminal} {json.dumps(before, ensure_ascii=False)}"
                lead = self._name(text, letter="T") if before else terminal
                found.append(f"{lead} {self._spell(rest)}")
        return f"({' | '.join(found)})"

    def _free(self, part: AnyText | Dispatch, ends: Ends) -> str:
        """Free text without what is excluded; `ends` end it anyhow, those of its tag may not."""
        most = part.max_chars if isinstance(part, AnyText) else None
        text = _ANY if most is None else f"/(?s:.{{0,{most}}})/"
        inner = [
            end for end in self._closing or () if isinstance(end, str) and end not in (ends or ())
        ]
        if not part.excludes and not inner:
            return text
        words = " | ".join(
            json.dumps(each, ensure_ascii=False) for each in [*part.excludes, *inner]
        )
        return f"({text} & ~({_ANY} ({words}) {_ANY}))"

    def _dispatch(self, part: Dispatch, ends: Ends) -> str:
        free = self._name(self._free(part, ends), letter="T")
        cases = " | ".join(
            f"{self._until(free, (pattern,))} {self._write(then, () if part.loop else ends)}"
            for pattern, then in part.rules
        )
        special, last = self._free_special(part, ends), self._until(free, ends)
        if part.loop:
            return f"({cases}{special and f' | {special}'})* {last}"
        return f"{special and f'({special})*'} ({cases} | {last})"

    def _free_special(self, part: Dispatch, ends: Ends) -> str:
        """Free text and a special token behind it; "" where none may stand there.

        Where such a token is not shown, the texts around it become one: the text before it does not
        end as a pattern begins, which the text behind it might complete.
        """
        if part.special_but is None:
            return ""
        stops = [*(pattern for pattern, _ in part.rules), *(ends or ()), *(self._closing or ())]
        others = [*part.excludes, *part.special_but]
        texts = [each for each in (*stops, *others) if isinstance(each, str)]
        if sum(map(len, texts)) > _MOST_GUARDED:
            raise InvalidArgumentError(
                f"{part.place}: special_but goes with patterns, excluded strings and ends of at "
                f"most {_MOST_GUARDED} characters together; these have {sum(map(len, texts))}"
            )
        begins = dict.fromkeys(text[:length] for text in texts for length in range(1, len(text)))
        tokens, free = self._special_tokens([*stops, *others]), self._free(part, ends)
        if begins:
            words = " | ".join(json.dumps(each, ensure_ascii=False) for each in begins)
            free = f"({free} & ~({_ANY} ({words})))"
        return tokens and f"{self._name(free, letter='T')} {tokens}"

    def _special_tokens(self, but: Collection[str | int]) -> str:
        """One of the special tokens, but these and those that have to do with these texts."""
        texts = [each for each in but if isinstance(each, str)]
        tokens = [
            str(token)
            for name, token in self._special.items()
            if token not in but and not any(name in text or text in name for text in texts)
        ]
        return f"<[{','.join(tokens)}]>" if tokens else ""

    def _sequence(self, part: Sequence, ends: Ends) -> str:
        found: list[str] = []
        waiting: list[Format] = [*part.elements]
        while waiting:
            one = waiting.pop(0)
            head, rest = (None, None) if not waiting else self._head(waiting[0])
            if not waiting:
                found.append(self._write(one, ends))
            elif head is None or not (_is_free(one) or self._terminal(one) is not None):
                found.append(self._write(one, ()))
            else:
                found.append(self._write(one, (head,)))
                waiting[0] = rest or ConstString(value="")
        return " ".join(found)

    def _head(self, part: Format) -> tuple[str | int | None, Format | None]:
        """What a format begins with in any case, and the rest of it."""
        if isinstance(part, ConstString) and part.value:
            return part.value, None
        if isinstance(part, Token):
            return self._number(part), None
        if isinstance(part, Tag) and part.begin:
            return self._literal(part.begin), part.model_copy(update={"begin": ""})
        return None, None

    def _tag(self, part: Tag, ends: Ends) -> str:
        begin = self._spell(self._literal(part.begin))
        given = part.end if isinstance(part.end, list) else [part.end]
        if given == [""]:
            return f"{begin} {self._write(part.content, ends)}"
        own = tuple(self._literal(each) for each in given)
        outer, self._closing = self._closing, own
        content = self._write(part.content, own)
        self._closing = outer
        return f"{begin} {content} {self._one_of(ends)}"

    def _literal(self, given: str | Token) -> str | int:
        return self._number(given) if isinstance(given, Token) else given

    def _number(self, part: Token) -> int:
        number = self._special.get(part.token) if isinstance(part.token, str) else part.token
        if number is None or number not in self._special.values():
            raise InvalidArgumentError(
                f"{part.place}: {part.token!r} is no special token within a text of this model; "
                "expected one, or a const_string for what other tokens read"
            )
        return number

    def _one_of(self, ends: Ends) -> str:
        return self._name(" | ".join(map(self._spell, ends))) if ends else ""

    def _spell(self, end: str | int) -> str:
        """A text as it is written: what reads like a special token may be that token."""
        if isinstance(end, int):
            return f"<[{end}]>"
        found, last = [], 0
        for special in self._special_text.finditer(end):
            text = json.dumps(special[0], ensure_ascii=False)
            found.append(json.dumps(end[last : special.start()], ensure_ascii=False))
            found.append(f"({text} | <[{self._special[special[0]]}]>)")
            last = special.end()
        return " ".join([*found, json.dumps(end[last:], ensure_ascii=False)])


def _is_free(part: Format) -> bool:
    """Whether it may end with free text, so that another must say where."""
    if isinstance(part, Sequence):
        return _is_free(part.elements[-1])
    if isinstance(part, Or):
        return any(map(_is_free, part.elements))
    if isinstance(part, (Repeated, Repeat, Separated)):
        return _is_free(part.content)
    if isinstance(part, Tag):
        return part.end == "" and _is_free(part.content)
    if isinstance(part, TriggeredTags):
        return not (part.at_least_one and part.stop_after_first) or any(map(_is_free, part.tags))
    return isinstance(part, (AnyText, Dispatch, AfterThinking))


def _times(part: Repeat) -> str:
    return f"{{{part.min},{'' if part.max == -1 else part.max}}}"
