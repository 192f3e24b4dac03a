"""From token strings to text, one token at a time.

A tokenizer.json names a chain of decoders (its "decoder" field). The `tokenizers` library runs the
chain over a finished list of tokens; here every decoder is a small state machine that takes one
token and gives what is certain so far, so that an answer of n tokens costs O(n) to stream. The
text is that of the library, bit for bit, with one deliberate exception: see `ByteFallback`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

from octavo.errors import TokenizerError


class Stage:
    """One decoder of the chain. Pieces go in; the pieces that are certain come out."""

    def push(self, piece: str) -> list[str]:
        """What this piece makes certain."""
        raise NotImplementedError

    def finish(self) -> str:
        """What is still held back when no piece follows."""
        return ""


class Pipeline:
    """The decoders of one tokenizer, with the state of one stream of tokens."""

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = stages

    def push(self, token: str) -> str:
        """Text that `token` (as the vocabulary spells it) makes certain; often all of its own."""
        pieces = [token]
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)

    def finish(self) -> str:
        """What is still held back: the U+FFFD of a character that never became whole."""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)]
            pieces.append(stage.finish())
        return "".join(pieces)


class _Bytes(Stage):
    """UTF-8 bytes to text, holding back the bytes of a character that is not whole yet."""

    def __init__(self, errors: str) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | stand_ins


class ByteLevel(_Bytes):
    """GPT-2, Llama 3, SmolLM2: each character of a token stands for one byte."""

    _ALPHABET = _byte_level_alphabet()

    def push(self, piece: str) -> list[str]:
        try:
            data = bytes([self._ALPHABET[character] for character in piece])
        except KeyError:  # an added token, written as it is read
            data = piece.encode("utf-8", errors="replace")
        return [self._utf8.decode(data)]


class ByteFallback(_Bytes):
    """Llama 2, Mistral: tokens like <0xE4> are bytes of a character outside the vocabulary.

    A run of such tokens that is not valid UTF-8 as a whole becomes one U+FFFD a byte in the
    `tokenizers` library, whole characters in it included, so that nothing of a run could be shown
    before it ends. Here whole characters come out at once and stay; only what is broken is
    replaced. The two agree on every run that is valid.
    """

    def push(self, piece: str) -> list[str]:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return [self._utf8.decode(bytes([int(piece[3:5], 16)]))]
            except ValueError:
                pass  # not a number: an ordinary token
        return [self.finish(), piece]


class Replace(Stage):
    """Every occurrence of a string within a token becomes another: sentencepiece's U+2581.

    first: what it becomes in the first token.
    """

    def __init__(self, pattern: str, content: str, first: str) -> None:
        self._pattern, self._content, self._next = pattern, content, first

    def push(self, piece: str) -> list[str]:
        content, self._next = self._next, self._content
        return [piece.replace(self._pattern, content)]


class StripStart(Stage):
    """Up to `count` copies of a character fall away, at the start of each token or of the text."""

    def __init__(self, content: str, count: int, *, whole_text: bool, at_start: bool) -> None:
        self._content = content
        self._whole_text = whole_text
        self._left = count if at_start or not whole_text else 0

    def push(self, piece: str) -> list[str]:
        cut = min(self._left, len(piece) - len(piece.lstrip(self._content)))
        if self._whole_text:
            self._left = 0 if cut < len(piece) else self._left - cut
        return [piece[cut:]]


class Join(Stage):
    """A tokenizer with no decoder at all: tokens with a space between them."""

    def __init__(self, *, at_start: bool) -> None:
        self._separator = "" if at_start else " "

    def push(self, piece: str) -> list[str]:
        separator, self._separator = self._separator, " "
        return [separator + piece]


# Makes a stage with fresh state, of (at_start, errors), as at `PipelineFactory.create`.
StageMaker = Callable[[bool, str], Stage]


class PipelineFactory:
    """The "decoder" field of a tokenizer.json, checked once; `create` gives a fresh pipeline."""

    def __init__(self, decoder: Any, source: str) -> None:
        """decoder: the parsed field, None where it is absent. source: for error messages.

        Raises TokenizerError for a decoder that octavo does not implement.
        """
        self._source = source
        self._fused = False  # from a Fuse on, pieces are parts of one text and no longer tokens
        self._makers: list[StageMaker] = [lambda at_start, errors: Join(at_start=at_start)]
        if decoder is not None:
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
                return lambda at_start, errors: Replace(pattern, content, content)
        if kind == "Strip" and int(decoder["stop"]) == 0:
            fused, character, count = self._fused, str(decoder["content"]), int(decoder["start"])
            return lambda at_start, errors: StripStart(
                character, count, whole_text=fused, at_start=at_start
            )
        if kind == "Metaspace" and not self._fused:
            replacement = str(decoder["replacement"])
            scheme = decoder.get("prepend_scheme", "always")
            drop = scheme != "never" and decoder.get("add_prefix_space", True)
            # A space, but nothing in the first token of a text.
            return lambda at_start, errors: Replace(
                replacement, " ", "" if at_start and drop else " "
            )
        raise TokenizerError(
            f"{self._source}: the decoder {decoder!r} is not supported; octavo implements "
            "ByteLevel, ByteFallback, Metaspace, Replace (of a string), Strip (at the start) and "
            "Fuse, alone or in a Sequence"
        )
