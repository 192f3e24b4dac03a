"""Every field changes the answer, is refused by name, or cannot matter; slips are told of."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from server_helpers import error_of, fake_llm, run, serving

from octavo.server.errors import ApiError
from octavo.server.fields import check_extra_fields, unknown_fields
from octavo.server.prepare import read_params
from octavo.server.protocol import ChatBody, CompletionBody, DetokenizeBody, check_supported, slips

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"grammar": 'root ::= "yes"'}, "its name here is guided_grammar"),
    ({"json_schema": {"type": "object"}}, "its name here is guided_json"),
    ({"regex": "yes"}, "its name here is guided_regex"),
    ({"structural_tag": {"begin": "x"}}, "its name here is structured_outputs, as in"),
    ({"echo": True}, "leave it out"),
    ({"tfs_z": 0.9}, "leave it out"),
    ({"typ_p": 0.9}, "its name here is typical_p"),
    ({"mirostat": 2}, "use min_p, top_n_sigma or typical_p"),
    ({"samplers": ["top_k"]}, "the order of the filters is fixed"),
    ({"banned_tokens": [5]}, "use logit_bias, -100 for each"),
    ({"logits_processors": ["a.b"]}, "runs no code of its clients"),
    ({"modalities": ["text", "audio"]}, "leave it out"),
    ({"truncate_prompt_tokens": 0}, "leave it out"),
    ({"n_predict": 5}, "its name here is max_tokens"),
    ({"max_new_tokens": 5}, "its name here is max_tokens"),
    ({"repeat_penalty": 1.1}, "its name here is repetition_penalty"),
    ({"do_sample": False}, "its name here is temperature"),
    ({"stop_sequences": ["x"]}, "its name here is stop"),
    # Here no, 0 and an empty object ask for something.
    ({"temp": 0}, "its name here is temperature"),
    ({"max_new_tokens": 0}, "its name here is max_tokens"),
    ({"random_seed": 0}, "its name here is seed"),
    ({"web_search_options": {}}, "leave it out"),
    ({"enable_thinking": False}, "chat_template_kwargs"),
    ({"add_bos_token": False}, "add_special_tokens"),
    ({"repeat_last_n": 64}, "leave it out"),
    ({"vllm_xargs": {"a": 1}}, "leave it out"),
    ({"input_ids": [1]}, "leave it out"),
    ({"images": ["x"]}, "leave it out"),
    ({"prompt": "x"}, "it is a field of /v1/completions"),
    ({"suffix": "x"}, "it is a field of /v1/completions"),
    ({"best_of": 2}, "it is a field of /v1/completions"),
]
OF_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"max_completion_tokens": 3}, "its name here is max_tokens"),
    ({"top_logprobs": 3}, "logprobs is the number"),
    ({"messages": USER}, "it is a field of /v1/chat/completions"),
    ({"tools": [{}]}, "it is a field of /v1/chat/completions"),
    ({"chat_template": "x"}, "it is a field of /v1/chat/completions"),
    ({"chat_template_kwargs": {"a": 1}}, "it is a field of /v1/chat/completions"),
    ({"documents": [{}]}, "it is a field of /v1/chat/completions"),
    ({"tool_choice": "required"}, "it is a field of /v1/chat/completions"),
    ({"reasoning_effort": "low"}, "it is a field of /v1/chat/completions"),
]
NEUTRAL: list[dict[str, Any]] = [
    {"grammar": None, "regex": "", "json_schema": {}, "echo": False},
    {"modalities": ["text"], "typical_p": 1, "mirostat": 0, "top_n_sigma": -1},
    {"do_sample": True, "repeat_penalty": 1.0, "length_penalty": 1.0, "num_beams": 1},
    {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prediction": {"x": 1}},
    {"reasoning_format": "auto", "repeat_last_n": -1, "add_bos_token": True, "best_of": 1},
    {"mirostat_tau": 5.0, "guided_decoding_backend": "auto", "raw": False},
    {"functions": [], "function_call": None, "audio": None, "parallel_tool_calls": True},
]


@pytest.mark.parametrize(("fields", "advice"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_change_the_answer_is_refused_by_name(fields, advice):
    (name,) = fields
    with pytest.raises(ApiError) as caught:
        check_supported(ChatBody.model_validate({"messages": USER, **fields}))
    error = caught.value
    assert (error.status, error.param) == (400, name)
    assert error.message.startswith(name)
    assert advice in error.message


@pytest.mark.parametrize(("fields", "advice"), OF_CHATS, ids=lambda value: str(value)[:40])
def test_fields_of_chats_are_refused_in_completions(fields, advice):
    (name,) = fields
    with pytest.raises(ApiError) as caught:
        check_supported(CompletionBody.model_validate({"prompt": "x", **fields}))
    error = caught.value
    assert (error.status, error.param) == (400, name)
    assert advice in error.message


def test_fields_of_chats_that_ask_for_nothing_are_welcome_in_completions():
    fields = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    body = CompletionBody.model_validate({"prompt": "x", **fields, "add_generation_prompt": True})
    check_supported(body)
    assert slips(body) == {}


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda value: str(value)[:40])
def test_what_asks_for_nothing_is_welcome(fields):
    body = ChatBody.model_validate({"messages": USER, **fields})
    check_supported(body)
    assert slips(body) == {}


SLIPS = {
    "temprature": "temperature",
    "maxTokens": "max_tokens",
    "max-tokens": "max_tokens",
    "topP": "top_p",
    "stop_token_id": "stop_token_ids",
    "presense_penalty": "presence_penalty",
    "Seed": "seed",
    "grammer": "grammar",
    "frobnicate": None,
    "x": None,
}


def test_a_slip_is_told_from_what_nobody_knows():
    body = CompletionBody.model_validate({"prompt": "x", **dict.fromkeys(SLIPS, 1)})
    assert slips(body) == SLIPS


def test_of_many_unknown_fields_the_first_are_compared():
    body = CompletionBody.model_validate({"prompt": "x", **{f"seed{i}": i for i in range(3000)}})
    assert slips(body) == {f"seed{i}": "seed" for i in range(20)}


MANY = [{"a": [i]} if i % 3 else i + 0.5 for i in range(3000)]


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, DetokenizeBody])
def test_many_wrong_entries_are_few_errors(body):
    base = {"prompt": "x", "messages": USER, "tokens": [1]}
    for name in body.model_fields:
        values = (MANY, [MANY], {str(i): 1000 + i for i in range(5000)})
        for value in values:
            try:
                body.model_validate({**base, name: value})
            except ValidationError as error:
                assert error.error_count() < 10, name


@given(st.dictionaries(st.text(max_size=12), st.none() | st.integers() | st.text(), max_size=4))
def test_any_fields_at_all(extra):
    known = list(CompletionBody.model_fields)
    assert set(unknown_fields(extra, known)) <= set(extra)
    try:
        check_extra_fields(extra)
    except ApiError as error:
        assert error.param in extra


def test_a_slip_is_in_a_header_and_in_the_log(tmp_path, caplog):
    async def session() -> None:
        async with serving(fake_llm(tmp_path)) as (client, _):
            for stream in (False, True):
                body = {"prompt": "ABC", "temprature": 0, "x\ny": 1, "stop\u00e9": 2}
                response = await client.post(COMPLETIONS, json={**body, "stream": stream})
                assert response.status_code == 200
                warning = response.headers["X-Octavo-Warning"]
                assert "'temprature', perhaps temperature" in warning
                assert "'stop\\xe9', perhaps stop" in warning
                assert "x\\ny" not in warning
                assert warning in [
                    getattr(record, "octavo_fields", {}).get("warning") for record in caplog.records
                ]
            body = {"prompt": "ABC", "stream_options": {"include_usge": True, "x": 1}}
            warning = (await client.post(COMPLETIONS, json=body)).headers["X-Octavo-Warning"]
            assert "'stream_options.include_usge', perhaps include_usage" in warning
            for path, body in (
                ("/tokenize", {"prompt": "ABC", "add_special_token": False, "temprature": 1}),
                ("/tokenize", {"messages": USER, "add_special_token": False, "temprature": 1}),
                ("/detokenize", {"tokens": [1], "add_special_token": False, "temprature": 1}),
            ):
                warning = (await client.post(path, json=body)).headers["X-Octavo-Warning"]
                assert "'add_special_token', perhaps add_special_tokens" in warning
                assert "'temprature', perhaps temperature" in warning
            plain = await client.post(COMPLETIONS, json={"prompt": "ABC"})
            assert "X-Octavo-Warning" not in plain.headers

    with caplog.at_level(logging.INFO, logger="octavo"):
        run(session)


LENIENT: list[dict[str, Any]] = [
    {"stop": ""},
    {"stop": ["", "\u0001"]},
    {"max_tokens": -1},
    {"top_k": -1},
    {"seed": -1, "temperature": 0},
    {"temperature": 0, "top_p": 0},
    {"model": "", "user": 5, "logprobs": False},
    {name: None for name in CompletionBody.model_fields if name != "prompt"},
]


@pytest.mark.parametrize("fields", LENIENT, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_others_take_is_taken(tmp_path, path, fields):
    async def session() -> None:
        base = {"messages": USER} if path == CHAT else {"prompt": "ABC"}
        async with serving(fake_llm(tmp_path)) as (client, _):
            response = await client.post(path, json={**base, **fields})
            assert response.status_code == 200, response.text
            asked = response.json()["usage"]["completion_tokens"]
            if "max_tokens" in fields and fields["max_tokens"] is None:
                assert asked <= 16 or path == CHAT

    run(session)


def test_a_length_of_minus_one_fills_the_context(tmp_path):
    async def session() -> None:
        llm = fake_llm(tmp_path, max_model_len=64)
        async with serving(llm) as (client, _):
            for path, name in [(CHAT, "max_completion_tokens"), (COMPLETIONS, "max_tokens")]:
                base = {"messages": USER} if path == CHAT else {"prompt": "ABC"}
                body = {**base, name: -1, "ignore_eos": True}
                usage = (await client.post(path, json=body)).json()["usage"]
                assert usage["total_tokens"] == 64
            error = error_of(await client.post(path, json={**base, "max_tokens": 0}), 400)
            assert error["param"] == "max_tokens"

    run(session)


def test_rarely_used_filters_and_words_reach_the_parameters() -> None:
    asked: dict[str, Any] = {
        "top_n_sigma": 1.5,
        "typical_p": 0.9,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "dry_multiplier": 0.8,
        "dry_allowed_length": 3,
        "dry_sequence_breakers": ["a"],
        "allowed_token_ids": [7, 3, 7],
        "bad_words": ["no", "never ever"],
    }
    for body in (
        ChatBody(messages=USER, **asked),  # type: ignore[arg-type]
        CompletionBody(prompt="x", **asked),
    ):
        params = read_params(body, {})
        lists = {"bad_words": ("no", "never ever"), "dry_sequence_breakers": ("a",)}
        expected = {**asked, **lists, "allowed_token_ids": (3, 7)}
        assert {name: getattr(params, name) for name in asked} == expected
        assert not slips(body)


def test_the_documentation_lists_fields_as_offered_or_as_refused() -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    section = text.split("### Fields of a request")[1].split("\n## ")[0]
    lists = [part for part in section.split("\n\n") if part.startswith("Of ")]
    assert "bad_words" not in lists[0] and "typical_p" in lists[2]
    listed = set(re.findall(r"`([a-z_]+)`", " ".join(lists)))
    offered = ChatBody.model_fields.keys() | CompletionBody.model_fields.keys()
    assert len(listed) > 40 and listed - {"max_completion_tokens"} <= offered
    refused = section.split("is refused with its name: ")[1].split(" … ")[0]
    named = set(re.findall(r"`([a-z_]+)`", refused.replace("`echo` in a chat", "")))
    assert named and not named & listed
