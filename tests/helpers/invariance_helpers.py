"""A tiny random model in the native core, and requests to it whose answers must never change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from engine_helpers import check_answers, run_to_end
from reference_helpers import random_weights, uniform

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.models.kv_groups import with_kv_groups
from octavo.models.rope import default_rope
from octavo.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec
from octavo.runtime.loader import LoadedRuntime
from octavo.sampling_params import SamplingParams
from octavo.speculation.draft_model import DraftModelSource

VOCAB = 211
SYSTEM = [(11 * i + i * i) % 96 for i in range(17)]  # four blocks and a token
_NORM = NormSpec(eps=1e-5)
_LAYER = LayerSpec(
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=150,
    norm=_NORM,
    rope=default_rope(5000.0, 16),
    qkv_bias=True,
)
# An MLP of whole steps of 32 inputs goes through the CPU as one op; two threads then have an odd
# number of panels each.
_FUSED = replace(_LAYER, intermediate_size=160)
# Experts: gates and ups of one product, and apart.
_EXPERTS = replace(_LAYER, intermediate_size=64, moe=MoeSpec(5, 2))
_APART = replace(_LAYER, intermediate_size=37, moe=MoeSpec(3, 2, normalize=False))
# What Gemma and Granite, and what OLMo 2 add to a layer.
_CAPPED = replace(
    _LAYER,
    output_norm=_NORM,
    qk_norm="head",
    attention_softcap=1.5,
    residual_multiplier=0.7,
    rope=default_rope(5000.0, 10),
)
_BARE = replace(_FUSED, norm=NormSpec("none"), output_norm=_NORM, qk_norm="row")
_LAYERS = (_LAYER, _EXPERTS, _CAPPED, _FUSED, _APART, _BARE)
SPEC = ModelSpec(
    *("Tiny", VOCAB, 72, 1024, _LAYERS, _NORM),
    tie_word_embeddings=False,
    embed_multiplier=1.3,
    logits_multiplier=1.1,
    logits_softcap=20.0,
)

# Short; odd; over the lengths at which kernels and attention cut their work.
SUBJECT_LENGTHS = (3, 77, 301)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, logprobs=3)
SAMPLED = SamplingParams(
    temperature=0.9, top_k=90, top_p=0.97, min_p=0.001, seed=2**63 + 5, max_tokens=24, logprobs=3
)
MODES = {"greedy": GREEDY, "sampled": SAMPLED}


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens, the last of the vocabulary never among them."""
    return [int(x) for x in (uniform(seed, length) + 1) * np.float32((VOCAB - 1) / 2 - 0.01)]


# The same with layers that see a window. They form three KV groups, the last of them of one layer.
WINDOWED = with_kv_groups(
    replace(SPEC, layers=tuple(replace(_LAYER, window=window) for window in (37, 0, 37, 37, 0)))
)


@cache
def weights(spec: ModelSpec = SPEC) -> dict[str, Any]:
    return random_weights(spec, seed=5)


def make_engine(
    dtype: Any = "f32",
    *,
    kv_dtype: Any = None,
    isa: str = "auto",
    num_threads: int = 1,
    max_num_batched_tokens: int = 512,
    num_blocks: int = 200,
    max_num_seqs: int = 24,
    drafter: Any = None,
    spec: ModelSpec = SPEC,
    **more: Any,
) -> Engine:
    options = RuntimeOptions(
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        block_size=16,
        max_model_len=512,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_threads=num_threads,
        isa=isa,
        **more,
    )
    most = options.max_num_seqs + options.num_spare_seqs  # as the loader makes it
    runtime = _native.Runtime("cpu", spec, replace(options, max_num_seqs=most))
    for name, array in weights(spec).items():
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


def subjects(params: SamplingParams) -> dict[str, tuple[list[int], SamplingParams]]:
    return {f"subject{n}": (prompt_of(n, seed=n), params) for n in SUBJECT_LENGTHS}


def others(count: int = 17) -> dict[str, tuple[list[int], SamplingParams]]:
    """Requests of all lengths, greedy and sampled, that come and go at different times."""
    return {
        f"other{i}": (
            prompt_of(1 + (i * i * 7) % 130, seed=1000 + i),
            SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=5 + 3 * i % 31),
        )
        for i in range(count)
    }


def run(engine: Engine, requests: Any, *, apart: bool = False) -> dict[str, RequestOutput]:
    """Run requests together, or one after the other."""
    outputs = {}
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
        if apart:
            outputs.update(run_to_end(engine))
    return {**outputs, **run_to_end(engine)}


def run_preempted(
    engine: Engine, name: str, request: Any, steps: Iterable[int]
) -> dict[str, RequestOutput]:
    """Run a request that urgent ones push out of its only place, each after so many steps."""
    prompt, params = request
    engine.add_request(name, prompt, params, priority=1)
    outputs: dict[str, RequestOutput] = {}
    for index, num_steps in enumerate(steps):
        for _ in range(num_steps):
            engine.step()
        urgent = SamplingParams(temperature=1.0, seed=index, max_tokens=3)
        engine.add_request(f"urgent{index}", prompt_of(401 - 90 * index, seed=50 + index), urgent)
        while f"urgent{index}" not in outputs:
            outputs.update({c.request_id: c.result for c in engine.step() if c.result})
            engine.check_integrity()
    return {**outputs, **run_to_end(engine)}


def facts(outputs: dict[str, RequestOutput]) -> dict[str, Any]:
    """Everything that must not change, of the subjects."""
    return {
        request_id: [
            (answer.token_ids, answer.finish_reason, answer.logprobs, answer.cumulative_logprob)
            for answer in output.outputs
        ]
        for request_id, output in outputs.items()
        if request_id.startswith("subject")
    }


@cache
def alone(dtype: str, mode: str, isa: str = "auto", spec: ModelSpec = SPEC) -> dict[str, Any]:
    """The subjects, each by itself and its prompt in one piece: what all else must equal."""
    found = facts(run(make_engine(dtype, isa=isa, spec=spec), subjects(MODES[mode]), apart=True))
    assert len(found) == len(SUBJECT_LENGTHS)
    for answers in found.values():
        tokens, reason, logprobs, _ = answers[0]
        assert len(tokens) == 24 and reason == "length"
        assert len(set(tokens)) > 3, "an answer that repeats itself would show little"
        assert all(np.isfinite(entry.logprob) for entry in logprobs)
    return found


def crowd(engine: Engine) -> None:
    """Requests of many beginnings, in two waves; every answer is checked."""
    params = {}
    for wave in range(2):
        for i in range(24):
            n = 3 if i % 7 == 3 else 1
            name = f"{wave}.{i}"
            params[name] = SamplingParams(
                temperature=i % 2, seed=i, max_tokens=4 + i % 9, ignore_eos=True, n=n
            )
            prompt = [*SYSTEM[: 17 - i % 6], *[(i * k) % 7 for k in range(i % 4)]]
            other = [*[(i % 3 + k) % 90 for k in range(8)], *SYSTEM[4:12], i]
            engine.add_request(name, other if i % 4 == 1 else prompt, params[name])
        for output in run_to_end(engine).values():
            check_answers(output, params[output.request_id])


def first_layers(num_layers: int | None, spec: ModelSpec = SPEC) -> DraftModelSource:
    """A draft model: the model itself, or its first layers."""
    layers = spec.layers[:num_layers]
    small = replace(spec, layers=layers)
    options = RuntimeOptions(
        dtype="f32",
        kv_dtype="f32",
        block_size=16,
        max_model_len=512,
        max_num_seqs=7,
        max_num_batched_tokens=64,
        num_threads=1,
    )
    runtime = _native.Runtime("cpu", small, options)
    for name, array in weights(spec).items():
        if not name.startswith("layers.") or int(name.split(".")[1]) < len(layers):
            runtime.load(name, array, "f32")
    runtime.alloc_kv(300)
    return DraftModelSource(LoadedRuntime(runtime, options, 300, "cpu"), small.kv_windows, VOCAB)
