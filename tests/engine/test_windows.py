"""Layers that see a window: their memory is bounded, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engine_helpers import check_answers, fake_engine, run_to_end
from fake_runtime import FakeRuntime
from invariance_helpers import (
    MODES,
    SPEC,
    SYSTEM,
    WINDOWED,
    alone,
    crowd,
    facts,
    make_engine,
    others,
    prompt_of,
    run,
    run_preempted,
    subjects,
)

from octavo.engine.block_manager import BlockManager
from octavo.engine.engine import Engine
from octavo.models.kv_groups import KvGroups, with_kv_groups
from octavo.models.spec import ModelSpec
from octavo.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=9)
LONG = [(7 * i * i + i) % 90 for i in range(90)]
Windows = tuple[int, ...]


def spec_of(*windows: int, positions: int = 4096) -> ModelSpec:
    layers = tuple(replace(SPEC.layers[0], window=window) for window in windows)
    return replace(SPEC, layers=layers, max_position_embeddings=positions)


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((512,) * 3, (0, 0, 0)),
        ((512, 0) * 3, (1, 0) * 3),
        ((512, 512, 0) * 2, (1, 1, 0, 2, 2, 0)),
        ((4096, 0, 9999), (0, 0, 0)),  # no sequence is longer than these windows
        ((512, 512, 512, 0), (1, 2, 3, 0)),  # a group of three would waste two layers of another
        ((512, 0, 100), (1, 0, 2)),
    ],
)
def test_groups_are_of_equal_size(windows: Windows, groups: Windows) -> None:
    found = with_kv_groups(spec_of(*windows))
    assert tuple(layer.kv_group for layer in found.layers) == groups


def test_groups_of_real_models() -> None:
    def sizes(windows: Windows, positions: int) -> list[int]:
        found = with_kv_groups(spec_of(*windows, positions=positions))
        groups = [layer.kv_group for layer in found.layers]
        return [groups.count(group) for group in range(max(groups) + 1)]

    six = (512,) * 5 + (0,)
    assert sizes((six * 5)[:26], 32768) == [4, 4, 4, 4, 4, 4, 2]  # Gemma 3 1B
    assert sizes(((1024,) * 5 + (0,)) * 10 + (1024, 1024), 131072) == [10, 10, 10, 10, 10, 10, 2]
    assert sizes((4096, 0) * 13, 8192) == [13, 13]  # Gemma 2 2B
    assert sizes((4096,) * 32, 32768) == [32]  # Mistral 7B v0.1
    assert len(sizes((64,) * 40 + (0,), 8192)) <= 8
    short = with_kv_groups(spec_of(512, 0), 400)
    assert short.kv_windows == (0,) and with_kv_groups(spec_of(512, 0), 513).kv_windows == (0, 512)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 15])
@pytest.mark.parametrize("window", [1, 6, 13])
def test_memory_is_bounded_by_the_window(window: int, chunk: int, overlap: bool) -> None:
    """And a cache of just that size is enough; one of a block less is not, and says so."""
    most = -(-(window + chunk * (1 + overlap) - 1) // 4) + 1
    options = {
        "max_num_batched_tokens": chunk,
        "overlap_steps": overlap,
        "max_model_len": 200,
        "enable_prefix_caching": False,
    }
    engine = fake_engine(25 + most, (0, window), **options)
    engine.add_request("long", LONG, PARAMS)
    while engine.has_unfinished_requests:
        for output in [chunk.result for chunk in engine.step() if chunk.result]:
            check_answers(output, PARAMS, 200)
            assert output.metrics.num_preemptions == 0
        engine.check_integrity()
    assert isinstance(engine.runtime, FakeRuntime)
    held = max(int((batch.block_tables[1] >= 0).sum()) for batch in engine.runtime.batches)
    assert most - 1 <= held <= most  # one less where no chunk begins at the worst place
    with pytest.raises(Exception, match="99 tokens; the whole KV cache holds 96"):
        fake_engine(24 + most, (0, window), **options).add_request("long", LONG, PARAMS)


def test_two_long_prompts_in_a_cache_for_little_more_than_one() -> None:
    """The second waits or is preempted while it is prefilled; both come to their ends."""
    for num_blocks in range(56, 70):
        engine = fake_engine(
            num_blocks, (0, 6, 3), max_model_len=200, max_num_batched_tokens=7, max_num_seqs=4
        )
        for i in range(4):
            engine.add_request(f"{i}", [i, *LONG[: 90 - 11 * i]], PARAMS)
        for output in run_to_end(engine).values():
            check_answers(output, PARAMS, 200)
        assert engine.blocks.num_free_blocks == num_blocks


def hits(engine: Engine, *prompts: list[int]) -> list[int]:
    found = []
    for index, prompt in enumerate(prompts):
        name = f"{index}{len(prompt)}"
        engine.add_request(name, prompt, PARAMS)
        output = run_to_end(engine)[name]
        check_answers(output, PARAMS, 200)
        found.append(output.metrics.num_cached_tokens)
    return found


def test_a_beginning_is_used_again_although_most_of_its_window_is_gone() -> None:
    engine = fake_engine(40, (0, 6), max_model_len=200, max_num_batched_tokens=16)
    other = [(3 * i) % 90 + 1 for i in range(30)]
    # The long prompt holds 25 blocks in the first group; 15 are left, and soon taken by others.
    assert hits(engine, LONG, [*LONG[:80], 5], LONG, LONG[:88]) == [0, 80, 88, 87]
    assert hits(engine, other, [*LONG[:48], 1]) == [0, 0]


def test_answers_of_one_request_share_the_window_of_their_prompt() -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=6, ignore_eos=True)
    for caching in (True, False):
        for length in range(80, 90):
            engine = fake_engine(
                80,
                (0, 6),
                max_model_len=200,
                max_num_batched_tokens=32,
                enable_prefix_caching=caching,
            )
            engine.add_request("four", LONG[:length], params)
            check_answers(run_to_end(engine)["four"], params, 200)
            assert isinstance(engine.runtime, FakeRuntime)
            assert engine.runtime.num_tokens_computed == length + 3 + 4 * 5


_first_seen, _advance = KvGroups.first_seen, BlockManager.advance
PLANTED: dict[str, tuple[str, Callable[..., Any]]] = {
    "a window two too narrow": (
        "octavo.models.kv_groups.KvGroups.first_seen",
        lambda groups, window, position: _first_seen(groups, max(window - 2, 0), position),
    ),
    "blocks go that the next token sees": (
        "octavo.engine.block_manager.BlockManager.advance",
        lambda blocks, key, num_tokens: _advance(blocks, key, num_tokens + 2),
    ),
    "names of one group lead to blocks of another": (
        "octavo.engine.block_pool.BlockPool.find_leading",
        lambda pool, names, group=0: [
            block for name in names if (block := pool.find(name, 0)) is not None
        ],
    ),
    "copies go to another group": (
        "fake_runtime.FakeRuntime.copy_blocks",
        lambda runtime, group, pairs: None,
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found_by_the_answers(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine(40, (0, 5), max_num_seqs=7, max_num_batched_tokens=23)
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    monkeypatch.setattr(*PLANTED[error])
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        crowd(engine)


# ---- with real arithmetic ----

ALL_WINDOWED = with_kv_groups(spec_of(37, 37, positions=1024))
every_spec = pytest.mark.parametrize("spec", [WINDOWED, ALL_WINDOWED], ids=["mixed", "all"])
every_dtype = pytest.mark.parametrize("dtype", ["f32", "bf16"])


@every_spec
@every_dtype
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_same_bits(dtype: str, chunk: int, spec: ModelSpec) -> None:
    engine = make_engine(dtype, max_num_batched_tokens=chunk, spec=spec)
    assert facts(run(engine, subjects(MODES["sampled"]), apart=True)) == alone(
        dtype, "sampled", spec=spec
    )


@every_spec
@every_dtype
def test_company_gives_the_same_bits(dtype: str, spec: ModelSpec) -> None:
    requests = {**others(), **subjects(MODES["sampled"])}
    for tokens in (29, 512):
        engine = make_engine(dtype, max_num_batched_tokens=tokens, num_blocks=300, spec=spec)
        assert facts(run(engine, requests)) == alone(dtype, "sampled", spec=spec)
        engine.check_integrity()


@every_spec
@pytest.mark.parametrize("caching", [True, False])
def test_preemption_gives_the_same_bits(spec: ModelSpec, caching: bool) -> None:
    """An urgent request takes the only place while the prompt is computed, and in the answer."""
    name = "subject301"
    engine = make_engine(
        num_blocks=KvGroups(16, spec.kv_windows, 48).blocks_in_all(512),
        max_num_seqs=1,
        max_num_batched_tokens=48,
        enable_prefix_caching=caching,
        spec=spec,
    )
    outputs = run_preempted(engine, name, subjects(MODES["sampled"])[name], (4, 9, 3))
    assert outputs[name].metrics.num_preemptions == 3
    assert facts(outputs)[name] == alone("f32", "sampled", spec=spec)[name]


@every_spec
@every_dtype
def test_hits_give_the_bits_of_misses(dtype: str, spec: ModelSpec) -> None:
    engine = make_engine(dtype, max_num_batched_tokens=64, spec=spec)
    prompt, params = prompt_of(301, seed=301), MODES["sampled"]
    for kept in (301, 160, 48):
        run(engine, {"before": ([*prompt[:kept], 7, 7, 7], params)})
        found = run(engine, {"subject301": (prompt, params)})
        assert found["subject301"].metrics.num_cached_tokens >= kept // 16 * 16
        assert facts(found)["subject301"] == alone(dtype, "sampled", spec=spec)["subject301"]
    one = run(engine, {"subject": (SYSTEM * 20, replace(params, n=3))})
    apart = make_engine(dtype, enable_prefix_caching=False, spec=spec)
    assert facts(one) == facts(run(apart, {"subject": (SYSTEM * 20, replace(params, n=3))}))


def test_the_groups_share_the_memory_of_one() -> None:
    """Five layers in groups of two at most: a block has the bytes of two layers."""
    two: Any = make_engine(num_blocks=50, spec=spec_of(0, 0, positions=1024)).runtime
    runtime: Any = make_engine(num_blocks=50, spec=WINDOWED).runtime
    assert [layer.kv_group for layer in WINDOWED.layers] == [1, 0, 1, 2, 0]
    assert runtime.kv_bytes_per_block() == two.kv_bytes_per_block()
    assert runtime.memory()["kv_cache"] == 50 * two.kv_bytes_per_block()
