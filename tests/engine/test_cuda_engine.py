"""The engine on the CUDA backend: the promise about bits, with steps ahead, hits and preemption.

`deterministic`, so that everything here is exact equality: of tokens and of log-probabilities.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import run_to_end
from reference_helpers import random_weights, uniform

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.engine.drafter import Drafter
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.models.kv_groups import with_kv_groups
from octavo.models.rope import default_rope
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec
from octavo.sampling_params import SamplingParams
from octavo.speculation.medusa import MedusaHeads, MedusaSource
from octavo.speculation.ngram import NgramSource
from octavo.speculation.speculator import Speculator

pytestmark = needs_cuda

VOCAB = 131
_NORM = NormSpec(eps=1e-5)
_LAYER = LayerSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=96,
    norm=_NORM,
    rope=default_rope(5000.0, 64),
)
SPEC = ModelSpec("Tiny", VOCAB, 64, 512, (_LAYER, _LAYER), _NORM, tie_word_embeddings=False)
LENGTHS = (3, 37, 90)
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=9, logprobs=2),
    "sampled": SamplingParams(
        temperature=0.9, top_k=50, top_p=0.97, seed=2**63 + 5, max_tokens=9, logprobs=2
    ),
    "penalized": SamplingParams(
        temperature=0.8, seed=9, max_tokens=9, logprobs=2, repetition_penalty=1.3, min_tokens=4
    ),
}


def prompt_of(length: int, seed: int) -> list[int]:
    return [int(x) for x in (uniform(seed, length) + 1) * np.float32((VOCAB - 1) / 2 - 0.01)]


@cache
def weights() -> dict[str, Any]:
    return random_weights(SPEC, seed=4)


WINDOWED = with_kv_groups(replace(SPEC, layers=(replace(_LAYER, window=40), _LAYER)))


def make_engine(
    num_blocks: int = 60, spec: ModelSpec = SPEC, drafter: Drafter | None = None, **more: Any
) -> Engine:
    options = RuntimeOptions(
        dtype="bf16",
        kv_dtype="bf16",
        block_size=16,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=more.pop("max_num_batched_tokens", 64),
        deterministic=True,
        **more,
    )
    most = options.max_num_seqs + options.num_spare_seqs  # as the loader makes it
    runtime = _native.Runtime(DEVICE, spec, replace(options, max_num_seqs=most))
    for name, array in weights().items():
        runtime.load(name, array, "f32")
    runtime.alloc_kv(num_blocks)
    return Engine(
        runtime,
        options,
        num_kv_blocks=num_blocks,
        vocab_size=VOCAB,
        kv_windows=spec.kv_windows,
        drafter=drafter,
    )


def requests() -> dict[str, tuple[list[int], SamplingParams]]:
    return {
        f"{mode} {length}": (prompt_of(length, seed=length), params)
        for mode, params in PARAMS.items()
        for length in LENGTHS
    }


def facts(outputs: dict[str, RequestOutput]) -> dict[str, Any]:
    """Everything that must not change."""
    return {
        request_id: [
            (answer.token_ids, answer.finish_reason, answer.logprobs) for answer in output.outputs
        ]
        for request_id, output in outputs.items()
    }


def run(engine: Engine, *, apart: bool = False) -> dict[str, Any]:
    outputs: dict[str, RequestOutput] = {}
    for request_id, (prompt, params) in requests().items():
        engine.add_request(request_id, prompt, params)
        if apart:
            outputs.update(run_to_end(engine))
    outputs.update(run_to_end(engine))
    return facts(outputs)


@cache
def alone(spec: ModelSpec = SPEC) -> dict[str, Any]:
    """Each request by itself, nothing reused, nothing recorded, one step at a time."""
    engine = make_engine(
        spec=spec,
        graphs=False,
        overlap_steps=False,
        enable_prefix_caching=False,
        max_num_batched_tokens=128,
    )
    found = run(engine, apart=True)
    for answers in found.values():
        assert len(set(answers[0][0])) > 2, "an answer that repeats itself would show little"
    return found


@pytest.mark.parametrize(
    ("fields", "apart"),
    [
        ({}, False),
        ({"overlap_steps": False}, False),
        ({"graphs": False}, False),
        ({"max_num_batched_tokens": 13}, False),
        ({"num_blocks": 9, "overlap_steps": True}, False),  # too few for all: preemption
        ({}, True),
    ],
    ids=str,
)
def test_company_changes_no_bit(fields: dict[str, Any], apart: bool) -> None:
    engine = make_engine(**fields)
    assert run(engine, apart=apart) == alone()
    if "num_blocks" in fields:
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize(
    "fields",
    [{"overlap_steps": True}, {"max_num_batched_tokens": 13}, {"num_blocks": 26}],
    ids=str,
)
def test_a_window_changes_no_bit(fields: dict[str, Any]) -> None:
    engine = make_engine(spec=WINDOWED, **fields)
    assert run(engine) == alone(WINDOWED) != alone()
    engine.check_integrity()


def test_a_plain_step_is_one_graph_with_a_copy_either_way() -> None:
    engine = make_engine(overlap_steps=True)
    assert isinstance(engine.runtime, _native.Runtime)
    before = engine.runtime.counts()
    engine.add_request("a", prompt_of(30, 2), SamplingParams(temperature=0.7, max_tokens=20))
    run_to_end(engine)
    counts = {name: n - before[name] for name, n in engine.runtime.counts().items()}
    assert engine.num_steps == counts["uploads"] == counts["downloads"] == 20
    # All but the prompt's step and the first of each of the two flights.
    assert counts["replayed"] == 17 and counts["recorded"] == 2 and counts["forgotten"] == 0


def test_a_prefix_hit_changes_no_bit() -> None:
    engine = make_engine()
    run(engine)
    before = engine.stats()
    assert run(engine) == alone()
    assert engine.stats().num_prefix_hits > before.num_prefix_hits


@pytest.mark.parametrize("overlap", [False, True])
def test_bits_with_drafts(overlap: bool) -> None:
    """Verification of several tokens a sequence, ragged among others."""
    drafter = Speculator(NgramSource(1, 3), 7, adaptive=False)
    engine = make_engine(drafter=drafter, overlap_steps=overlap)
    assert run(engine) == alone()
    assert engine.stats().num_draft_tokens > 20


def test_bits_with_heads() -> None:
    """Hidden states of the sampled rows come back with each step."""
    rng = np.random.default_rng(4)
    block = (rng.standard_normal((64, 64), np.float32) / 8, np.zeros(64, np.float32))
    heads = [rng.standard_normal((VOCAB, 64), np.float32) for _ in range(2)]
    drafter = Speculator(MedusaSource(MedusaHeads([[block], [block]], heads)), 2, adaptive=False)
    engine = make_engine(drafter=drafter)
    assert run(engine) == alone()
    assert engine.stats().num_draft_tokens > 20


class Uneven(Drafter):
    """Every sequence has another number of drafts, of which some are right."""

    def __init__(self, answers: dict[str, Any], states: Any = None) -> None:
        self.answers, self.states, self.num_states = answers, states, 0

    def propose(self, sequence: Any) -> list[int]:
        answer = self.answers[sequence.key[0]][0][0]
        drafts = list(answer[sequence.num_output_tokens :][: ord(sequence.key[0]) % 3 + 1])
        return [*drafts[:-1], (drafts[-1] + sequence.num_tokens % 2) % VOCAB] if drafts else []

    def end_step(self, schedule: Any, output: Any, seconds: float) -> None:
        if self.states:
            count = len(schedule.row_sequences) if self.states == "rows" else schedule.num_tokens
            assert output.states.shape == (count, SPEC.hidden_size)
            self.num_states += count


@pytest.mark.parametrize("states", [None, "rows", "tokens"])
def test_steps_with_different_numbers_of_drafts_are_recorded(states: Any) -> None:
    """Padded to one shape, with the bits of steps that are not; heads' states come with them."""
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=40, ignore_eos=True)
    prompts = {name: prompt_of(20 + 7 * i, i) for i, name in enumerate("abcd")}

    def answers(drafter: Drafter | None, **options: Any) -> tuple[dict[str, Any], Engine]:
        engine = make_engine(drafter=drafter, overlap_steps=False, **options)
        for name, prompt in prompts.items():
            engine.add_request(name, prompt, params)
        return facts(run_to_end(engine)), engine

    expected, _ = answers(None, graphs=False)
    drafter = Uneven(expected, states)
    found, engine = answers(drafter)
    assert found == expected
    shapes = [record[5] for record in engine.events if record[1] == "step"]
    assert len(set(shapes)) > 4 and engine.stats().num_accepted_tokens > 20
    counts = engine.runtime.counts()  # type: ignore[attr-defined]
    assert counts["replayed"] > 0.6 * len(shapes) and counts["recorded"] < 9
    assert states is None or drafter.num_states > 100


@pytest.mark.parametrize("method", ["ngram", "medusa"])
def test_bits_with_trees(method: str) -> None:
    rng = np.random.default_rng(4)
    block = (rng.standard_normal((64, 64), np.float32) / 8, np.zeros(64, np.float32))
    heads = [rng.standard_normal((VOCAB, 64), np.float32) for _ in range(2)]
    source = {
        "ngram": NgramSource(1, 3),
        "medusa": MedusaSource(MedusaHeads([[block], [block]], heads)),
    }[method]
    drafter = Speculator(source, 4, adaptive=False, num_branches=3)
    engine = make_engine(drafter=drafter, num_spare_seqs=8)
    assert run(engine) == alone()
    assert engine.stats().num_draft_branches > 5


def test_steps_with_drafts_are_recorded() -> None:
    """A token and seven drafts, the most that a recorded step has, are replayed with their bits."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]
    found, counts = [], []
    for drafter in (None, Speculator(NgramSource(1, 3), 7, adaptive=False)):
        engine = make_engine(drafter=drafter, overlap_steps=False)
        engine.add_request("a", prompt, params)
        found.append(facts(run_to_end(engine)))
        num_drafted = sum(record[5] == 8 for record in engine.events if record[1] == "step")
        counts.append((engine.runtime.counts(), num_drafted))  # type: ignore[attr-defined]
    assert found[0] == found[1]
    (drafted, num_steps) = counts[1]
    assert num_steps > 5
    assert drafted["replayed"] >= num_steps - drafted["recorded"] > 0
