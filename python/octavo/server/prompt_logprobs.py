"""Log-probabilities of a prompt, as vLLM writes them and as OpenAI's `echo` did.

Also the format of /v1/completions for an answer's: with `echo`, one list holds both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from octavo.engine.outputs import RequestOutput, TokenLogprob
from octavo.text.places import TokenPlaces

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class PromptLogprobs:
    """What one request wants to see of its prompts.

    shown: how many of the best tokens the member "prompt_logprobs" has; None: there is no such
    member. echoed: how many "logprobs" has for an echoed prompt; None: it has nothing of a prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, shown: int | None = None, echoed: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._echoed = echoed

    def member(self, result: RequestOutput) -> dict[str, Any]:
        """{"prompt_logprobs": one entry for each token}; {} where it was not asked for.

        An entry is None, or token id -> logprob, rank and decoded_token.
        """
        if self._shown is None or result.prompt_logprobs is None:
            return {}
        places = TokenPlaces(self._tokenizer, False, continues=False)
        found: list[dict[str, Any] | None] = []
        for token, entry in zip(result.prompt_token_ids, result.prompt_logprobs, strict=True):
            found.append(None if entry is None else _ranked(places, entry, self._shown))
            places.advance(token)
        return {"prompt_logprobs": found}

    def before(self, logprobs: dict[str, Any], result: RequestOutput, echo: str) -> dict[str, Any]:
        """The log-probabilities of an answer after those of its prompt, whose text is `echo`."""
        if self._echoed is None or result.prompt_logprobs is None:
            return logprobs
        special = frozenset() if self._tokenizer is None else self._tokenizer.special_ids
        shown = TokenPlaces(self._tokenizer, False, continues=False)
        added = TokenPlaces(self._tokenizer, True, continues=False)  # not in the text, as a BOS
        leading = takewhile(special.__contains__, result.prompt_token_ids)
        names = [shown.name(token) for token in leading]
        num_added = 0
        while not echo.startswith("".join(names[num_added:])):
            num_added += 1
        rows: list[tuple[Any, ...]] = []
        for token, entry in zip(result.prompt_token_ids, result.prompt_logprobs, strict=True):
            places = added if len(rows) < num_added else shown
            rows.append(_legacy_row(places, token, entry and _shortened(entry, self._echoed)))
            places.advance(token)
        both = {key: [row[i] for row in rows] + logprobs[key] for i, key in enumerate(_LEGACY)}
        both["text_offset"][len(rows) :] = [len(echo) + at for at in logprobs["text_offset"]]
        return both


_LEGACY = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def legacy_logprobs(places: TokenPlaces, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The log-probabilities of an answer's next tokens, as /v1/completions has them."""
    rows = []
    for entry in entries:
        rows.append(_legacy_row(places, entry.token_id, entry))
        places.advance(entry.token_id)
    return {key: [row[i] for row in rows] for i, key in enumerate(_LEGACY)}


def _legacy_row(
    places: TokenPlaces, token_id: int, entry: TokenLogprob | None
) -> tuple[str, float | None, dict[str, float] | None, int]:
    """A token's name, log-probability, best tokens, and place in the text."""
    offset = places.offset(token_id)
    if entry is None:
        return places.name(token_id), None, None, offset
    names = unique_names(places, (token_id, *entry.top_token_ids))
    top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    # As vLLM: the token itself is among them, even where it is not of the best.
    tops = {names[token]: p for token, p in (*top, (token_id, entry.logprob))}
    return names[token_id], entry.logprob, tops, offset


def _shortened(entry: TokenLogprob, count: int) -> TokenLogprob:
    """With the best `count` tokens only."""
    tops = entry.top_token_ids[:count], entry.top_logprobs[:count]
    return TokenLogprob(entry.token_id, entry.logprob, *tops, entry.rank)


def _ranked(places: TokenPlaces, entry: TokenLogprob, count: int) -> dict[str, Any]:
    """Token id -> logprob, rank, decoded_token: of the token itself, and of the best `count`."""
    ranks = {entry.token_id: entry.rank}
    ranks |= {token: rank for rank, token in enumerate(entry.top_token_ids, 1)}
    logprobs = {entry.token_id: entry.logprob}
    logprobs |= dict(zip(entry.top_token_ids[:count], entry.top_logprobs, strict=False))
    return {
        str(token): {
            "logprob": logprob,
            "rank": ranks[token],
            "decoded_token": places.name(token),
        }
        for token, logprob in logprobs.items()
    }


def unique_names(places: TokenPlaces, token_ids: Iterable[int]) -> dict[int, str]:
    """A name for each token at its place, all different: a second one of a name gets its number."""
    names: dict[int, str] = {}
    for token_id in dict.fromkeys(token_ids):
        name = places.name(token_id)
        names[token_id] = f"token_id:{token_id}" if name in names.values() else name
    return names
