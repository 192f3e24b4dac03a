"""One LLM and many threads: a time limit of the main thread, and the end of the program."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import fake_engine
from thread_helpers import ask_for_some, greedy, in_thread, is_clean, restless_threads, runtime_of
from weights_helpers import tiny_config, write_model

from octavo.llm import LLM

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
