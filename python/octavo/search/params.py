"""Options of a search over beams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.errors import InvalidArgumentError
from octavo.sampling_params import Limits, SamplingParams

MAX_BEAMS = 128


@dataclass(frozen=True)
class BeamSearchParams:
    """Options of one beam search. Every field is checked on construction.

    beam_width: how many beams, and answers found. max_tokens: an answer ends at this length.
    length_penalty: an answer's score is its log-probability over its length to this power; above 0
        long answers gain. early_stopping: True ends as soon as beam_width answers have ended; False
        when the best beam, at its present length, cannot beat the worst of them; "never" when it
        could not at any length up to max_tokens.
    num_beam_groups, diversity_penalty: diverse beam search. Each group of beams is a search by
        itself; the penalty is taken off a token's log-probability for each beam of an earlier group
        that chose it in this step. ignore_eos, stop_token_ids, include_stop_str_in_output,
    skip_special_tokens: as in `SamplingParams`.
    """

    beam_width: int
    max_tokens: int = 256
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        checks = {
            "beam_width": Limits(1, MAX_BEAMS, "1 is greedy decoding"),
            "max_tokens": Limits(1, None, "one new token at least"),
            "length_penalty": Limits(-10.0, 10.0, "1 for the mean log-probability"),
            "num_beam_groups": Limits(1, MAX_BEAMS, "1 for none"),
            "diversity_penalty": Limits(0.0, 100.0, "0 for none"),
        }
        for name, limits in checks.items():
            object.__setattr__(self, name, limits.check(name, getattr(self, name)))
        if self.early_stopping not in (True, False, "never"):
            raise InvalidArgumentError(
                f"early_stopping is {self.early_stopping!r}; expected True, False or 'never'"
            )
        if self.beam_width % self.num_beam_groups:
            raise InvalidArgumentError(
                f"beam_width is {self.beam_width}; expected a multiple of num_beam_groups, "
                f"{self.num_beam_groups}"
            )
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise InvalidArgumentError(
                f"diversity_penalty is {self.diversity_penalty:g}, which needs groups: set "
                f"num_beam_groups to 2 or more"
            )

    def sampling_params(self) -> SamplingParams:
        """Where the answers end, as a request says it."""
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )
