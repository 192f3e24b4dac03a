"""Contrastive decoding: the token that a large model finds likely and a small one does not.

Li et al. 2022 (arXiv 2210.15097); `contrastive_choice` in `reference/search.py` defines the choice.
The small model, the amateur, runs beside the engine, one sequence a request.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from octavo.config import EngineConfig, read_environment
from octavo.engine.request import FinishReason
from octavo.engine.search import MAX_CANDIDATES, Candidates, Move
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import Limits, SamplingParams


@dataclass(frozen=True)
class ContrastiveParams:
    """Options of contrastive decoding. Every field is checked on construction.

    max_tokens: an answer ends at this length. alpha: a token is plausible whose probability for the
    large model is at least alpha times the largest; 1 is greedy decoding. Of more than 512 such
    tokens the most probable 512 count. amateur_temperature: below 1 the amateur is surer of itself.
    ignore_eos, stop_token_ids, skip_special_tokens: as in `SamplingParams`.
    """

    max_tokens: int = 256
    alpha: float = 0.1
    amateur_temperature: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": Limits(1, None, "one new token at least"),
            "alpha": Limits(1e-6, 1.0, "0.1 is the paper's"),
            "amateur_temperature": Limits(0.01, 100.0, "1 for the amateur's own probabilities"),
        }
        for name, limits in checks.items():
            object.__setattr__(self, name, limits.check(name, getattr(self, name)))

    def sampling_params(self) -> SamplingParams:
        """Where the answers end, as a request says it."""
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            skip_special_tokens=self.skip_special_tokens,
        )


class Amateur:
    """A small model with the vocabulary of the large one.

    model: as `LLM` takes it. config: of the large model; the amateur has its device, length and
    number format, unless it is stored quantized. vocab_size: of the large model.
    Raises what loading a model raises, and InvalidArgumentError for another vocabulary.
    """

    def __init__(self, model: str, config: EngineConfig, vocab_size: int) -> None:
        from octavo.runtime.loader import load_runtime
        from octavo.runtime.session import Session
        from octavo.weights.checkpoint import open_checkpoint
        from octavo.weights.hub import resolve_model
        from octavo.weights.model_files import read_model

        environment = read_environment()
        files = read_model(resolve_model(model, environment))
        if files.spec.vocab_size != vocab_size:
            raise InvalidArgumentError(
                f"the amateur {model!r} has {files.spec.vocab_size} tokens; expected {vocab_size}, "
                f"as the model that it is to be compared with: take one of the same family"
            )
        # Small enough for one process, and perhaps not to be divided as the large model is.
        config = replace(config, tensor_parallel_size=1)
        checkpoint = open_checkpoint(files, config.load_format, config.seed)
        if checkpoint.formats:  # it is stored quantized, and stays as it is
            config = replace(config, quantize=None)
        self._session = Session(load_runtime(files, checkpoint, config, None, environment))
        self._session.need_one_rope()

    def restart(self, num_sequences: int) -> None:
        """Begin again with so many empty sequences."""
        self._session.restart(num_sequences)

    def logits(self, sequence: int, tokens: SequenceOf[int]) -> NDArray[np.float32]:
        """Add tokens to a sequence; float32 (vocab_size,), for the token after them."""
        chunk = self._session.chunk
        for start in range(0, len(tokens) - 1, chunk):
            self._session.feed(tokens[start : min(start + chunk, len(tokens) - 1)], sequence)
        found: NDArray[np.float32] = self._session.step({sequence: tokens[-1:]}).logits[0]
        return found


class ContrastiveDecoding:
    """A search with one beam, for one request (`engine.search.Search`).

    prompt: its tokens. sequence: the amateur's, which is empty.
    """

    num_beams = 1

    def __init__(
        self,
        params: ContrastiveParams,
        amateur: Amateur,
        sequence: int,
        prompt: SequenceOf[int],
        stop_token_ids: Collection[int],
        max_tokens: int,
        vocab_size: int,
    ) -> None:
        self.num_candidates = min(MAX_CANDIDATES, vocab_size)
        self._params = params
        self._amateur = amateur
        self._sequence = sequence
        self._news: SequenceOf[int] = prompt  # that the amateur has not read
        self._stops = frozenset(stop_token_ids)
        self._max_tokens = max_tokens
        self._tokens: list[int] = []
        self._logprob = 0.0

    def advance(self, rows: SequenceOf[Candidates]) -> list[Move]:
        """See `engine.search.Search`."""
        (row,) = rows
        logits = self._amateur.logits(self._sequence, self._news)
        scaled = logits.astype(np.float64) / self._params.amateur_temperature
        scaled -= scaled.max()
        own = scaled - math.log(float(np.exp(scaled).sum()))
        least = row.logprobs[0] + math.log(self._params.alpha)
        plausible = [pair for pair in zip(*row, strict=True) if pair[1] >= least]
        # The first of equals is the one that the large model prefers.
        token, logprob = max(plausible, key=lambda pair: pair[1] - float(own[pair[0]]))
        self._tokens.append(token)
        self._logprob += logprob
        self._news = [token]
        if token in self._stops or len(self._tokens) >= self._max_tokens:
            return []
        return [Move(0, token)]

    def results(self) -> list[tuple[SequenceOf[int], FinishReason, float]]:
        """See `engine.search.Search`."""
        reason: FinishReason = "stop" if self._tokens[-1] in self._stops else "length"
        return [(self._tokens, reason, self._logprob)]
