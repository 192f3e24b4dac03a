"""Options of the command line for contrastive decoding."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated

from octavo.cli import completion
from octavo.cli.options import option, refuse_unused
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams
from octavo.search.contrastive import ContrastiveParams

_search = partial(option, panel="Search")


@dataclass(frozen=True)
class Contrast:
    """Contrastive decoding, where --amateur is given."""

    amateur: Annotated[
        str | None,
        _search(
            "Contrastive decoding: take what this smaller model of the same vocabulary finds less "
            "likely.",
            metavar="MODEL",
            autocompletion=completion.models,
        ),
    ] = None
    alpha: Annotated[
        float, _search("With --amateur: the least probability, as a part of the largest.")
    ] = 0.1


def check_contrast(
    contrast: Contrast, params: SamplingParams, beams: int | None, adapter: str | None
) -> None:
    """InvalidArgumentError names what does not go with --amateur, or needs one."""
    refuse_unused(contrast, "alpha", contrast.amateur is not None, "with --amateur MODEL")
    if contrast.amateur is None:
        return
    for name, given in (("--beams", beams), ("--adapter", adapter)):
        if given is not None:
            raise InvalidArgumentError(
                f"{name} is {given!r}, which does not go with --amateur; leave one of them out"
            )
    plain = replace(
        contrastive_params(contrast.alpha, params).sampling_params(),
        max_tokens=params.max_tokens,
        seed=params.seed,
    )
    why = "contrastive decoding compares the probabilities of two models as they are"
    refuse_others(params, plain, "--amateur", why)


def contrastive_params(alpha: float, params: SamplingParams) -> ContrastiveParams:
    """--alpha with the options that go with it."""
    return ContrastiveParams(
        params.max_tokens or SamplingParams().max_tokens or 1,
        alpha,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        skip_special_tokens=params.skip_special_tokens,
    )


def refuse_others(params: SamplingParams, plain: SamplingParams, flag: str, why: str) -> None:
    """InvalidArgumentError for a field of params that is another in plain."""
    for each in fields(SamplingParams):
        value = getattr(params, each.name)
        if value != getattr(plain, each.name):
            raise InvalidArgumentError(
                f"{each.name} is {value!r}, which does not go with {flag}: {why}; leave one of "
                f"them out"
            )
