"""From token strings to text, one token at a time.

A tokenizer.json names a chain of decoders (its "decoder" field). The `tokenizers` library runs the
chain over a finished list of tokens; here every decoder is a small state machine that takes one
token and gives what is certain so far, so that an answer of n tokens costs O(n) to stream. The
text is that of the library, bit for bit, with one deliberate exception: see `ByteFallback`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from octavo.errors import TokenizerError


class Stage(Protocol):
    """One decoder of the chain. Pieces go in; the pieces that are certain come out."""

    def push(self, piece: str) -> Iterable[str]: ...

    def finish(self) -> Iterable[str]: ...


class Pipeline:
    """The decoders of one tokenizer, with the state of one stream of tokens."""

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = stages

    def push(self, token: str) -> str:
        """Text that `token` (as the vocabulary spells it) makes certain; often all of its own."""
        pieces: list[str] = [token]
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)

    def finish(self) -> str:
        """What is still held back: the U+FFFD of a character that never became whole."""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)]
            pieces.extend(stage.finish())
        return "".join(pieces)


class _Utf8:
    """UTF-8 bytes to text, holding back the bytes of a character that is not whole yet."""

    def __init__(self, errors: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


class ByteLevel:
    """GPT-2, Llama 3, SmolLM2: each character of a token stands for one byte."""

    _ALPHABET = _byte_level_alphabet()

    def __init__(self, errors: str) -> None:
        self._utf8 = _Utf8(errors)

    def push(self, piece: str) -> Iterable[str]:
        try:
            data = bytes([self._ALPHABET[character] for character in piece])
        except KeyError:  # an added token, written as it is read
            data = piece.encode("utf-8", errors="replace")
        return [self._utf8.push(data)]

    def finish(self) -> Iterable[str]:
        return [self._utf8.finish()]


class ByteFallback:
    """Llama 2, Mistral: tokens like <0xE4> are bytes of a character outside the vocabulary.

    A run of such tokens that is not valid UTF-8 as a whole becomes one U+FFFD a byte in the
    `tokenizers` library, whole characters in it included, so that nothing of a run could be shown
    before it ends. Here whole characters come out at once and stay; only what is broken is
    replaced. The two agree on every run that is valid.
    """

    def __init__(self, errors: str) -> None:
        self._utf8 = _Utf8(errors)

    def push(self, piece: str) -> Iterable[str]:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return [self._utf8.push(bytes([int(piece[3:5], 16)]))]
            except ValueError:
                pass  # not a number: an ordinary token
        return [self._utf8.finish(), piece]

    def finish(self) -> Iterable[str]:
        return [self._utf8.finish()]


class Replace:
    """Every occurrence of a string within a token becomes another: sentencepiece's U+2581."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content

    def push(self, piece: str) -> Iterable[str]:
        return [piece.replace(self._pattern, self._content)]

    def finish(self) -> Iterable[str]:
        return []


class StripStart:
    """Up to `count` copies of a character fall away, at the start of each token or of the text."""

    def __init__(self, content: str, count: int, *, whole_text: bool, at_start: bool) -> None:
        self._content = content
        self._count = count
        self._whole_text = whole_text
        self._left = count if at_start or not whole_text else 0

    def push(self, piece: str) -> Iterable[str]:
        start = 0
        while self._left and piece.startswith(self._content, start):
            start += 1
            self._left -= 1
        if not self._whole_text:
            self._left = self._count
        elif start < len(piece):
            self._left = 0
        return [piece[start:]]

    def finish(self) -> Iterable[str]:
        return []


class Metaspace:
    """The replacement character is a space, but for the first token, where it is nothing."""

    def __init__(self, replacement: str, *, drop_first: bool) -> None:
        self._replacement = replacement
        self._drop = drop_first

    def push(self, piece: str) -> Iterable[str]:
        space = "" if self._drop else " "
        self._drop = False
        return [piece.replace(self._replacement, space)]

    def finish(self) -> Iterable[str]:
        return []


class Join:
    """A tokenizer with no decoder at all: tokens with a space between them."""

    def __init__(self, *, at_start: bool) -> None:
        self._separator = "" if at_start else " "

    def push(self, piece: str) -> Iterable[str]:
        text = self._separator + piece
        self._separator = " "
        return [text]

    def finish(self) -> Iterable[str]:
        return []


# Whether the tokens are the first of their text, what becomes of bytes that are no UTF-8 (as in
# `bytes.decode`) -> the stage with fresh state.
StageMaker = Callable[[bool, str], Stage]


class PipelineFactory:
    """The "decoder" field of a tokenizer.json, checked once; `create` gives a fresh pipeline."""

    def __init__(self, decoder: Any, source: str) -> None:
        """decoder: the parsed field, None where it is absent. source: for error messages.

        Raises TokenizerError for a decoder that octavo does not implement.
        """
        self._source = source
        self._fused = False  # from a Fuse on, pieces are parts of one text and no longer tokens
        if decoder is None:
            self._makers: list[StageMaker] = [lambda at_start, errors: Join(at_start=at_start)]
        else:
            self._makers = self._parse(decoder)

    def create(self, *, at_start: bool = True, errors: str = "replace") -> Pipeline:
        """at_start: the tokens begin a text, so that sentencepiece's leading space goes away.

        errors: what becomes of bytes that are no valid UTF-8, as in `bytes.decode`.
        """
        return Pipeline([make(at_start, errors) for make in self._makers])

    def _parse(self, decoder: Any) -> list[StageMaker]:
        try:
            kind = decoder["type"]
            if kind == "Sequence":
                return [maker for part in decoder["decoders"] for maker in self._parse(part)]
            maker = self._maker(kind, decoder)
        except (KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(
                f"{self._source}: the decoder {decoder!r} is malformed ({error!r})"
            ) from error
        return [] if maker is None else [maker]

    def _maker(self, kind: str, decoder: dict[str, Any]) -> StageMaker | None:
        if kind == "ByteLevel":
            self._fused = True
            return lambda at_start, errors: ByteLevel(errors)
        if kind == "ByteFallback" and not self._fused:
            return lambda at_start, errors: ByteFallback(errors)
        if kind == "Fuse":
            self._fused = True
            return None
        if kind == "Replace" and "String" in decoder["pattern"]:
            pattern, content = str(decoder["pattern"]["String"]), str(decoder["content"])
            if len(pattern) == 1 or not self._fused:
                return lambda at_start, errors: Replace(pattern, content)
        if kind == "Strip" and int(decoder["stop"]) == 0:
            fused, character, count = self._fused, str(decoder["content"]), int(decoder["start"])
            return lambda at_start, errors: StripStart(
                character, count, whole_text=fused, at_start=at_start
            )
        if kind == "Metaspace" and not self._fused:
            replacement = str(decoder["replacement"])
            scheme = decoder.get("prepend_scheme", "always")
            drop = scheme != "never" and decoder.get("add_prefix_space", True)
            return lambda at_start, errors: Metaspace(replacement, drop_first=at_start and drop)
        raise TokenizerError(
            f"{self._source}: the decoder {decoder!r} is not supported; octavo implements "
            "ByteLevel, ByteFallback, Metaspace, Replace (of a string), Strip (at the start) and "
            "Fuse, alone or in a Sequence"
        )
