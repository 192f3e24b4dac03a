"""Contrastive search: likely tokens whose hidden state is unlike those of the text so far.

Su et al. 2022 (arXiv 2202.06417); `similarity_choice` in `reference/search.py` defines the choice.
It needs the hidden states of a prompt and of k candidates a step, which the engine's steps do not
return. So it has a runtime of its own, with k sequences that hold the same text.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.config import EngineConfig, read_environment
from octavo.errors import InvalidArgumentError
from octavo.reference.search import similarity_choice
from octavo.sampling_params import Limits

Float32 = NDArray[np.float32]
_STATE = "final_norm"


@dataclass(frozen=True)
class ContrastiveSearchParams:
    """Options of contrastive search, with the names of transformers. Checked on construction.

    top_k: how many candidates a step has. penalty_alpha: 0 is greedy decoding; 0.6 is the paper's.
    max_tokens: an answer ends at this length. stop_token_ids: or with one of these.
    """

    penalty_alpha: float = 0.6
    top_k: int = 4
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "penalty_alpha": Limits(0.0, 1.0, "0.6 is the paper's"),
            "top_k": Limits(1, 128, "4 to 8 are usual"),
            "max_tokens": Limits(1, None, "one new token at least"),
        }
        for name, limits in checks.items():
            object.__setattr__(self, name, limits.check(name, getattr(self, name)))


class ContrastiveSearch:
    """A model in memory that answers one prompt at a time.

    model: as `LLM` takes it. top_k: the most candidates of a step. options: of `EngineConfig`.
    """

    def __init__(self, model: str, top_k: int = 8, **options: Any) -> None:
        """Load the model; raises what `LLM` raises."""
        from octavo.runtime.loader import load_runtime
        from octavo.runtime.session import Session
        from octavo.weights.checkpoint import open_checkpoint
        from octavo.weights.hub import resolve_model
        from octavo.weights.model_files import read_model

        environment = read_environment()
        files = read_model(resolve_model(model, environment))
        self.eos_token_ids: Collection[int] = files.eos_token_ids
        self.max_model_len = options.get("max_model_len") or min(
            files.spec.max_position_embeddings, 2048
        )
        config = EngineConfig(**options)
        config = replace(
            config,
            max_model_len=self.max_model_len,
            max_num_seqs=top_k,
            num_kv_blocks=top_k * -(-self.max_model_len // config.block_size),
            max_num_batched_tokens=max(128, 2 * top_k),
        )
        checkpoint = open_checkpoint(files, config.load_format, config.seed)
        self._session = Session(load_runtime(files, checkpoint, config, None, environment))
        self._session.need_one_rope()
        self._top_k = top_k

    def generate(
        self, prompt: SequenceOf[int], params: ContrastiveSearchParams | None = None
    ) -> list[int]:
        """The answer's tokens, the one that ended it included.

        InvalidArgumentError for a prompt that does not fit, and more candidates than were loaded.
        """
        params = params or ContrastiveSearchParams()
        if params.top_k > self._top_k:
            raise InvalidArgumentError(
                f"top_k is {params.top_k}; expected at most {self._top_k}, with which the model "
                f"was loaded: give ContrastiveSearch a larger top_k"
            )
        room = self.max_model_len - len(prompt)
        if not prompt or room < 1:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt)} tokens; expected 1 to {self.max_model_len - 1}"
            )
        stops = {*params.stop_token_ids, *self.eos_token_ids}
        states, logits = self._read(prompt, params.top_k)
        answer: list[int] = []
        new: list[int] = []  # the last token, which the sequences do not hold yet
        length = len(prompt)
        while len(answer) < min(params.max_tokens, room):
            best = np.argsort(-logits, kind="stable")[: params.top_k]
            shifted = np.exp(logits - logits.max())
            probabilities = (shifted / shifted.sum())[best].astype(np.float32)
            self._session.rewind(length)
            tokens = {i: [*new, int(token)] for i, token in enumerate(best)}
            step = self._session.step(tokens, taps=(_STATE,))
            found = step.taps[_STATE]
            chosen = similarity_choice(probabilities, found, states, params.penalty_alpha)
            length += len(new)
            new = [int(best[chosen])]
            answer += new
            if new[0] in stops:
                break
            states = np.concatenate([states, found[chosen : chosen + 1]])
            logits = step.logits[chosen]
        return answer

    def _read(self, prompt: SequenceOf[int], num_sequences: int) -> tuple[Float32, Float32]:
        """Feed every sequence the prompt; hidden states of all its tokens, and the last logits."""
        session = self._session
        session.restart(num_sequences)
        for index in range(1, num_sequences):
            session.feed(prompt, index)
        states = []
        for start in range(0, len(prompt), session.chunk):
            tokens = prompt[start : start + session.chunk]
            step = session.step({0: tokens}, range(len(tokens)), taps=(_STATE,))
            states.append(step.taps[_STATE])
        return np.concatenate(states), step.logits[-1]
