"""The engine's thread: one delivery a step, faults that stay where they belong, health."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import solo_answer
from server_helpers import fake_llm, run, runtime_of, slow_down

from octavo.engine.events import EventLogFile
from octavo.errors import EngineStepError, FileError, InvalidArgumentError, QueueFullError
from octavo.llm import LLM
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server.engine_thread import EngineThread
from octavo.server.stream import EngineRequest, StepStats

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


def request(name: str, params: SamplingParams = SHORT, **fields: Any) -> EngineRequest:
    prompt = EncodedPrompt(None, [3, 1, 4, 1, 5 + len(name)])
    return EngineRequest(name, prompt, params, **fields)


async def started(llm: LLM, **options: Any) -> EngineThread:
    thread = EngineThread(lambda: llm, **options)
    await thread.start()
    return thread


async def num_used(thread: EngineThread) -> int:
    return await thread.call(lambda m: m.engine.blocks.num_blocks - m.engine.blocks.num_free_blocks)


def test_results_are_those_of_the_engine(llm: LLM) -> None:
    async def test() -> None:
        thread = await started(llm)
        streams = [thread.submit(request(f"r{i}")) for i in range(20)]
        for stream in streams:
            result = await stream.wait()
            want = solo_answer(list(stream.request.prompt.token_ids), SHORT, 0, max_model_len=512)
            assert result.outputs[0].token_ids == want.token_ids
        assert thread.num_open == 0 and await num_used(thread) == 0
        await thread.stop()
        assert thread.state == "stopped" and not thread.health().ok

    run(test)


def test_the_loop_is_woken_once_a_step(llm: LLM) -> None:
    """However many streams there are: eight of them, a token each in every step."""
    deliveries: list[StepStats] = []

    async def test() -> None:
        slow_down(llm, 0.002)
        thread = await started(llm, on_step=deliveries.append)
        streams = [thread.submit(request(f"r{i}")) for i in range(8)]
        batches = []
        while chunks := await streams[0].next_chunks():
            batches.append(len(chunks))
        for stream in streams:
            await stream.wait()
        steps = await thread.call(lambda m: m.engine.num_steps)
        assert sum(batches) == 12
        await thread.stop()
        assert steps <= len(deliveries) <= steps + 6
        assert max(stats.engine.num_running for stats in deliveries) == 8

    run(test)


def test_a_reader_that_closes_frees_its_blocks_within_a_step(llm: LLM) -> None:
    async def test() -> None:
        slow_down(llm, 0.01)
        thread = await started(llm)
        stay, leave = thread.submit(request("stay", LONG)), thread.submit(request("leave", LONG))
        await leave.next_chunks()
        steps = await thread.call(lambda m: m.engine.num_steps)
        leave.close()
        # Commands are carried out in order: what comes behind the abort finds it done.
        holders = await thread.call(lambda m: {key[0] for key in m.engine.blocks.holders()})
        assert holders == {"stay"}
        assert await thread.call(lambda m: m.engine.num_steps) - steps <= 4  # one for each call
        leave.close()  # twice does no harm
        assert not stay.has_ended and thread.num_open == 1
        stay.close()
        await thread.wait_until_idle()
        assert await num_used(thread) == 0
        await thread.stop()

    run(test)


def test_a_step_that_fails_fails_those_in_it_and_the_loop_goes_on(llm: LLM) -> None:
    async def test() -> None:
        slow_down(llm, 0.005)
        thread = await started(llm)
        running = [thread.submit(request(f"r{i}", LONG)) for i in range(8)]
        for stream in running:
            await stream.next_chunks()
        waiting = [thread.submit(request(f"w{i}")) for i in range(3)]  # max_num_seqs is 8
        runtime_of(llm).fail_next = RuntimeError("a planted fault")
        for stream in running:
            with pytest.raises(EngineStepError, match="a planted fault"):
                while await stream.next_chunks():
                    pass
        for stream in waiting:
            want = solo_answer(list(stream.request.prompt.token_ids), SHORT, 0, max_model_len=512)
            assert (await stream.wait()).outputs[0].token_ids == want.token_ids
        assert thread.health().ok and await num_used(thread) == 0
        await thread.stop()

    run(test)


def test_a_step_that_always_fails_does_not_hang(llm: LLM) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise RuntimeError("the device is lost")

    async def test() -> None:
        runtime_of(llm).submit = fail  # type: ignore[method-assign]
        thread = await started(llm)
        streams = [thread.submit(request(f"r{i}")) for i in range(20)]
        for stream in streams:
            with pytest.raises(EngineStepError, match="the device is lost"):
                await stream.wait()
        assert await num_used(thread) == 0
        await thread.stop()

    run(test)


def test_a_detokenizer_that_fails_ends_its_request_alone(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    token, calls = tokenizer.token, 0

    def failing(token_id: int) -> str | None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise UnicodeError("a planted fault")
        return token(token_id)

    async def test() -> None:
        thread = await started(llm)
        tokenizer.token = failing  # type: ignore[method-assign]
        results = [
            await stream.wait() for stream in [thread.submit(request(f"r{i}")) for i in range(4)]
        ]
        failed = [result for result in results if result.error is not None]
        assert len(failed) == 1 and "a planted fault" in str(failed[0].error)
        assert failed[0].outputs[0].finish_reason == "error"
        for result in results:
            if result.error is None:
                want = solo_answer(list(result.prompt_token_ids), SHORT, 0, max_model_len=512)
                assert result.outputs[0].token_ids == want.token_ids
        assert await num_used(thread) == 0
        await thread.stop()

    run(test)


def test_an_observer_that_fails_loses_no_chunk(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def observe(chunk: object) -> None:
        raise OverflowError("a planted fault")

    async def test() -> None:
        thread = await started(llm)
        streams = [thread.submit(request(f"r{i}")) for i in range(3)]
        streams[1].observe = observe
        for stream in streams:
            assert len((await stream.wait()).outputs[0].token_ids) == 12
        await thread.stop()

    run(test)
    assert "an observer of r1 failed" in caplog.text


def test_errors_of_adding_come_out_of_the_stream(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_waiting_requests=2, max_num_seqs=1)

    async def test() -> None:
        slow_down(llm, 0.005)
        thread = await started(llm)
        with pytest.raises(InvalidArgumentError, match="stop_token_ids"):
            await thread.submit(request("a", SamplingParams(stop_token_ids=(999,)))).wait()
        first = thread.submit(request("first", LONG))
        await first.next_chunks()
        second, third = thread.submit(request("b")), thread.submit(request("c"))
        with pytest.raises(QueueFullError, match="the queue is full"):
            await thread.submit(request("d")).wait()
        first.close()
        assert (await second.wait()).error is None and (await third.wait()).error is None
        await thread.stop()

    run(test)


def test_a_second_request_of_one_id_leaves_the_first_alone(llm: LLM) -> None:
    async def test() -> None:
        slow_down(llm, 0.005)
        thread = await started(llm)
        streams = []
        for _ in range(2):
            streams.append(thread.submit(request("a", LONG)))
            await streams[-1].next_chunks()
            with pytest.raises(InvalidArgumentError, match="'a' is already running"):
                await thread.submit(request("a")).wait()
            assert thread.open_streams() == streams[-1:]
            if len(streams) == 1:  # closing it frees its blocks, and its id
                streams[0].close()
                assert await num_used(thread) == 0
        await thread.stop()
        with pytest.raises(EngineStepError, match="does not run"):
            await streams[1].wait()

    run(test, seconds=20)


def test_deadlines_in_the_queue_and_under_way(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_num_seqs=1)

    async def test() -> None:
        slow_down(llm, 0.005)
        thread = await started(llm)
        under_way = thread.submit(request("a", LONG, timeout=0.15))
        queued = thread.submit(request("b", LONG, timeout=0.05))
        result = await queued.wait()
        assert result.outputs[0].finish_reason == "timeout" and not result.outputs[0].token_ids
        result = await under_way.wait()
        assert result.outputs[0].finish_reason == "timeout" and result.outputs[0].token_ids
        await thread.stop()

    run(test)


def test_a_loop_that_stops_stepping_is_unhealthy(llm: LLM) -> None:
    async def test() -> None:
        thread = await started(llm, stall_timeout=0.2)
        await asyncio.sleep(0.5)  # idle, and alive all the while
        assert thread.health().ok
        slow_down(llm, 1.0)
        stream = thread.submit(request("a", SamplingParams(max_tokens=1, temperature=0)))
        await asyncio.sleep(0.7)
        health = thread.health()
        assert not health.ok and "no step has ended" in health.reason
        await stream.wait()
        await asyncio.sleep(0.05)
        assert thread.health().ok
        await thread.stop()

    run(test)


def test_books_that_disagree_end_the_loop_and_everyone_is_told(llm: LLM) -> None:
    async def test() -> None:
        thread = await started(llm)
        await thread.submit(request("a")).wait()

        def lose_a_block(m: LLM) -> None:
            m.engine.blocks.start(("nobody", 0), 1)

        await thread.call(lose_a_block)
        with contextlib.suppress(EngineStepError):  # the loop may find out before, or behind it
            await thread.submit(request("b")).wait()
        end = time.monotonic() + 10
        while thread.state == "ready" and time.monotonic() < end:
            await asyncio.sleep(0.01)
        health = thread.health()
        assert not health.ok and "IntegrityError" in health.reason
        with pytest.raises(EngineStepError, match="does not run"):
            await thread.submit(request("c")).wait()

    run(test)


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> LLM:
        raise InvalidArgumentError("no such model")

    async def test() -> None:
        thread = EngineThread(load)
        with pytest.raises(InvalidArgumentError, match="no such model"):
            await thread.start()
        assert thread.state == "failed" and "no such model" in thread.health().reason

    run(test)


def test_a_call_that_waits_when_the_loop_ends(llm: LLM) -> None:
    def end_the_thread(_: int) -> Any:
        time.sleep(0.2)
        raise SystemExit

    async def test() -> None:
        thread = await started(llm)
        runtime_of(llm).wait = end_the_thread  # type: ignore[method-assign]
        stream = thread.submit(request("a"))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineStepError, match="SystemExit"):
            await asyncio.wait_for(thread.call(lambda _: None), 10)
        with pytest.raises(EngineStepError, match="SystemExit"):
            await stream.wait()

    run(test)


def test_call_raises_what_its_function_raises(llm: LLM) -> None:
    def fail(_: LLM) -> None:
        raise KeyError("x")

    async def test() -> None:
        thread = await started(llm)
        with pytest.raises(KeyError):
            await thread.call(fail)
        assert await thread.call(lambda m: m.max_model_len) == 512
        await thread.stop()

    run(test)


def test_an_event_log_that_cannot_be_written(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")  # a file on a disk that is always full

    async def test() -> None:
        for path in (tmp_path / "missing" / "log", *([full] if full.exists() else [])):
            with pytest.raises(FileError, match="the event log cannot be written"):
                await EngineThread(lambda: llm, event_log=path).start()

        def fail(file: EventLogFile) -> None:
            raise FileError("the disk is full by now")

        thread = await started(llm, event_log=tmp_path / "log")
        monkeypatch.setattr(EventLogFile, "flush", fail)
        for name in ("a", "b"):
            assert (await thread.submit(request(name)).wait()).error is None
        assert thread.health().ok
        await thread.stop()

    run(test)


ENDS_WHILE_LOADING = """
import asyncio
from octavo._native import measure_flops
from octavo.server.engine_thread import EngineThread

def load():
    while True:
        measure_flops(num_threads=1, seconds=0.01)
        engine.on_load(0, 1)

async def start():
    engine.start()
    await asyncio.sleep(0.05)

engine = EngineThread(load)
asyncio.run(start())
"""


def test_a_program_that_ends_while_it_loads_is_not_aborted() -> None:
    """Python's end would else meet the thread within the native core."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDS_WHILE_LOADING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
