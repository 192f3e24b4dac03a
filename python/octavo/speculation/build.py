"""From `speculative_config` to the drafter of an engine."""

from __future__ import annotations

from octavo.engine.drafter import Drafter
from octavo.speculation.ngram import NgramSource
from octavo.speculation.speculator import Speculator
from octavo.speculative_config import SpeculativeConfig


def build_drafter(config: SpeculativeConfig | None) -> Drafter | None:
    """The drafter that the option asks for; None for none."""
    if config is None:
        return None
    source = NgramSource(config.prompt_lookup_min or 1, config.prompt_lookup_max or 1)
    return Speculator(source, config.num_speculative_tokens, adaptive=config.adaptive)
