"""Requests that are wrong: the field is named, and nothing else is disturbed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_runtime import VOCAB
from pydantic import ValidationError
from server_helpers import TEMPLATE, error_of, fake_llm, run, serving, slow_down

from octavo.llm import LLM
from octavo.server.embeddings import EmbeddingBody
from octavo.server.logs import JsonFormatter
from octavo.server.protocol import CompletionBody

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (COMPLETIONS, {"temperature": -1}, "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"temperature": 1e400}, None),
    (COMPLETIONS, {"top_p": -0.1}, "top_p"),
    (COMPLETIONS, {"top_p": 1.5}, "top_p"),
    (COMPLETIONS, {"top_k": -2}, "top_k"),
    (COMPLETIONS, {"min_p": 2}, "min_p"),
    (COMPLETIONS, {"n": 0}, "n"),
    (COMPLETIONS, {"n": 10**9}, "n"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    (COMPLETIONS, {"seed": "x"}, "seed"),
    (COMPLETIONS, {"stop": 5}, "stop"),
    (COMPLETIONS, {"max_tokens": -2}, "max_tokens"),
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
    (COMPLETIONS, {"logprobs": 1, "echo": True, "stream": True}, "stream"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "stream"),
    (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
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
    (COMPLETIONS, {"guided_json": {"type": "objct"}}, "guided_json"),
    (COMPLETIONS, {"guided_json": "{"}, "guided_json"),
    (COMPLETIONS, {"guided_regex": "a", "use_beam_search": True}, "guided_regex"),
    (COMPLETIONS, {"guided_regex": "(?=a)"}, "guided_regex"),
    (COMPLETIONS, {"guided_choice": []}, "guided_choice"),
    (COMPLETIONS, {"guided_grammar": "start: a b"}, "guided_grammar"),
    (COMPLETIONS, {"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
    (COMPLETIONS, {"structured_outputs": {"jsn": {}}}, "structured_outputs"),
    (COMPLETIONS, {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    (COMPLETIONS, {"response_format": {"type": "json_schema"}}, "response_format"),
    (COMPLETIONS, {"structured_outputs": {"structural_tag": {}}}, "structured_outputs"),
    (COMPLETIONS, {"response_format": {"type": "structural_tag"}}, "response_format"),
    (
        COMPLETIONS,
        {"response_format": {"type": "structural_tag", "format": {"type": "exclude_token"}}},
        "response_format",
    ),
    (COMPLETIONS, {"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
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
    (CHAT, {"chat_template_kwargs": {"a": 1, "chat_template": "x"}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"add_special_tokens": True}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"self": {}}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs"),
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


@pytest.mark.parametrize("prompt", ["A", [1, 2]], ids=str)
def test_as_many_prompts_may_be_completed_as_embedded(prompt: Any) -> None:
    for body, field in ((CompletionBody, "prompt"), (EmbeddingBody, "input")):
        body.model_validate({field: [prompt] * 2048})
        with pytest.raises(ValidationError, match="at most 2048 items"):
            body.model_validate({field: [prompt] * 2049})


def test_what_is_quoted_is_shortened(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            kind = "".join(f"{i}-" for i in range(9000))
            for more in ({"response_format": {"type": kind}}, {"logit_bias": {kind: 1}}):
                response = await client.post(COMPLETIONS, json={"prompt": "ABC", **more})
                message = error_of(response, 400)["message"]
                assert "0-1-2-3" in message and "; expected " in message and len(message) < 2100

    run(test)


PRIVATE = "card 4929 1234"
SAID: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": [*USER, {"role": "user", "tool_calls": {"x": PRIVATE}}]}, "messages[1]"),
    (CHAT, {"messages": [{"role": "user", "content": {"x": PRIVATE}}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "fail", "content": PRIVATE}]}, "messages"),
    (CHAT, {"tool_choice": {"x": PRIVATE}}, "tool_choice"),
    (CHAT, {"chat_template_kwargs": PRIVATE}, "chat_template_kwargs"),
    (COMPLETIONS, {"prompt": {"x": PRIVATE}}, "prompt"),
    (COMPLETIONS, {"guided_regex": f"({PRIVATE}"}, "guided_regex"),
    (COMPLETIONS, {"guided_choice": [PRIVATE, ""]}, "guided_choice"),
    (COMPLETIONS, {"response_format": {"type": PRIVATE}}, "response_format"),
    (COMPLETIONS, {"structured_outputs": {PRIVATE: 1}}, "structured_outputs"),
    (COMPLETIONS, {"logit_bias": {PRIVATE: 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": PRIVATE * 99}, "context_length_exceeded"),
    (COMPLETIONS, {"seed": PRIVATE}, "seed"),
]


def test_what_was_said_is_not_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusing = TEMPLATE + "{% if messages[0].role == 'fail' %}"
    llm = fake_llm(tmp_path, refusing + "{{ raise_exception(messages[0].content) }}{% endif %}")

    async def test() -> None:
        async with serving(llm) as (client, _):
            for path, fields, _word in SAID:
                base = {"messages": USER} if path == CHAT else {"prompt": "ABC"}
                error_of(await client.post(path, json={**base, **fields}), 400)
            error_of(await client.post(COMPLETIONS, json={"prompt": "A", "model": "other"}), 404)

    logging.getLogger("octavo").propagate = True
    with caplog.at_level(logging.DEBUG):
        run(test)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert not any("4929" in line for line in lines)
    errors = [error for line in lines if (error := json.loads(line).get("error"))]
    for error, (_, _, word) in zip(errors, SAID, strict=False):
        assert word in error
    assert "the model 'other' is not served here" in errors[-1] and len(errors) == len(SAID) + 1


@pytest.mark.parametrize(("choice", "has_begun"), [(["no", "yes"], True), (["n", "y"], False)])
def test_constraints_that_leave_no_token_are_the_clients(
    llm: LLM, choice: list[str], has_begun: bool
) -> None:
    async def test() -> None:
        slow_down(llm, 0.03)  # so that a first token is written before the second is chosen
        async with serving(llm) as (client, _):
            body = {"prompt": "ABC", "guided_choice": choice, "bad_words": choice}
            error = error_of(await client.post(COMPLETIONS, json=body), 400)
            assert error["code"] == "no_token_allowed" and "bad_words" in error["message"]
            response = await client.post(COMPLETIONS, json={**body, "stream": True})
            assert response.status_code == (200 if has_begun else 400)
            last = response.text.removesuffix("\n\ndata: [DONE]\n\n").split("data: ")[-1]
            assert json.loads(last)["error"]["code"] == "no_token_allowed"

    run(test)


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
            assert "the body spells half of a surrogate pair" in error["message"]
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


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "kind"),
    [("", "empty or null"), ("null", "empty or null"), ("[1]", "of type list"), ("5", "int")],
)
def test_a_body_that_is_no_object(llm: LLM, path: str, body: str, kind: str) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            headers = {"content-type": "application/json"}
            error = error_of(await client.post(path, content=body, headers=headers), 400)
            assert error["param"] is None
            assert f"{kind}; expected a JSON object with the fields" in error["message"]
            assert error["message"].startswith("the body is")

    run(test)


def test_pages_of_allowed_origins(llm: LLM) -> None:
    """They may ask, and read the headers that say which request it was and when to ask again."""
    page = {"origin": "http://a.example"}
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-request-id",
    }
    shown = "access-control-allow-origin"

    async def test() -> None:
        options = {"allowed_origins": ("http://a.example",), "api_keys": ("k",)}
        async with serving(llm, **options) as (client, _):
            before = await client.options(CHAT, headers={**page, **asks})
            assert before.status_code == 200 and before.headers[shown] == page["origin"]
            other = {"origin": "http://b.example"}
            before = await client.options(CHAT, headers={**other, **asks})
            assert before.status_code == 400 and shown not in before.headers
            for key, status in (("k", 200), ("no", 401)):
                headers = {**page, "authorization": f"Bearer {key}"}
                response = await client.get("/v1/models", headers=headers)
                assert response.status_code == status and response.headers[shown] == page["origin"]
                exposed = response.headers["access-control-expose-headers"].lower().split(", ")
                names = {"retry-after", "x-octavo-warning", "x-request-id", "request-id"}
                assert names <= set(exposed)
            response = await client.get(
                "/v1/models", headers={**other, "authorization": "Bearer k"}
            )
            assert shown not in response.headers

    run(test)
