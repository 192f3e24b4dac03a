"""Tools that may be called and are strict: what a model writes, and what each API gives."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from grammar_helpers import allowed_tokens
from server_helpers import error_of, run, serving
from tool_parrot import (
    ADD,
    CHAT,
    MESSAGES,
    PARAMETERS,
    PLAIN,
    RESPONSES,
    TEMPLATE,
    arguments,
    chat,
    choice_of,
    load,
)

from octavo.llm import LLM
from octavo.server.answer_grammar import answer_grammar
from octavo.server.answers import Markup
from octavo.server.protocol import ChatBody
from octavo.server.reasoning import before_tag
from octavo.server.tools import TAGS, ToolFormat
from octavo.text.chat import ChatTemplate

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(tmp_path_factory.mktemp("model"))


def test_a_strict_tool_gets_arguments_of_its_schema(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            for strict, found in ((True, 12), (False, "x"), (None, "x")):
                for more in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}):
                    body = chat("ask", {**ADD, "strict": strict}, **more)
                    choice = await choice_of(client, body)
                    assert arguments(choice) == [{"a": found}]
                    assert choice["finish_reason"] == "tool_calls"
            # Another tool that is strict changes nothing for this one, but that it gets an object.
            other = {"name": "other", "strict": True}
            choice = await choice_of(client, chat("ask", ADD, other))
            assert arguments(choice) == [{"a": "x"}]

    run(test)


def test_the_responses_api_is_strict_unless_a_tool_says_no(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, service):
            for strict, found in ((True, 12), (None, 12), (False, "x")):
                tool = {"type": "function", **ADD, "strict": strict}
                body = {"input": "ask", "temperature": 0, "max_output_tokens": 60, "tools": [tool]}
                (item,) = (await client.post(RESPONSES, json=body)).json()["output"]
                assert json.loads(item["arguments"]) == {"a": found}
            # What cannot be enforced is left out of a tool that says nothing.
            odd = {**PARAMETERS, "not": {"required": ["b"]}}
            for strict in (None, True):
                tool = {"type": "function", "name": "add", "parameters": odd, "strict": strict}
                answer = await client.post(RESPONSES, json={**body, "tools": [tool]})
                if strict:
                    error = error_of(answer, 400)
                    assert error["param"] == "tools[0].parameters" and '"not"' in error["message"]
                else:
                    assert json.loads(answer.json()["output"][0]["arguments"]) == {"a": 12}
            # And the default refuses nothing that would go without it.
            tool, fields = {"type": "function", **ADD}, {"ignore_eos": True, "max_output_tokens": 9}
            answer = await client.post(RESPONSES, json={**body, "tools": [tool], **fields})
            assert answer.status_code == 200, answer.text
            service.markup = replace(service.markup, tools="pythonic")
            parameters = {"anyOf": [PARAMETERS]}
            tool = {"type": "function", "name": "add", "parameters": parameters}
            answer = await client.post(RESPONSES, json={**body, "tools": [tool]})
            assert answer.status_code == 200, answer.text

    run(test)


def test_the_messages_api_knows_strict(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            for strict, found in ((True, 12), (False, "x")):
                tool = {"name": "add", "input_schema": PARAMETERS, "strict": strict}
                user = {"role": "user", "content": "ask"}
                body = {"messages": [user], "max_tokens": 60, "temperature": 0, "tools": [tool]}
                message = (await client.post(MESSAGES, json=body)).json()
                (block,) = message["content"]
                assert block["input"] == {"a": found} and message["stop_reason"] == "tool_use"
                # An answer that has begun thinks no more: its tags are text, in which calls are.
                begun = [user, {"role": "assistant", "content": "dream"}]
                answer = await client.post(MESSAGES, json={**body, "messages": begun})
                first, *others = answer.json()["content"]
                assert first["text"].startswith("<think>~Hm")
                assert [block["type"] for block in others[:1]] == ["tool_use"] * strict

    run(test)


@pytest.mark.parametrize("tool_format", [*TAGS])
def test_an_answer_without_a_call_is_what_it_is_without_strict(
    llm: LLM, tool_format: ToolFormat
) -> None:
    """Tokens and log-probabilities, with marks that are half written and tokens that are hidden."""
    is_leading = tool_format in ("llama3_json", "pythonic")
    words = ["plain", "tell", "muse", *([] if is_leading else ["veiled"])]
    ends = {"plain": "think> é.", "veiled": "<|tool_call", "tell": "}", "muse": "Yes"}

    async def test() -> None:
        async with serving(llm) as (client, service):
            service.markup = replace(service.markup, tools=tool_format)
            for word in words:
                found = []
                for strict in (True, None):
                    body = chat(word, {**ADD, "strict": strict}, logprobs=True, seed=4)
                    for temperature in (0, 1.5):
                        sent = {**body, "temperature": temperature}
                        found += (await client.post(CHAT, json=sent)).json()["choices"]
                assert found[:2] == found[2:], word
                assert found[0]["message"]["content"].endswith(ends[word])

    run(test)


def test_before_a_call_nothing_is_masked(llm: LLM) -> None:
    """But bytes that are no text, and what goes on behind a mark as no call does.

    Tokens that are not shown do not stand between the halves of a mark, which they would join.
    """
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    body = ChatBody.model_validate(chat("x", {**ADD, "strict": True}))
    wanted = answer_grammar(body, None, Markup("hermes"), None)
    assert wanted is not None
    matcher = llm.engine.grammars.compile(wanted).matcher(continues=True)
    hidden = tokenizer.special_ids - set(llm.engine.eos_token_ids)
    texts = {t: tokenizer.bytes_of(t) for t in range(tokenizer.vocab_size)}
    plain = {t for t, text in texts.items() if text.isascii()} - tokenizer.special_ids
    so_far = b""
    for token in tokenizer.encode("".join(PLAIN), add_special_tokens=False):
        allowed, may_end = allowed_tokens(matcher)
        assert may_end
        assert all(b"<tool_call>" in so_far + texts[t] for t in plain - allowed)
        is_half = before_tag(so_far.decode(), "<tool_call>")[1] != ""
        assert hidden & allowed == (set() if is_half else hidden), so_far
        matcher.accept(token)
        so_far += texts[token]


def test_calls_are_one_or_many(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            tokens = []
            for parallel in (True, None, False):
                body = chat("often", {**ADD, "strict": True}, parallel_tool_calls=parallel)
                choice = await choice_of(client, {**body, "logprobs": True})
                shown = choice["message"]["content"]
                assert shown.strip() == ("Both:" if parallel is False else "Both:  So.")
                many = [{"a": 12}, {"a": 34}]
                assert arguments(choice) == (many[:1] if parallel is False else many)
                tokens.append(len(choice["logprobs"]["content"]))
            assert tokens == [5, 5, 3]  # behind the only call nothing more is written

    run(test)


def test_what_is_thought_is_free(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = chat("dream", {**ADD, "strict": True})
            choice = await choice_of(client, body)
            assert arguments(choice) == [{"a": 12}]
            assert choice["message"]["reasoning"] == "~Hm <tool_call>"
            # Where it stays in the text, calls are looked for in it, so they follow the schema.
            body = {**body, "separate_reasoning": False}
            choice = (await client.post(CHAT, json=body)).json()["choices"][0]
            assert choice["message"]["content"].startswith("<think>~Hm ")
            assert all(10 <= found["a"] <= 99 for found in arguments(choice))
            assert choice["message"]["tool_calls"]
        before, llm.chat_template = llm.chat_template, ChatTemplate(TEMPLATE + "<think>~")
        async with serving(llm, reasoning_parser="deepseek_r1") as (client, _):
            choice = await choice_of(client, chat("x", {**ADD, "strict": True}))
            assert arguments(choice) == [{"a": 12}]
            assert choice["message"]["reasoning"] == "Hm <tool_call>"
        llm.chat_template = before

    run(test)


WRONG: list[tuple[ToolFormat, dict[str, Any], str, str]] = [
    ("hermes", {"guided_regex": "a"}, "guided_regex", "guided_regex says what the text is"),
    ("hermes", {"ignore_eos": True}, "ignore_eos", "calls of tools"),
    (
        "llama3_json",
        {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
        "response_format",
        "need not follow the schemas of tools with strict",
    ),
]
BAD_PARAMETERS: list[tuple[ToolFormat, Any, str]] = [
    ("hermes", {**PARAMETERS, "not": {}}, '"not"'),
    ("qwen3_coder", {**PARAMETERS, "minProperties": 3, "maxProperties": 2}, "minProperties"),
    ("mistral", {"type": "string"}, "of type 'string'"),
    ("pythonic", {"anyOf": [PARAMETERS]}, "Python's syntax"),
    ("olmo3", {"properties": {"a b": {}}}, "Python's syntax"),
    ("llama3_json", ["a"], "list"),
]


def test_what_cannot_be_enforced_is_refused(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, service):
            for tool_format, fields, param, message in WRONG:
                service.markup = replace(service.markup, tools=tool_format)
                for strict in (True, False):
                    body = chat("ask", {**ADD, "strict": strict}, **fields)
                    answer = await client.post(CHAT, json=body)
                    assert answer.status_code == (400 if strict else 200), answer.text
                    if strict:
                        error = error_of(answer, 400)
                        assert error["param"] == param and message in error["message"]
            for tool_format, parameters, message in BAD_PARAMETERS:
                service.markup = replace(service.markup, tools=tool_format)
                function = {"name": "f", "parameters": parameters, "strict": True}
                error = error_of(await client.post(CHAT, json=chat("ask", ADD, function)), 400)
                assert error["param"] == "tools[1].function.parameters", error
                assert message in error["message"]
                function["strict"] = False
                answer = await client.post(CHAT, json=chat("plain", ADD, function))
                assert answer.status_code == 200

    run(test)


def test_a_grammar_of_tools_is_compiled_once(llm: LLM) -> None:
    grammars = llm.engine.grammars

    async def test() -> None:
        async with serving(llm) as (client, _):
            body = chat("ask", {**ADD, "name": "once", "strict": True})
            before = grammars.num_compiled
            for word in ("ask", "plain"):
                body["messages"][0]["content"] = word
                await client.post(CHAT, json=body)
            assert grammars.num_compiled == before + 1

    run(test)
