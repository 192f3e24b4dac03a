"""Threads that share one LLM over the fake runtime: what they do, and ways to hold them up."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engine_helpers import check_answers, solo_answer
from fake_runtime import FakeRuntime

from octavo.engine import shared
from octavo.engine.outputs import RequestOutput
from octavo.engine.request import derive_seed
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

SECONDS = 60.0  # in which everything here ends many times over


@contextlib.contextmanager
def restless_threads() -> Iterator[None]:
    """Let threads take turns far more often than Python does, and let no lost wake-up be mended.

    The safety net of `LOOK_AGAIN_SECONDS` is made so slow that a test would not end.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "LOOK_AGAIN_SECONDS", 1000.0)
        before = sys.getswitchinterval()
        sys.setswitchinterval(2e-5)
        try:
            yield
        finally:
            sys.setswitchinterval(before)


class Gate:
    """Holds every step back until it is opened; says when a step has come to it."""

    def __init__(self, llm: LLM) -> None:
        self._arrived, self._may_pass = threading.Event(), threading.Event()
        self._wait = runtime_of(llm).wait
        runtime_of(llm).wait = self._hold  # type: ignore[method-assign]

    def _hold(self, ticket: int) -> Any:
        self._arrived.set()
        assert self._may_pass.wait(SECONDS)
        return self._wait(ticket)

    def await_step(self) -> None:
        assert self._arrived.wait(SECONDS)

    def open(self) -> None:
        self._may_pass.set()


def runtime_of(llm: LLM) -> FakeRuntime:
    runtime = llm.engine.runtime
    assert isinstance(runtime, FakeRuntime)
    return runtime


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run in a thread of its own; what is returned waits for its result, or raises its error."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return lambda: future.result(SECONDS)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_clean(llm: LLM) -> bool:
    llm.engine.check_integrity()
    pool = llm.engine.blocks
    is_idle = not llm.engine.has_unfinished_requests and not llm._shared.num_open
    return is_idle and not llm._shared._waiting and pool.num_free_blocks == pool.num_blocks


# ---- what a thread may do; each checks what it gets ----


def ask_for_some(llm: LLM, seed: int) -> None:
    prompts = [[seed % 90, i] for i in range(1 + seed % 4)]
    params = [SamplingParams(seed=seed + i, max_tokens=1 + 5 * i % 17) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, progress=False)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        assert list(output.prompt_token_ids) == prompt
        check_answers(output, own)


def read_stream(llm: LLM, seed: int) -> None:
    params = SamplingParams(seed=seed, max_tokens=1 + seed % 13, ignore_eos=True)
    chunks = list(llm.stream([seed % 90, 7], params))
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    assert tokens == solo_answer([seed % 90, 7], params).token_ids
    assert chunks[-1].result is not None
    check_answers(chunks[-1].result, params)


def leave_stream(llm: LLM, seed: int) -> None:
    stream = llm.stream([seed % 90], greedy(30))
    for _ in range(1 + seed % 5):
        next(stream)
    if seed % 2:
        stream.close()
        assert list(stream) == []


def read_as_completed(llm: LLM, seed: int) -> None:
    params = SamplingParams(max_tokens=1 + seed % 9, ignore_eos=True)
    items = ((i, [] if i % 5 == 4 else [i, seed % 90], params) for i in range(12))
    seen: dict[int, RequestOutput] = {}
    for key, output in llm.generate_as_completed(items, max_in_flight=1 + seed % 6):
        seen[key] = output
        if seed % 3 == 0 and len(seen) == 7:
            return
    assert sorted(seen) == list(range(12))
    for key, output in seen.items():
        if key % 5 == 4:
            assert output.error
        else:
            own = SamplingParams(
                max_tokens=1 + seed % 9, ignore_eos=True, seed=derive_seed(3, f"key {key}")
            )
            check_answers(output, own)


def leave_in_a_cycle(llm: LLM, seed: int) -> None:
    """The garbage collector closes it, in whichever thread and wherever that stands."""
    stream = llm.stream([seed % 90, 1], greedy(30))
    next(stream)
    holder: list[Any] = [stream]
    holder.append(holder)


DEEDS = (ask_for_some, read_stream, leave_stream, read_as_completed, leave_in_a_cycle)


def run_threads(llm: LLM, plans: list[list[tuple[int, int]]]) -> None:
    def work(plan: list[tuple[int, int]]) -> None:
        for deed, seed in plan:
            DEEDS[deed](llm, seed)

    for wait in [in_thread(lambda plan=plan: work(plan)) for plan in plans]:  # type: ignore[misc]
        wait()
    gc.collect()
