"""One answer's text as it grows: detokenization and stop strings, token by token."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from octavo.engine.adjustments import Adjuster
from octavo.engine.request import Request, Sequence
from octavo.text.stream import StopChecker, StreamDecoder

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class Answer:
    """A sequence with what the engine needs to know about its end.

    stop_token_ids: every token that ends it, the model's own included unless they are ignored.
    max_total_tokens: prompt and answer end at this length.
    adjuster: knows its penalties and biases; None when it has none.
    text: everything that may be shown so far. Without a tokenizer it stays empty.
    """

    __slots__ = (
        "_checker",
        "_decoder",
        "_pieces",
        "adjuster",
        "max_total_tokens",
        "request",
        "sequence",
        "stop_token_ids",
    )

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        max_total_tokens: int,
    ) -> None:
        params = request.params
        self.request = request
        self.sequence = sequence
        self.max_total_tokens = max_total_tokens
        self.adjuster = Adjuster.create(sequence)
        own = () if params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(own).union(params.stop_token_ids)
        self._decoder = (
            StreamDecoder(
                tokenizer,
                params.skip_special_tokens,
                continues=request.continues_prompt,
                kept=request.kept_special_ids,
            )
            if tokenizer is not None
            else None
        )
        self._checker = StopChecker(params.stop, params.include_stop_str_in_output)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def forbidden_token_ids(self) -> frozenset[int]:
        """Tokens that the next step must not draw: those that would end it before min_tokens."""
        num_drawn = self.sequence.num_output_tokens + self.sequence.num_pending_tokens
        if num_drawn < self.sequence.params.min_tokens:
            return self.stop_token_ids
        return frozenset()

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found, if one was."""
        return self._checker.matched

    def push(self, token_id: int) -> str:
        """Add the text of a drawn token (already in the sequence); returns what is new."""
        decoder, self._decoder = self._decoder, None
        if decoder is None:
            return ""
        text = self._show(decoder.push(token_id), decoder.skipped(token_id))
        self._decoder = decoder  # one that has failed is not asked again
        return text

    def flush(self) -> str:
        """The answer has ended: the text that was held back, to be called once."""
        decoder, self._decoder = self._decoder, None
        text = self._show(decoder.flush()) if decoder is not None else ""
        held = self._checker.flush()
        if held:
            self._pieces.append(held)
        return text + held

    def _show(self, text: str, skipped: str = "") -> str:
        """text: of an ordinary token, or of none. skipped: of a special token."""
        params = self.sequence.params
        if params.stop:
            armed = self.sequence.num_output_tokens >= params.min_tokens
            text = self._checker.push(text, armed) + self._checker.push(skipped, armed, hidden=True)
        if text:
            self._pieces.append(text)
        return text
