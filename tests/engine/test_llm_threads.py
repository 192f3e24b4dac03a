"""One LLM, many threads: right answers, each error where it belongs, nobody waits for ever."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import check_answers, fake_adapter, fake_engine, solo_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_helpers import (
    DEEDS,
    SECONDS,
    Gate,
    ask_for_some,
    greedy,
    in_thread,
    is_clean,
    restless_threads,
    run_threads,
    runtime_of,
    until,
)

from octavo.engine.outputs import RequestOutput
from octavo.engine.request import derive_seed
from octavo.errors import (
    EngineInUseError,
    InvalidArgumentError,
    QueueFullError,
    WrongProcessError,
)
from octavo.llm import LLM
from octavo.models.adapter import Adapter
from octavo.prompts import LoRARequest
from octavo.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    with restless_threads():
        yield


@pytest.fixture
def llm() -> LLM:
    return LLM.from_engine(fake_engine())


@pytest.fixture
def gate(llm: LLM) -> Iterator[Gate]:
    gate = Gate(llm)
    yield gate
    gate.open()


@pytest.mark.parametrize("overlap", [False, True])
def test_everything_at_once(overlap: bool) -> None:
    llm = LLM.from_engine(fake_engine(num_blocks=15, overlap_steps=overlap))
    frequent, before = (37, 3, 3), gc.get_threshold()
    gc.set_threshold(*frequent)
    try:
        run_threads(
            llm, [[((t + i) % len(DEEDS), 31 * t + i) for i in range(14)] for t in range(16)]
        )
    finally:
        gc.set_threshold(*before)
    assert is_clean(llm)
    # They have shared steps: alone, one by one, these took many more.
    assert max(len(batch.context_lens) for batch in runtime_of(llm).batches) == 5


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, len(DEEDS) - 1), st.integers(0, 500)), max_size=4),
        min_size=2,
        max_size=6,
    )
)
def test_any_plans(plans: list[list[tuple[int, int]]]) -> None:
    llm = LLM.from_engine(fake_engine(num_blocks=20))
    run_threads(llm, plans)
    assert is_clean(llm)


# ---- who waits for whom ----


def test_a_thread_that_has_its_answer_leaves_and_another_goes_on(llm: LLM, gate: Gate) -> None:
    # The first leads; its answer is short. The second then has to step for itself.
    first = in_thread(lambda: llm.generate([1], greedy(2), progress=False))
    gate.await_step()
    second = in_thread(lambda: llm.generate([2], greedy(30), progress=False))
    until(lambda: len(llm._shared._waiting) == 2)
    gate.open()
    check_answers(first()[0], greedy(2))
    check_answers(second()[0], greedy(30))
    assert llm.engine.num_steps < 33  # they ran side by side
    assert is_clean(llm)


def test_an_idle_iterator_holds_nobody_up(llm: LLM) -> None:
    idle = [llm.stream([i], greedy(20)) for i in range(3)]
    for stream in idle:
        next(stream)
    check_answers(in_thread(lambda: llm.generate([9], greedy(9), progress=False))()[0], greedy(9))
    for i, stream in enumerate(idle):
        tokens = solo_answer([i], greedy(20)).token_ids
        assert tuple(t for chunk in stream for t in chunk.token_ids) == tokens[1:]
    assert is_clean(llm)


def test_a_leader_steps_on_while_answers_of_others_come_and_go(llm: LLM) -> None:
    long = in_thread(lambda: llm.generate([[i] for i in range(40)], greedy(40), progress=False))
    for i in range(40):
        output = llm.generate([i, 3], greedy(2), progress=False)[0]
        check_answers(output, greedy(2))
    for output in long():
        check_answers(output, greedy(40))
    assert is_clean(llm)


def test_one_iterator_read_by_many_threads(llm: LLM) -> None:
    results = llm.generate_as_completed((i, [i], greedy(1 + i % 7)) for i in range(60))
    seen: list[tuple[int, RequestOutput]] = []
    readers = [in_thread(lambda: seen.extend(results)) for _ in range(6)]
    for wait in readers:
        wait()
    assert sorted(key for key, _ in seen) == list(range(60))
    for key, output in seen:
        assert output.prompt_token_ids == (key,)
        check_answers(output, greedy(1 + key % 7))
    assert is_clean(llm)


def test_closing_an_iterator_that_another_thread_reads(llm: LLM, gate: Gate) -> None:
    stream = llm.stream([1], greedy(40))
    completed = llm.generate_as_completed([(0, [2], greedy(40))])
    leader = in_thread(lambda: list(stream))
    gate.await_step()
    follower = in_thread(lambda: list(completed))
    until(lambda: len(llm._shared._waiting) == 2)
    completed.close()
    assert follower() == []  # at once: no step has ended
    stream.close()
    gate.open()
    assert leader() == [] and is_clean(llm)
    assert list(stream) == [] and list(completed) == []


def test_closing_does_not_wait_for_a_step(llm: LLM, gate: Gate) -> None:
    gate.open()
    stream = llm.stream([1], greedy(40))
    next(stream)
    held = Gate(llm)
    other = in_thread(lambda: llm.generate([2], greedy(3), progress=False))
    held.await_step()
    stream.close()
    held.open()
    check_answers(other()[0], greedy(3))
    assert is_clean(llm)


def test_an_iterator_whose_source_asks_or_closes(llm: LLM) -> None:
    def asking() -> Iterator[tuple[int, list[int], SamplingParams]]:
        for i in range(5):
            output = llm.generate([i], greedy(3), progress=False)[0]
            yield i, [i, *output.outputs[0].token_ids], greedy(4)

    for _, output in llm.generate_as_completed(asking()):
        check_answers(output, greedy(4))

    def closing() -> Iterator[tuple[int, list[int], SamplingParams]]:
        completed.close()
        yield 0, [1], greedy(9)

    completed = llm.generate_as_completed(closing())
    assert list(completed) == [] and is_clean(llm)


def test_between_steps(llm: LLM, tmp_path: Path) -> None:
    writer = in_thread(
        lambda: [
            llm.between_steps(lambda e: (e.check_integrity(), e.events.write(tmp_path / "log")))
            for _ in range(30)
        ]
    )
    run_threads(llm, [[(0, t), (1, t), (3, t)] for t in range(4)])
    writer()
    assert llm.engine.stats().num_running == 0
    with pytest.raises(KeyError):
        llm.between_steps(lambda _: {}["what"])
    with pytest.raises(EngineInUseError, match="in the midst of a step"):
        llm.between_steps(lambda _: llm.generate([1], progress=False))
    assert is_clean(llm)


def test_threads_that_bring_the_same_adapter_share_it() -> None:
    def read(path: Path) -> Adapter:
        time.sleep(0.05)  # in which all others ask for it
        return fake_adapter(path)

    llm = LLM.from_engine(fake_engine(max_adapters=2, read_adapter=read))
    start = threading.Barrier(4)

    def ask() -> RequestOutput:
        start.wait(SECONDS)
        request = LoRARequest("a", 1, "/adapters/7")
        return llm.generate([1, 2], greedy(5), progress=False, lora_request=request)[0]

    outputs = [wait() for wait in [in_thread(ask) for _ in range(4)]]
    assert len({output.outputs for output in outputs}) == 1
    assert outputs[0].outputs != llm.generate([1, 2], greedy(5), progress=False)[0].outputs
    assert len(runtime_of(llm).loads) == 1
    with pytest.raises(InvalidArgumentError, match="/7, not /adapters/8; expected a name of its"):
        llm.generate([1], progress=False, lora_request=LoRARequest("a", 1, "/adapters/8"))
    assert is_clean(llm)


# ---- seeds ----


def test_numbers_of_one_call_follow_each_other_whoever_asks_beside() -> None:
    llm = LLM.from_engine(fake_engine(num_blocks=400))
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    def ask(count: int) -> list[RequestOutput]:
        return llm.generate([[i] for i in range(count)], params, progress=False)

    counts = [1 + i % 7 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(ask, counts))
    numbers = [[int(output.request_id) for output in each] for each in outputs]
    assert sorted(n for each in numbers for n in each) == list(range(sum(counts)))
    for each, own in zip(outputs, numbers, strict=True):
        assert own == list(range(own[0], own[0] + len(own)))
        for output in each:
            seed = derive_seed(3, output.request_id)
            check_answers(output, SamplingParams(max_tokens=6, ignore_eos=True, seed=seed))


def test_one_progress_bar_at_a_time(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    gate = Gate(llm)
    first = in_thread(lambda: llm.generate([[1]], greedy(9)))
    gate.await_step()
    second = in_thread(lambda: llm.generate([[1], [2]], greedy(9)))
    until(lambda: len(llm._shared._waiting) == 2)
    gate.open()
    first(), second()
    shown = capsys.readouterr().err
    assert "1/1" in shown and "2/2" not in shown


# ---- errors reach whom they belong to, and the others go on ----


def test_an_error_of_a_step_is_raised_in_all_calls_that_were_in_it(llm: LLM, gate: Gate) -> None:
    idle = llm.stream([5], greedy(20))
    first = in_thread(lambda: next(idle))
    gate.await_step()
    calls = [
        in_thread(lambda i=i: llm.generate([i], greedy(9), progress=False))  # type: ignore[misc]
        for i in range(8)
    ]
    until(lambda: len(llm._shared._waiting) == 9)
    runtime_of(llm).fail_next = MemoryError("no more")  # in the next one: 5 fit into a step
    gate.open()
    first()
    ends = [caught(wait) for wait in calls]
    failed = [end for end in ends if isinstance(end, MemoryError)]
    assert len(failed) == 4 and all(str(error) == "no more" for error in failed)
    assert len({id(error) for error in failed}) == 4
    for end in ends:
        if not isinstance(end, Exception):
            check_answers(end[0], greedy(9))
    with pytest.raises(MemoryError, match="no more"):
        list(idle)
    assert list(idle) == [] and is_clean(llm)


def caught(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return error


def test_who_asks_too_much_is_told_alone() -> None:
    llm = LLM.from_engine(fake_engine(max_waiting_requests=3))
    gate = Gate(llm)
    small = in_thread(lambda: llm.generate([1], greedy(9), progress=False))
    gate.await_step()
    large = in_thread(lambda: llm.generate([[i] for i in range(9)], greedy(9), progress=False))
    until(lambda: len(llm._shared._waiting) == 2)
    gate.open()
    check_answers(small()[0], greedy(9))
    with pytest.raises(QueueFullError):
        large()
    assert is_clean(llm)


def test_steps_that_fail_now_and_then() -> None:
    llm = LLM.from_engine(fake_engine())
    runtime, done = runtime_of(llm), threading.Event()

    def spoil() -> None:
        while not done.wait(0.003):
            runtime.fail_wait = RuntimeError("a device")

    def work(number: int) -> int:
        failures = 0
        for i in range(25):
            try:
                DEEDS[(number + i) % 4](llm, number + i)
            except RuntimeError as error:
                assert str(error) == "a device"
                failures += 1
        return failures

    spoiler = in_thread(spoil)
    waits = [in_thread(lambda n=n: work(n)) for n in range(8)]  # type: ignore[misc]
    assert sum(wait() for wait in waits) > 0
    done.set()
    spoiler()
    runtime.fail_wait = None
    gc.collect()
    assert is_clean(llm)
    ask_for_some(llm, 3)


def test_requests_that_somebody_else_takes_away(llm: LLM, gate: Gate) -> None:
    waits = [in_thread(lambda: llm.generate([1], greedy(9), progress=False)) for _ in range(2)]
    gate.await_step()
    until(lambda: len(llm._shared._waiting) == 2)
    with pytest.raises(EngineInUseError, match="two threads at a time"):
        llm.engine.abort("0")
    with pytest.raises(EngineInUseError):
        llm.engine.step()
    llm._shared.do(lambda: [llm.engine.abort(i) for i in ("0", "1")] and None)
    gate.open()
    for wait in waits:
        with pytest.raises(EngineInUseError, match="vanished"):
            wait()


@pytest.mark.parametrize("leads", [True, False])
def test_an_interrupt_ends_the_main_threads_call_alone(llm: LLM, leads: bool) -> None:
    gate = Gate(llm)

    def ask() -> list[RequestOutput]:
        return llm.generate([[1], [2]], greedy(20), progress=False)

    def others() -> list[Any]:
        if leads:
            gate.await_step()
        waits = [in_thread(ask) for _ in range(3)]
        return waits

    starter = in_thread(others)
    if not leads:
        starter()
        gate.await_step()

    def interrupt() -> None:
        until(lambda: len(llm._shared._waiting) == 4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        gate.open()

    interrupter = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[3], [4]], greedy(46), progress=False)
    interrupter()
    for wait in starter():
        for output in wait():
            check_answers(output, greedy(20))
    assert is_clean(llm)
    assert llm.engine.num_steps < 45  # nobody has computed the interrupted call to its end


# ---- another process ----


def test_an_llm_is_not_pickled_but_errors_are(llm: LLM) -> None:
    with pytest.raises(
        WrongProcessError, match=rf"process {os.getpid()}, and it cannot be pickled"
    ):
        pickle.dumps(llm)
    for error in (WrongProcessError(3, 4), QueueFullError(3, 70, 3, None, 12)):
        again = pickle.loads(pickle.dumps(error))  # as out of a pool of processes
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
