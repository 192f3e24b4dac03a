"""The table of adapters, and requests of several adapters in one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_helpers import fake_adapter, fake_engine
from fake_runtime import FakeRuntime

from octavo.engine.adapters import NO_ADAPTER, AdapterTable
from octavo.engine.block_pool import IntegrityError
from octavo.engine.engine import Engine
from octavo.errors import (
    AdapterNotFoundError,
    AdaptersInUseError,
    InvalidArgumentError,
    QueueFullError,
    WeightsError,
)
from octavo.sampling_params import SamplingParams

PROMPT = tuple(range(10, 23))


def engine_with(*names: str, **options: Any) -> Engine:
    settings = {"max_adapters": 2, "read_adapter": fake_adapter, **options}
    engine = fake_engine(eos=(), **settings)
    for name in names:
        engine.adapters.add(name, Path(f"/adapters/{name[1:]}"))
    return engine


def run(engine: Engine, *adapters: str | None, prompt: Any = PROMPT) -> list[tuple[int, ...]]:
    """The answers to one prompt with each of the adapters, computed together."""
    for index, adapter in enumerate(adapters):
        params = SamplingParams(max_tokens=9, temperature=0)
        engine.add_request(f"{index} {adapter}", prompt, params, adapter=adapter)
    answers: dict[str, tuple[int, ...]] = {}
    while engine.has_unfinished_requests:
        for chunk in engine.step():
            if chunk.result is not None:
                answers[chunk.request_id] = chunk.result.outputs[0].token_ids
        engine.check_integrity()
    return [answers[f"{index} {adapter}"] for index, adapter in enumerate(adapters)]


def runtime_of(engine: Engine) -> FakeRuntime:
    assert isinstance(engine.runtime, FakeRuntime)
    return engine.runtime


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_of_several_adapters_share_steps(overlap: bool) -> None:
    """Each answer is that of its adapter alone, also where the same prompt is in the cache."""
    alone = {name: run(engine_with("a7", "b8"), name)[0] for name in (None, "a7", "b8")}
    assert len(set(alone.values())) == 3
    engine = engine_with("a7", "b8", overlap_steps=overlap)
    order = (None, "a7", "b8", "a7", None)
    for _ in range(2):  # the second time, all prompts are in the cache
        assert run(engine, *order) == [alone[name] for name in order]
    assert engine.scheduler.prefix_cache.num_hits > 3 * 8
    mixed = [batch for batch in runtime_of(engine).batches if batch.adapter_ids is not None]
    assert any(set(batch.adapter_ids.tolist()) == {-1, 0, 1} for batch in mixed)
    run(engine, None, None)
    assert runtime_of(engine).batches[-1].adapter_ids is None


def test_an_adapter_of_the_same_name_finds_no_keys_of_the_old_one() -> None:
    engine = engine_with("a7")
    old = run(engine, "a7")[0]
    engine.adapters.remove("a7")
    engine.adapters.add("a7", Path("9"))
    hits = engine.scheduler.prefix_cache.num_hits
    new = run(engine, "a7")[0]
    assert new != old and engine.scheduler.prefix_cache.num_hits == hits


def test_the_adapter_used_longest_ago_makes_room() -> None:
    engine = engine_with("a1", "b2")
    run(engine, "a1")
    engine.adapters.add("c3", Path("3"))  # b2 has never been used
    assert sorted(runtime_of(engine).adapters.values()) == [1, 3]
    assert list(engine.adapters.paths) == ["a1", "b2", "c3"]
    run(engine, "c3")
    run(engine, "a1")
    run(engine, "b2")  # read again, in the place of c3
    assert sorted(runtime_of(engine).adapters.values()) == [1, 2]
    assert runtime_of(engine).loads == [1, 2, 3, 2]


def test_an_adapter_in_use_is_not_evicted() -> None:
    engine = engine_with("a1", "b2", "c3")
    params = SamplingParams(max_tokens=5)
    for name in ("a1", "b2"):
        engine.add_request(name, PROMPT, params, adapter=name)
    engine.step()
    for add in (
        lambda: engine.add_request("c", PROMPT, params, adapter="c3"),
        lambda: engine.adapters.add("d4", Path("4")),
    ):
        with pytest.raises(AdaptersInUseError, match="all 2 places for adapters"):
            add()
    engine.abort("a1")
    engine.add_request("c", PROMPT, params, adapter="c3")
    assert sorted(runtime_of(engine).adapters.values()) == [2, 3]
    while engine.has_unfinished_requests:
        engine.step()


def test_a_removed_adapter_serves_its_requests_to_the_end() -> None:
    engine, expected = engine_with("a7"), run(engine_with("a7"), "a7")[0]
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=9, temperature=0), adapter="a7")
    engine.step()
    engine.adapters.remove("a7")
    assert engine.adapters.paths == {} and runtime_of(engine).adapters == {0: 7}
    with pytest.raises(AdapterNotFoundError, match="'a7' is not loaded: there are none"):
        engine.add_request("s", PROMPT, SamplingParams(), adapter="a7")
    chunks = []
    while engine.has_unfinished_requests:
        chunks += engine.step()
    assert chunks[-1].result is not None
    assert chunks[-1].result.outputs[0].token_ids == expected
    assert runtime_of(engine).adapters == {}


def test_refused() -> None:
    engine = engine_with("a7", max_waiting_requests=1, max_num_seqs=1)
    with pytest.raises(AdapterNotFoundError, match="'b' is not loaded: expected one of a7"):
        engine.add_request("r", PROMPT, SamplingParams(), adapter="b")
    with pytest.raises(AdapterNotFoundError):
        engine.adapters.remove("b")
    for name, message in (("a7", "taken"), ("", "empty")):
        with pytest.raises(InvalidArgumentError, match=message):
            engine.adapters.add(name, Path("3"))
    with pytest.raises(WeightsError, match="is damaged"):
        engine.adapters.add("c", Path("x"))
    assert list(engine.adapters.paths) == ["a7"]
    for index in range(2):  # a request that is refused gives its adapter back
        for name in ("runs", "waits"):
            engine.add_request(name, PROMPT, SamplingParams(max_tokens=1), adapter="a7")
        with pytest.raises(QueueFullError):
            engine.add_request("x", PROMPT, SamplingParams(), adapter="a7")
        while engine.has_unfinished_requests:
            engine.step()
        engine.adapters.remove("a7")
        assert runtime_of(engine).adapters == {}
        engine.adapters.add("a7", Path(str(index)))
    none = fake_engine(max_adapters=2)
    with pytest.raises(InvalidArgumentError, match="has to be loaded from its files"):
        none.adapters.add("a", Path("3"))


def test_a_failed_step_gives_the_adapter_back() -> None:
    engine = engine_with("a7")
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=4), adapter="a7")
    runtime_of(engine).fail_wait = RuntimeError("lost")
    with pytest.raises(RuntimeError, match="lost"):
        engine.step()
    for name in engine.failed_request_ids:
        engine.abort(name)
    engine.adapters.remove("a7")
    assert runtime_of(engine).adapters == {}


def test_a_loan_is_given_back_once() -> None:
    engine = engine_with("a7")
    table: AdapterTable = engine.adapters
    assert table.acquire(None) == NO_ADAPTER
    table.release(NO_ADAPTER)
    loan = table.acquire("a7")
    table.release(loan)
    with pytest.raises(IntegrityError, match="given back twice"):
        table.release(loan)
