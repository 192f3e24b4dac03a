"""Drafters over fake models, for engines over fake models."""

from __future__ import annotations

from typing import Any

from engine_helpers import fake_options
from fake_runtime import VOCAB, FakeBatch, FakeOutput, FakeRuntime

from octavo.runtime.loader import LoadedRuntime
from octavo.speculation.draft_model import DraftModelSource
from octavo.speculation.ngram import NgramSource
from octavo.speculation.speculator import Speculator


class ErringRuntime(FakeRuntime):
    """The fake model, but for every so many tokens, which are others."""

    error_every = 0

    def wait(self, ticket: int) -> FakeOutput:
        output = super().wait(ticket)
        if self.error_every:
            wrong = output.token_ids % self.error_every == 0
            output.token_ids[wrong] = (output.token_ids[wrong] + 1) % (VOCAB - 1)
        return output


def fake_draft_source(
    num_blocks: int = 60, error_every: int = 0, num_groups: int = 1, **options: Any
) -> DraftModelSource:
    """A draft model that is the fake model, right but for every so many tokens."""
    resolved = fake_options(**options)
    runtime: Any = ErringRuntime(resolved, num_blocks, (0,) * num_groups)
    runtime.error_every = error_every
    loaded = LoadedRuntime(runtime, resolved, num_blocks, "cpu")
    return DraftModelSource(loaded, (0,) * num_groups, VOCAB, FakeBatch)


def fake_drafting(num_blocks: int, error_every: int, depth: int, adaptive: bool) -> Speculator:
    """As the engine has it, over a fake draft model."""
    source = fake_draft_source(num_blocks, error_every, max_num_batched_tokens=9, max_num_seqs=4)
    return Speculator(source, depth, adaptive=adaptive, clock=lambda: 0.0)


def ngram_drafting(shortest: int, depth: int, adaptive: bool) -> Speculator:
    """Drafts from the sequence itself."""
    return Speculator(
        NgramSource(shortest, shortest + 2), depth, adaptive=adaptive, clock=lambda: 0.0
    )
