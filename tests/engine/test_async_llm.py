"""AsyncLLM: many tasks, streams that are left, errors; over the fake runtime."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_helpers import fake_llm, slow_down

from octavo import async_llm
from octavo.async_llm import AsyncLLM
from octavo.errors import EngineStepError, InvalidArgumentError, ModelNotFoundError
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["ABC", "hello", [5, 6, 7], [{"role": "user", "content": "x"}]]


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    made = fake_llm(tmp_path)
    monkeypatch.setattr(async_llm, "load_model", lambda *_, **__: made)
    return made


def test_many_tasks_share_the_steps(llm: LLM) -> None:
    async def ask() -> list[Any]:
        async with AsyncLLM() as asked:
            return await asyncio.gather(*(asked.generate(prompt, PARAMS) for prompt in PROMPTS))

    found = [output.outputs for output in asyncio.run(ask())]
    expected = [
        llm.generate(prompt, PARAMS, progress=False)[0].outputs
        if not isinstance(prompt[0], dict)
        else llm.chat(prompt, PARAMS, progress=False)[0].outputs
        for prompt in PROMPTS
    ]
    assert found == expected


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    async def ask() -> tuple[str, Any]:
        async with AsyncLLM() as asked:
            chunks = [chunk async for chunk in asked.stream("ABC", PARAMS)]
        return "".join(chunk.text for chunk in chunks), chunks[-1].result

    text, result = asyncio.run(ask())
    assert text == result.text == llm.generate("ABC", PARAMS, progress=False)[0].text


def test_prompts_are_read_beside_the_event_loop_and_numbered_as_they_were_asked(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, compile_grammar = llm.encode, llm.engine.grammars.of
    threads: list[str] = []

    def slow_encode(prompt: Any) -> Any:
        threads.append(threading.current_thread().name)
        time.sleep(0.05 if prompt == PROMPTS[0] else 0)  # so that the others overtake it
        return encode(prompt)

    def noted(params: SamplingParams) -> Any:
        threads.append(threading.current_thread().name)
        return compile_grammar(params)

    monkeypatch.setattr(llm, "encode", slow_encode)
    monkeypatch.setattr(llm.engine.grammars, "of", noted)

    async def ask() -> list[Any]:
        async with AsyncLLM() as asked:
            with pytest.raises(InvalidArgumentError, match="the prompt is 7"):
                await asked.generate(7, PARAMS)  # type: ignore[arg-type]
            return await asyncio.gather(*(asked.generate(prompt, PARAMS) for prompt in PROMPTS))

    numbers = [output.request_id for output in asyncio.run(ask())]
    assert numbers == [f"request-{number}" for number in range(1, 5)]
    assert len(threads) > 2 * len(PROMPTS) and threading.current_thread().name not in threads


def test_threads_of_the_loops_own_pool_may_ask_and_wait(llm: LLM) -> None:
    async def ask() -> list[str]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))
        async with AsyncLLM() as asked:

            def from_thread(prompt: str) -> str:
                answer = asyncio.run_coroutine_threadsafe(asked.generate(prompt, PARAMS), loop)
                return answer.result(timeout=20).text

            waiting = [asyncio.to_thread(from_thread, prompt) for prompt in "ABCDEFG"]
            return await asyncio.gather(*waiting)

    texts = [each.text for each in llm.generate(list("ABCDEFG"), PARAMS, progress=False)]
    assert asyncio.run(ask()) == texts


def test_a_second_request_of_one_id_is_told_and_the_first_goes_on(llm: LLM) -> None:
    slow_down(llm, 0.01)

    async def ask() -> None:
        async with AsyncLLM() as asked:
            first = asyncio.create_task(asked.generate("ABC", PARAMS, request_id="a"))
            await asyncio.sleep(0.05)
            with pytest.raises(InvalidArgumentError, match="'a' is already running"):
                await asked.generate("ABC", PARAMS, request_id="a")
            assert (await first).text

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_leaving_a_stream_and_cancelling_a_task_end_their_requests(llm: LLM) -> None:
    slow_down(llm, 0.01)
    endless = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    async def ask() -> None:
        async with AsyncLLM() as asked:
            stream = asked.stream("ABC", endless)
            await anext(stream)
            await stream.aclose()
            task = asyncio.create_task(asked.generate("ABC", endless))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(200):
                if not llm.engine.has_unfinished_requests:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the requests run on")

    asyncio.run(ask())


def test_errors_are_raised_where_they_are_awaited(llm: LLM) -> None:
    async def ask() -> None:
        asked = AsyncLLM()
        with pytest.raises(EngineStepError, match="not loaded"):
            await asked.generate("ABC")
        async with asked:
            with pytest.raises(InvalidArgumentError, match="token"):
                await asked.generate([10**6], PARAMS)
            assert (await asked.generate("ABC", PARAMS)).text

    asyncio.run(ask())


def test_errors_of_loading() -> None:
    async def ask() -> None:
        with pytest.raises(ModelNotFoundError):
            async with AsyncLLM("./no-such-model"):
                pass

    asyncio.run(ask())
