"""The API over the fake engine: answers, streams, errors with the field's name."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import solo_answer
from fake_runtime import EOS, NAN_TOKEN
from server_helpers import error_of, events_of, fake_llm, run, serving, slow_down

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.server.options import read_defaults

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
LONG = {"prompt": "ABC", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


def ids(text: str) -> list[int]:
    return [ord(character) - 33 for character in text]


def text_of(tokens: Any) -> str:
    return "".join(chr(33 + token) for token in tokens if token != EOS)


def expected(prompt: str, params: SamplingParams, index: int = 0) -> Any:
    answer = solo_answer(ids(prompt), params, index, max_model_len=512)
    return answer


def test_a_completion(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    want = expected("ABC", params)

    async def test() -> None:
        async with serving(llm, served_names=("tiny", "alias")) as (client, _):
            body = {"model": "alias", "prompt": "ABC", "max_tokens": 9, "temperature": 0}
            response = await client.post(COMPLETIONS, json={**body, "ignore_eos": True})
            assert response.status_code == 200
            answer = response.json()
            assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
            assert answer["model"] == "tiny"
            (choice,) = answer["choices"]
            assert choice["text"] == text_of(want.token_ids)
            assert (choice["finish_reason"], choice["index"]) == ("length", 0)
            usage = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
            assert usage.items() <= answer["usage"].items()

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_answers_are_counted_through(llm: LLM, stream: bool) -> None:
    prompts, n = ["ABC", "xyz!", "~"], 2
    params = SamplingParams(temperature=0.9, seed=7, max_tokens=11, n=n)
    want = [expected(prompt, params, index) for prompt in prompts for index in range(n)]

    async def test() -> None:
        body = {"prompt": prompts, "n": n, "seed": 7, "temperature": 0.9, "max_tokens": 11}
        async with serving(llm) as (client, _):
            response = await client.post(COMPLETIONS, json={**body, "stream": stream})
            if stream:
                texts, reasons = [""] * 6, [None] * 6
                for event in events_of(response.text):
                    (choice,) = event["choices"]
                    texts[choice["index"]] += choice["text"]
                    reasons[choice["index"]] = choice["finish_reason"]
            else:
                choices = response.json()["choices"]
                assert [choice["index"] for choice in choices] == list(range(6))
                texts = [choice["text"] for choice in choices]
                reasons = [choice["finish_reason"] for choice in choices]
            assert texts == [text_of(answer.token_ids) for answer in want]
            assert reasons == [answer.finish_reason for answer in want]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_one_request_wait_as_one(tmp_path: Path, stream: bool) -> None:
    llm = fake_llm(tmp_path, max_waiting_requests=2, max_num_seqs=1)
    many = {**LONG, "prompt": ["ABC", "xy", "z", "~~~~"], "max_tokens": 4, "stream": stream}

    async def test() -> None:
        async with serving(llm) as (client, service):
            response = await client.post(COMPLETIONS, json=many)  # no other waits
            assert response.status_code == 200, response.text
            events = events_of(response.text) if stream else [response.json()]
            found = {choice["index"] for event in events for choice in event["choices"]}
            assert found == {0, 1, 2, 3}
            slow_down(llm, 0.01)
            others = []
            for _ in range(3):
                others.append(asyncio.ensure_future(client.post(COMPLETIONS, json=LONG)))
                await asyncio.sleep(0.05)
            error_of(await client.post(COMPLETIONS, json=many), 429)
            assert service.engine.num_open == 3 and not others[0].done()
            service.abort_all()
            await asyncio.gather(*others)

    run(test)


def test_the_first_refusal_ends_a_request_of_many_prompts(llm: LLM) -> None:
    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (client, service):
            submit, names = service.engine.submit, []

            def refuse_last(request: Any) -> Any:
                names.append(request.request_id)
                return submit(replace(request, priority=2**40) if len(names) == 3 else request)

            service.engine.submit = refuse_last  # type: ignore[method-assign]
            error_of(await client.post(COMPLETIONS, json={**LONG, "prompt": ["A", "xy", "z"]}), 400)
            assert await service.engine.call(lambda m: m.engine.num_steps) < 200

    run(test)


def test_token_ids_as_prompts(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            texts = []
            for prompt in ("ABC", ids("ABC"), ["ABC"], [ids("ABC")]):
                body = {"prompt": prompt, "temperature": 0, "max_tokens": 5, "ignore_eos": True}
                response = await client.post(COMPLETIONS, json=body)
                texts.append(response.json()["choices"][0]["text"])
            assert len(set(texts)) == 1 and texts[0]
            body = {"prompt": ids("ABC"), "echo": True, "temperature": 0, "max_tokens": 5}
            response = await client.post(COMPLETIONS, json={**body, "ignore_eos": True})
            assert response.json()["choices"][0]["text"] == "ABC" + texts[0]

    run(test)


def test_echo_comes_before_the_first_text_of_a_stream(llm: LLM) -> None:
    async def test() -> None:
        body = {"prompt": ["ABC", "x"], "echo": True, "temperature": 0, "max_tokens": 4}
        async with serving(llm) as (client, _):
            whole = (await client.post(COMPLETIONS, json=body)).json()
            response = await client.post(COMPLETIONS, json={**body, "stream": True})
            texts = ["", ""]
            for event in events_of(response.text):
                texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert texts == [choice["text"] for choice in whole["choices"]]
            assert texts[0].startswith("ABC") and texts[1].startswith("x")

    run(test)


def test_a_chat_streams_what_it_would_answer_whole(llm: LLM) -> None:
    async def test() -> None:
        body: dict[str, Any] = {"messages": USER, "max_tokens": 20, "temperature": 0.7, "seed": 3}
        async with serving(llm) as (client, _):
            whole = (await client.post(CHAT, json={**body, "n": 2})).json()
            options = {"stream": True, "stream_options": {"include_usage": True}}
            response = await client.post(CHAT, json={**body, "n": 2, **options})
            assert response.headers["content-type"].startswith("text/event-stream")
            *events, last = events_of(response.text)
            cached = last["usage"].pop("prompt_tokens_details")["cached_tokens"]
            assert whole["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}
            assert cached > 0  # of the same prompt, asked a second time
            assert last["choices"] == [] and last["usage"] == whole["usage"]
            assert all(event["usage"] is None for event in events[2:])
            roles = [event["choices"][0]["delta"].get("role") for event in events[:2]]
            assert roles == ["assistant", "assistant"]
            for index in range(2):
                own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
                text = "".join(choice["delta"].get("content", "") for choice in own)
                assert text == whole["choices"][index]["message"]["content"]
                reasons = [choice["finish_reason"] for choice in own]
                assert reasons[-1] == whole["choices"][index]["finish_reason"]
                assert set(reasons[:-1]) == {None}

    run(test)


def test_a_chat_that_names_no_length_may_fill_the_context(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_model_len=40)

    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"messages": USER, "ignore_eos": True, "temperature": 0}
            answer = (await client.post(CHAT, json=body)).json()
            assert answer["usage"]["total_tokens"] == 40
            assert answer["choices"][0]["finish_reason"] == "length"
            body = {"prompt": "ABC", "ignore_eos": True}
            answer = (await client.post(COMPLETIONS, json=body)).json()
            assert answer["usage"]["completion_tokens"] == 16

    run(test)


def test_stop_strings_tokens_and_reasons(llm: LLM) -> None:
    async def test() -> None:
        body = {"prompt": "ABC", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        async with serving(llm) as (client, _):
            full = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"]
            cases: list[tuple[dict[str, Any], str, Any]] = [
                ({"stop": full[5:7]}, full[:5], full[5:7]),
                ({"stop": ["never", full[3]]}, full[: full.index(full[3])], full[3]),
                (
                    {"stop": full[5:7], "include_stop_str_in_output": True},
                    full[:7],
                    full[5:7],
                ),
                ({"stop_token_ids": ids(full[4])}, full[: full.index(full[4])], ids(full[4])[0]),
            ]
            for more, text, reason in cases:
                for stream in (False, True):
                    sent = {**body, **more, "stream": stream}
                    response = await client.post(COMPLETIONS, json=sent)
                    if stream:
                        choices = [event["choices"][0] for event in events_of(response.text)]
                        found = "".join(choice["text"] for choice in choices)
                        last = choices[-1]
                    else:
                        last = response.json()["choices"][0]
                        found = last["text"]
                    assert (found, last["finish_reason"]) == (text, "stop")
                    assert last["stop_reason"] == reason

    run(test)


def test_logprobs_in_both_forms(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2)
    want = expected("HiA", params)

    async def test() -> None:
        base = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
        async with serving(llm) as (client, _):
            body = {**base, "prompt": "HiA", "logprobs": 2}
            found = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]
            assert found["token_logprobs"] == [entry.logprob for entry in want.logprobs]
            assert found["tokens"] == [chr(33 + t) for t in want.token_ids]
            assert found["text_offset"] == [0, 1, 2]
            for tops, entry in zip(found["top_logprobs"], want.logprobs, strict=True):
                given = dict(zip(entry.top_token_ids, entry.top_logprobs, strict=True))
                expected_tops = {chr(33 + token): value for token, value in given.items()}
                assert tops == {**expected_tops, chr(33 + entry.token_id): entry.logprob}
            response = await client.post(COMPLETIONS, json={**body, "stream": True})
            pieces = [event["choices"][0]["logprobs"] for event in events_of(response.text)]
            assert [piece["text_offset"] for piece in pieces] == [[0], [1], [2]]

            body = {**base, "messages": USER, "logprobs": True, "top_logprobs": 3}
            whole = (await client.post(CHAT, json=body)).json()["choices"][0]["logprobs"]
            assert [len(entry["top_logprobs"]) for entry in whole["content"]] == [3, 3, 3]
            assert all(bytes(e["bytes"]).decode() == e["token"] for e in whole["content"])
            response = await client.post(CHAT, json={**body, "stream": True})
            streamed = [event["choices"][0]["logprobs"] for event in events_of(response.text)]
            entries = [entry for piece in streamed if piece for entry in piece["content"]]
            assert entries == whole["content"]

    run(test)


def test_what_a_request_leaves_out_is_as_the_model_recommends(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.4, "top_k": 7, "top_p": 0.9, "eos_token_id": 2, "do_sample": true}'
    )
    defaults = read_defaults(tmp_path)
    assert defaults == {"temperature": 0.4, "top_k": 7, "top_p": 0.9}
    assert read_defaults(tmp_path / "nowhere") == {}
    (tmp_path / "generation_config.json").write_text("{")
    assert read_defaults(tmp_path) == {}
    common = {"max_tokens": 12, "seed": 4, "ignore_eos": True}
    want = expected("ABC", SamplingParams(temperature=0.4, top_k=7, top_p=0.9, **common))
    other = expected("ABC", SamplingParams(temperature=0.4, top_k=0, top_p=0.5, **common))
    assert want.token_ids != other.token_ids

    async def test() -> None:
        async with serving(llm, defaults=defaults) as (client, _):
            for more, answer in (({}, want), ({"top_k": -1, "top_p": 0.5}, other)):
                body = {"prompt": "ABC", **common, **more}
                found = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
                assert found["text"] == text_of(answer.token_ids)

    run(test)


def test_unknown_fields_are_ignored(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"messages": USER, "max_tokens": 2, "invented": {"a": [1]}, "store": True}
            assert (await client.post(CHAT, json=body)).status_code == 200

    run(test)


def test_models_tokens_and_probes(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, served_names=("org/tiny", "tiny")) as (client, _):
            models = (await client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in models] == ["org/tiny", "tiny"]
            assert models[0]["max_model_len"] == 512
            assert (await client.get("/v1/models/org/tiny")).json()["id"] == "org/tiny"
            error = error_of(await client.get("/v1/models/nobody"), 404)
            assert error["code"] == "model_not_found"
            for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "A"})):
                response = await client.post(path, json={**body, "model": "nobody"})
                assert error_of(response, 404)["param"] == "model"

            answer = (await client.post("/tokenize", json={"prompt": "ABC"})).json()
            want = {"count": 3, "tokens": ids("ABC"), "token_strs": None, "max_model_len": 512}
            assert answer == want
            body: dict[str, Any] = {"messages": USER, "return_token_strs": True}
            answer = (await client.post("/tokenize", json=body)).json()
            assert answer["token_strs"] == list("uHiA")
            answer = await client.post("/detokenize", json={"tokens": ids("ABC")})
            assert answer.json() == {"prompt": "ABC"}
            error_of(await client.post("/detokenize", json={"tokens": [-5]}), 400)
            error_of(await client.post("/tokenize", json={}), 400)

            assert (await client.get("/health")).json()["status"] == "ok"
            assert (await client.get("/ready")).json() == {"ready": True, "phase": "ready"}
            assert set((await client.get("/version")).json()) == {"version"}
            error_of(await client.get("/nothing"), 404)
            error_of(await client.put("/tokenize", json={}), 405)
            schema = (await client.get("/openapi.json")).json()
            assert {CHAT, COMPLETIONS, "/tokenize", "/health"} <= set(schema["paths"])
            responses = schema["paths"][CHAT]["post"]["responses"]
            assert {"200", "400", "401", "429", "503", "504"} <= set(responses) - {"422"}
            assert "422" not in responses and "text/event-stream" in responses["200"]["content"]

    run(test)


def test_a_model_without_a_tokenizer_or_a_template(tmp_path: Path) -> None:
    from engine_helpers import fake_engine

    bare = LLM.from_engine(fake_engine(num_blocks=64))

    async def test() -> None:
        async with serving(fake_llm(tmp_path, template=None)) as (client, _):
            error = error_of(await client.post(CHAT, json={"messages": USER}), 400)
            assert "no chat template" in error["message"] and error["param"] == "messages"
        async with serving(bare) as (client, _):
            error = error_of(await client.post(COMPLETIONS, json={"prompt": "A"}), 400)
            assert "no tokenizer" in error["message"]
            body = {"prompt": [1, 2], "max_tokens": 2, "logprobs": 1, "ignore_eos": True}
            choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
            assert choice["text"] == "" and len(choice["logprobs"]["tokens"]) == 2
            error_of(await client.post("/tokenize", json={"prompt": "A"}), 400)

    run(test)


def test_a_nan_ends_its_request_alone(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            for stream in (False, True):
                bad = {"prompt": [3, NAN_TOKEN], "stream": stream}
                good = {"prompt": "ABC", "max_tokens": 8, "ignore_eos": True}
                failed, fine = await asyncio.gather(
                    client.post(COMPLETIONS, json=bad), client.post(COMPLETIONS, json=good)
                )
                error = error_of(failed, 500)
                assert "NaN" in error["message"] and error["code"] == "model_error"
                assert fine.json()["usage"]["completion_tokens"] == 8

    run(test)
