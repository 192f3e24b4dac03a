"""What a model thinks, told from its answer: cut anywhere, streamed or whole, before a schema."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parrot import END, GO, say, write_parrot
from server_helpers import error_of, events_of, run, serving

from octavo import LLM
from octavo.server.reasoning import REASONING, Reasoning, ReasoningParser, detect_reasoning

CHAT = "/v1/chat/completions"
THINK = REASONING["qwen3"]
# A template as Qwen3's: thoughts of earlier turns are left out, an empty one asks for none.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{% endfor %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}" + GO
)
OPEN = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}<think>"  # as R1's
TOOL_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def parsed(parser: ReasoningParser, pieces: list[str]) -> tuple[str, str]:
    """What was thought, and the answer."""
    found = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    thought = "".join(piece.text for piece in found if isinstance(piece, Reasoning))
    return thought, "".join(piece for piece in found if isinstance(piece, str))


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize(
    ("text", "start", "thought", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "before", "Hm.", "Yes."),
        ("\n <think>Hm, a  b.</think>Yes. ", "before", "Hm, a  b.", "Yes. "),
        ("\nHm.\n\nSo:\n</think>\nYes.", "inside", "Hm.\n\nSo:", "Yes."),
        ("\n<think>\nHm.</think>Yes.", "inside", "Hm.", "Yes."),
        ("<thi", "inside", "<thi", ""),
        ("Hm, <think>", "inside", "Hm, <think>", ""),
        ("Yes, <think> is a tag.", "before", "", "Yes, <think> is a tag."),
        ("  Yes.", "before", "", "  Yes."),
        ("Hm.</think>", "behind", "", "Hm.</think>"),
        ("<think>Hm, </thin or", "before", "Hm, </thin or", ""),
        ("<think>Hm, </thin", "before", "Hm, </thin", ""),
        ("<think>\n\n</think>\n\nYes.", "before", "", "Yes."),
        ("<think>a</think>b</think>c", "before", "a", "b</think>c"),
        ("<thi", "before", "", "<thi"),
        ("<think> ", "before", "", ""),
        ("", "inside", "", ""),
    ],
)
def test_thoughts_and_answers(text: str, start: Any, thought: str, answer: str) -> None:
    for size in (1, 2, 3, 5, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert parsed(ReasoningParser(THINK, start), pieces) == (thought, answer)


@given(
    st.text("ab \n</thinkTHINK>[]", max_size=30),
    st.text("ab \n<think/>", max_size=30),
    st.sampled_from(list(REASONING.values())),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_any_cut_gives_the_same(
    thought: str, answer: str, tags: Any, is_inside: bool, places: list[int]
) -> None:
    thought = thought.replace(tags.end, "")
    if tags.end in thought:  # the cut has joined one
        return
    if is_inside and thought.lstrip().startswith(tags.begin):
        return
    text = f"{'' if is_inside else tags.begin}{thought}{tags.end}{answer}"
    parser = ReasoningParser(tags, "inside" if is_inside else "before")
    assert parsed(parser, cut(text, places)) == (thought.strip(), answer.lstrip())


def test_templates_and_prompts_tell_where_an_answer_begins() -> None:
    assert detect_reasoning(TEMPLATE) is THINK and detect_reasoning("{{ messages }}") is None
    assert detect_reasoning("[THINK]{{ x }}[/THINK]") is REASONING["mistral"]
    starts = {"hi<go>": "before", "hi<think>\n": "inside", "<think>\n\n</think>\n\n": "behind"}
    for prompt, start in starts.items():
        assert THINK.start(prompt) == start
    assert THINK.start(None) == "before" and REASONING["deepseek_r1"].start("hi") == "inside"


def thinker(folder: Path, *tokens: str, template: str = TEMPLATE, after: str = GO) -> LLM:
    """A model that says these tokens."""
    return LLM(write_parrot(folder, say(*tokens, after=after), template=template), num_threads=1)


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}], "temperature": 0, **fields}


async def streamed(client: Any, **fields: Any) -> dict[str, Any]:
    """The message that the pieces of a stream make."""
    text = (await client.post(CHAT, json=body(stream=True, **fields))).text
    found: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "calls": ""}
    for event in events_of(text):
        delta = event["choices"][0]["delta"]
        for name in ("content", "reasoning", "reasoning_content"):
            found[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            found["calls"] += call["function"]["arguments"]
        found["finish_reason"] = event["choices"][0]["finish_reason"]
    return found


def test_a_message_has_both_names_of_it(tmp_path: Path) -> None:
    llm = thinker(tmp_path, "<think>", "\nHm", ", so.\n", "</think>", "\n\n", "Paris", ".")

    async def test() -> None:
        async with serving(llm) as (client, _):
            choice = (await client.post(CHAT, json=body())).json()["choices"][0]
            message = choice["message"]
            assert (message["content"], choice["finish_reason"]) == ("Paris.", "stop")
            assert message["reasoning"] == message["reasoning_content"] == "Hm, so."
            found = await streamed(client)
            assert found["content"] == "Paris." and found["finish_reason"] == "stop"
            assert found["reasoning"] == found["reasoning_content"] == "Hm, so."
            cut_off = (await client.post(CHAT, json=body(max_tokens=3))).json()["choices"][0]
            assert cut_off["message"]["content"] is None
            assert cut_off["message"]["reasoning"] == "Hm, so."
            assert cut_off["finish_reason"] == "length"
            hidden = body(include_reasoning=False)
            message = (await client.post(CHAT, json=hidden)).json()["choices"][0]["message"]
            assert message == {"role": "assistant", "content": "Paris."}
            for field in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
                message = (await client.post(CHAT, json=body(**field))).json()["choices"][0][
                    "message"
                ]
                assert message["content"] == "<think>\nHm, so.\n</think>\n\nParis."
                assert "reasoning" not in message
            error_of(await client.post(CHAT, json=body(reasoning_format="x")), 400)
        async with serving(llm, reasoning_parser="none") as (client, _):
            message = (await client.post(CHAT, json=body())).json()["choices"][0]["message"]
            assert message["content"].startswith("<think>") and "reasoning" not in message

    run(test)


def test_tags_that_are_special_tokens_stay_beside_what_is_thought(tmp_path: Path) -> None:
    chain = say("<think>", "Hm.", "</think>", "Yes.")
    tags = ("<think>", "</think>")
    llm = LLM(write_parrot(tmp_path, chain, template=TEMPLATE, special=tags), num_threads=1)

    async def test() -> None:
        async with serving(llm) as (client, _):
            for field, content in ({}, "Yes."), ({"separate_reasoning": False}, "".join(chain)):
                sent = body(logprobs=True, **field)
                choice = (await client.post(CHAT, json=sent)).json()["choices"][0]
                assert choice["message"]["content"] == content.removeprefix(GO)
                data = [byte for token in choice["logprobs"]["content"] for byte in token["bytes"]]
                assert bytes(data).decode() == "<think>Hm.</think>Yes."
                found = await streamed(client, **field)
                assert found["content"] == choice["message"]["content"]

    run(test)


def test_the_prompt_may_have_begun_it(tmp_path: Path) -> None:
    llm = thinker(tmp_path, "Hm.", "</think>", "Yes.", template=OPEN, after="<think>")

    async def test() -> None:
        async with serving(llm) as (client, _):
            message = (await client.post(CHAT, json=body())).json()["choices"][0]["message"]
            assert (message["reasoning"], message["content"]) == ("Hm.", "Yes.")
            found = await streamed(client)
            assert (found["reasoning"], found["content"]) == ("Hm.", "Yes.")

    run(test)


def test_an_answer_without_it_is_an_answer(tmp_path: Path) -> None:
    """The template has closed the thinking already."""
    llm = thinker(tmp_path, "<think>", " is a tag", "</think>")
    off = {"chat_template_kwargs": {"enable_thinking": False}}

    async def test() -> None:
        async with serving(llm) as (client, _):
            message = (await client.post(CHAT, json=body(**off))).json()["choices"][0]["message"]
            # The prompt ends with <go>, so nothing says that the tags before it are closed.
            assert message["reasoning"] == "is a tag"
        llm.chat_template = type(llm.chat_template)(TEMPLATE.removesuffix(GO))  # type: ignore
        async with serving(llm) as (client, _):
            answer = await client.post(CHAT, json=body(max_tokens=1, **off))
            assert "reasoning" not in answer.json()["choices"][0]["message"]

    run(test)


def test_earlier_thoughts_reach_the_template_by_either_name(tmp_path: Path) -> None:
    llm = thinker(tmp_path, "Yes.")

    async def test() -> None:
        async with serving(llm) as (client, _):
            for name in ("reasoning", "reasoning_content"):
                turns = [{"role": "assistant", "content": "a", name: "Hm."}]
                sent = {"messages": turns, "return_token_strs": True}
                found = (await client.post("/tokenize", json=sent)).json()["token_strs"]
                assert "".join(found) == f"a<think>Hm.</think>{GO}"

    run(test)


@pytest.mark.parametrize("template", [TEMPLATE, OPEN])
def test_a_schema_holds_behind_it(tmp_path: Path, template: str) -> None:
    """The parrot wants to say no JSON at all: what it thinks is free, and then it must."""
    is_open = template is OPEN
    chain: dict[str, Any] = say(
        *([] if is_open else ["<think>"]),
        "Hm",
        "</think>",
        "nonsense",
        after="<think>" if is_open else GO,
    )
    chain["</think>"] = {"nonsense": 20.0, '{"a": ': 10.0}
    chain['{"a": '] = {"nonsense": 20.0, "5": 10.0}
    chain["5"] = {"nonsense": 20.0, "}": 10.0}
    chain["}"] = {"nonsense": 20.0, END: 10.0}
    llm = LLM(write_parrot(tmp_path, chain, template=template), num_threads=1)
    formats: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_object"}},
        {"guided_json": SCHEMA},
        {"guided_regex": r'\{"a": 5\}'},
        {"guided_choice": ['{"a": 5}', '{"b": 5}']},
        {"guided_grammar": 'start: "{" "\\"a\\": 5" "}"'},
        {
            "response_format": {
                "type": "structural_tag",
                "format": {"type": "json_schema", "json_schema": SCHEMA},
            }
        },
    ]

    async def test() -> None:
        async with serving(llm) as (client, _):
            for fields in formats:
                answer = (await client.post(CHAT, json=body(max_tokens=40, **fields))).json()
                message = answer["choices"][0]["message"]
                assert message["reasoning"] == "Hm", fields
                assert json.loads(message["content"]) == {"a": 5}, fields
            # One schema is in two of the formats.
            assert llm.engine.grammars.num_compiled == len(formats) - 1
            misspelt = {"properties": {"a": {"type": "integr"}}}
            for schema in (5, misspelt):
                wrong = {"response_format": {"type": "json_schema", "json_schema": {}}}
                wrong["response_format"]["json_schema"] = {"schema": schema}
                error = error_of(await client.post(CHAT, json=body(**wrong)), 400)
                assert error["param"] == "response_format"
            assert error["message"].startswith(
                "the JSON schema cannot be followed at /properties/a"
            )
            for tag in ({}, {"structures": [5]}):  # without a format
                wrong = {"response_format": {"type": "structural_tag", **tag}}
                error = error_of(await client.post(CHAT, json=body(**wrong)), 400)
                assert error["message"].startswith("structural_tag")

    run(test)


def test_calls_that_must_come_are_behind_it(tmp_path: Path) -> None:
    template = TEMPLATE + "{# <tool_call> {{ tools }} #}"
    chain: dict[str, Any] = say("<think>", "Hm", "</think>", "\n", TOOL_CALL)
    llm = LLM(write_parrot(tmp_path, chain, template=template), num_threads=1)

    async def test() -> None:
        async with serving(llm) as (client, _):
            for choice in ("auto", "required", {"type": "function", "function": {"name": "add"}}):
                fields = {"tools": [ADD], "tool_choice": choice, "max_tokens": 60}
                answer = (await client.post(CHAT, json=body(**fields))).json()["choices"][0]
                message = answer["message"]
                assert (message["reasoning"], message["content"]) == ("Hm", None)
                (call,) = message["tool_calls"]
                assert json.loads(call["function"]["arguments"]) == {"a": 1}
                found = await streamed(client, **fields)
                assert found["reasoning"] == "Hm" and json.loads(found["calls"]) == {"a": 1}
                assert found["finish_reason"] == "tool_calls"

    run(test)
