"""One LLM, many threads: an error reaches whom it belongs to, and the others go on."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_helpers import check_answers, fake_engine
from octavo.engine.outputs import RequestOutput
from octavo.errors import EngineInUseError, QueueFullError
from octavo.llm import LLM
from thread_helpers import (
    DEEDS,
    Gate,
    ask_for_some,
    greedy,
    in_thread,
    is_clean,
    restless_threads,
    runtime_of,
    until,
)
from weights_helpers import tiny_config, write_model

DAEMONS = """
import atexit, sys, threading, time
from octavo import LLM, SamplingParams
llm = LLM(sys.argv[1], num_threads=2)
params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

def ask():
    while True:
        llm.generate([[1, 2], [3]], params, progress=False)

def read():
    while True:
        for _ in llm.stream([1, 2], params):
            pass

def last_words():
    answer = llm.generate([1], params, progress=False)[0].outputs[0]
    print(len(answer.token_ids), flush=True)

atexit.register(last_words)
for function in (ask, read, ask):
    threading.Thread(target=function, daemon=True).start()
time.sleep(float(sys.argv[2]))
"""


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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGALRM")
@pytest.mark.parametrize("where", ["submit", "wait"])
def test_a_time_limit_ends_the_main_threads_call_alone_and_between_steps(
    llm: LLM, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TimeIsUpError(Exception):
        pass

    def end(_number: int, _frame: Any) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, end)
    runtime, main = runtime_of(llm), threading.current_thread()
    plain = getattr(runtime, where)
    is_rung = False

    def ring(*args: Any, **options: Any) -> Any:
        nonlocal is_rung
        result = plain(*args, **options)
        if threading.current_thread() is main and not is_rung:
            is_rung = True
            signal.raise_signal(signal.SIGALRM)
        return result

    monkeypatch.setattr(runtime, where, ring)
    try:
        for seed in range(20):
            waits = [in_thread(lambda seed=seed: ask_for_some(llm, seed)) for _ in range(2)]
            is_rung = False
            try:
                llm.generate([[3], [4]], greedy(46), progress=False)
                assert not is_rung
            except TimeIsUpError:
                assert is_rung
            for wait in waits:
                wait()
            assert signal.getsignal(signal.SIGALRM) is end
        with pytest.raises(TimeIsUpError):
            is_rung = False
            llm.generate([[3], [4]], greedy(46), progress=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_clean(llm)


@pytest.mark.parametrize("seconds", ["0.05", "0.2"])
def test_a_program_ends_in_order_while_daemon_threads_ask(tmp_path: Path, seconds: str) -> None:
    write_model(tmp_path, tiny_config(max_position_embeddings=256))
    words = [sys.executable, "-c", DAEMONS, str(tmp_path), seconds]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "200\n"), found.stderr
    assert "Traceback" not in found.stderr and "terminate" not in found.stderr
