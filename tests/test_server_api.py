"""The API over the fake engine: answers, streams, errors with the field's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_helpers import EOS, NAN_TOKEN, VOCAB, solo_answer
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from server_helpers import error_of, events_of, fake_llm, run, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


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


def test_unknown_fields_are_ignored(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"messages": USER, "max_tokens": 2, "invented": {"a": [1]}, "store": True}
            assert (await client.post(CHAT, json=body)).status_code == 200

    run(test)


WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (COMPLETIONS, {"temperature": -1}, "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"temperature": 1e400}, None),
    (COMPLETIONS, {"top_p": 0}, "top_p"),
    (COMPLETIONS, {"top_p": 1.5}, "top_p"),
    (COMPLETIONS, {"top_k": -2}, "top_k"),
    (COMPLETIONS, {"min_p": 2}, "min_p"),
    (COMPLETIONS, {"n": 0}, "n"),
    (COMPLETIONS, {"n": 10**9}, "n"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    (COMPLETIONS, {"seed": "x"}, "seed"),
    (COMPLETIONS, {"stop": ""}, "stop"),
    (COMPLETIONS, {"stop": ["a", 5]}, "stop"),
    (COMPLETIONS, {"stop": ["a"] * 33}, "stop"),
    (COMPLETIONS, {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    (COMPLETIONS, {"logit_bias": {"a": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    (COMPLETIONS, {"presence_penalty": 3}, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": 1, "echo": True}, "echo"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [VOCAB]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"timeout": 0}, "timeout"),
    (COMPLETIONS, {"priority": 2**40}, "priority"),
    (COMPLETIONS, {"cache_salt": ""}, "cache_salt"),
    (COMPLETIONS, {"stream": "maybe"}, "stream"),
    (COMPLETIONS, {"guided_json": {"type": "object"}}, "guided_json"),
    (COMPLETIONS, {"response_format": {"type": "json_object"}}, "response_format"),
    (COMPLETIONS, {"response_format": {"type": ["text"]}}, "response_format"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    (CHAT, {"messages": [*USER, {"role": "tool", "content": 5}]}, "messages[1].content"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
]


@pytest.fixture(scope="module")
def wrong_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, httpx.Response]:
    """All of WRONG through one server."""
    llm = fake_llm(tmp_path_factory.mktemp("wrong"))
    found = {}

    async def ask() -> None:
        async with serving(llm) as (client, _):
            for index, (path, fields, _param) in enumerate(WRONG):
                base = {"messages": USER} if path == CHAT else {"prompt": "ABC"}
                import json

                content = json.dumps({**base, **fields})
                headers = {"content-type": "application/json"}
                found[index] = await client.post(path, content=content, headers=headers)

    run(ask)
    return found


@pytest.mark.parametrize("index", range(len(WRONG)), ids=lambda i: str(WRONG[i][1])[:50])
def test_what_is_wrong_is_named(index: int, wrong_answers: dict[int, httpx.Response]) -> None:
    error = error_of(wrong_answers[index], 400)
    assert error["type"] == "invalid_request_error"
    name = WRONG[index][2]
    assert name is None or (error["param"] or "").startswith(name), error


def test_a_prompt_that_does_not_fit(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            for stream in (False, True):
                body = {"prompt": "A" * 600, "stream": stream}
                error = error_of(await client.post(COMPLETIONS, json=body), 400)
                assert error["code"] == "context_length_exceeded"
                assert "600 tokens" in error["message"] and error["param"] == "prompt"

    run(test)


def test_bodies_that_are_no_requests(llm: LLM) -> None:
    json_type = {"content-type": "application/json"}

    async def test() -> None:
        async with serving(llm, max_body_bytes=1000) as (client, _):
            for content in (b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b"[" * 900, b"null"):
                error_of(await client.post(CHAT, content=content, headers=json_type), 400)
            lone = b'{"prompt": "a\\ud800b"}'
            error = error_of(await client.post(COMPLETIONS, content=lone, headers=json_type), 400)
            assert "surrogate" in error["message"]
            paired = b'{"prompt": "a\\u0041", "max_tokens": 1}'
            response = await client.post(COMPLETIONS, content=paired, headers=json_type)
            assert response.status_code == 200
            error_of(await client.post(CHAT, content=b"x" * 1001, headers=json_type), 413)
            error_of(await client.post(CHAT, content=b"{}"), 415)

            async def endless() -> Any:
                for _ in range(100):
                    yield b"x" * 100

            error_of(await client.post(CHAT, content=endless(), headers=json_type), 413)

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
                import asyncio

                failed, fine = await asyncio.gather(
                    client.post(COMPLETIONS, json=bad), client.post(COMPLETIONS, json=good)
                )
                error = error_of(failed, 500)
                assert "NaN" in error["message"] and error["code"] == "model_error"
                assert fine.json()["usage"]["completion_tokens"] == 8

    run(test)
