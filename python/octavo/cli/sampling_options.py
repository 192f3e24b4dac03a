"""Options of sampling for the commands that answer: `params` becomes a SamplingParams."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from octavo.cli.options import SAMPLING, STOP, Command, chosen, gathered, option
from octavo.sampling_params import SamplingParams

RARE = "Sampling, rarely needed (docs/sampling.md)"

_sampling = partial(option, panel=SAMPLING)
_rare = partial(option, panel=RARE)
_stop = partial(option, panel=STOP)
_logprobs = partial(option, panel="Output", metavar="N")


class _Sampling:
    """How answers are drawn and where they end; fields of SamplingParams."""

    max_tokens: Annotated[
        int,
        option(
            "Longest answer, in tokens. A word is one or two.", "--max-tokens", "-n", metavar="N"
        ),
    ]
    min_tokens: Annotated[int, _stop("Shortest answer, in tokens.")]
    stop: Annotated[
        list[str] | None, _stop("End the answer before this text. May be given several times.")
    ]
    stop_token_ids: Annotated[
        list[int] | None,
        _stop("End the answer at this token id. May be given several times.", "--stop-token-id"),
    ]
    include_stop_str_in_output: Annotated[
        bool, _stop("Keep the --stop text at the end of the answer.", "--include-stop")
    ]
    ignore_eos: Annotated[
        bool,
        _stop(
            "Do not stop at the model's end of text, only at --max-tokens. For measuring speed.",
            "--ignore-eos",
        ),
    ]
    temperature: Annotated[
        float,
        option(
            "How varied: 0 always takes the likeliest token. It gives the same text every time; "
            "around 1 is varied, above 1.5 wild.",
            "--temperature",
            "-t",
            metavar="NUMBER",
        ),
    ]
    top_k: Annotated[int, _sampling("Choose among the k most probable tokens only. 0: among all.")]
    top_p: Annotated[
        float,
        _sampling(
            "Choose among the most probable tokens that together reach this probability. 1: among "
            "all."
        ),
    ]
    min_p: Annotated[
        float,
        _sampling("Leave out tokens less probable than this fraction of the best one's. 0: off."),
    ]
    seed: Annotated[
        int | None,
        option("Same seed, same text: repeats random choices.", metavar="NUMBER"),
    ]
    n: Annotated[
        int,
        _sampling(
            "How many answers to make; with a --temperature above 0 they differ.", "--answers"
        ),
    ]
    repetition_penalty: Annotated[
        float, _rare("Divide the logits of tokens that are there already. 1: off.")
    ]
    frequency_penalty: Annotated[
        float, _rare("Take this off a token's logit each time that the answer has it. 0: off.")
    ]
    presence_penalty: Annotated[
        float, _rare("Take this off the logits of all tokens that the answer has. 0: off.")
    ]
    top_n_sigma: Annotated[
        float,
        _rare(
            "Keep tokens whose logits are within so many standard deviations of the best's. 0: off."
        ),
    ]
    typical_p: Annotated[
        float,
        _rare(
            "Keep the tokens whose surprise is closest to the expected one, up to this "
            "probability. 1: off."
        ),
    ]
    xtc_probability: Annotated[
        float, _rare("How often XTC leaves out the most probable tokens. 0: never.")
    ]
    xtc_threshold: Annotated[
        float,
        _rare("The probability from which on XTC leaves a token out, but for the last of them."),
    ]
    dry_multiplier: Annotated[
        float, _rare("Take this off tokens that would go on with a repetition (DRY). 0: off.")
    ]
    dry_base: Annotated[float, _rare("DRY takes off so many times more for each further token.")]
    dry_allowed_length: Annotated[int, _rare("The shortest repetition that DRY is about.")]
    dry_penalty_last_n: Annotated[int, _rare("DRY looks at so many tokens before. -1: at all.")]
    dry_sequence_breakers: Annotated[
        list[str] | None,
        _rare(
            "A text over which no repetition reaches, in place of newline, colon, quote and star. "
            "May be given several times.",
            "--dry-sequence-breaker",
        ),
    ]
    bad_words: Annotated[
        list[str] | None,
        _rare("A word that the answer must not have. May be given several times.", "--bad-word"),
    ]


SAMPLING_FIELDS = tuple(name for name in _Sampling.__annotations__ if name != "n")
"""Options of sampling that may change between two turns of a conversation."""


class _Logprobs:
    """What is reported of tokens; further fields of SamplingParams, for commands that name them."""

    logprobs: Annotated[
        int | None,
        _logprobs(
            "With --json: the log-probability of each token, and of the N most probable ones in "
            "its place."
        ),
    ]
    prompt_logprobs: Annotated[
        int | None,
        _logprobs(
            "With --json: the log-probability of each token of the prompt, its rank, and the N "
            "most probable ones in its place. --max-tokens 0 makes no answer."
        ),
    ]


def sampling_options(
    *more: str, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Give a command the options of sampling; `params` becomes a SamplingParams.

    more: fields of _Logprobs that it takes besides. without: fields that it does not take.
    defaults: in place of SamplingParams's. Where the temperature is above 0 and no seed is named
    (or -1), it gets a random one, short enough to type again.
    """

    def make(**given: Any) -> SamplingParams:
        if given["temperature"] > 0 and given["seed"] in (None, -1):
            given["seed"] = secrets.randbelow(10**9)
        return SamplingParams(**given)

    options = chosen(_Sampling, without, _Logprobs, more)
    return gathered("params", make, options, vars(SamplingParams()) | defaults)
