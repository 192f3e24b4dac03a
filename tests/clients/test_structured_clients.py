"""Structured answers: openai's parse(), langchain's and instructor's default modes, streamed tools.

The parrot would rather say something else: what it says is what the schemas leave it.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from clients.scenes import ADD, MODEL, Served, Sum

_REASON = "needs llguidance: pip install llguidance"
pytest.importorskip("llguidance", reason=_REASON)


class Person(pydantic.BaseModel):
    """Somebody."""

    name: Literal["Ada", "Bea"]
    age: int = pydantic.Field(ge=10, le=99)
    friend: Person | None


def user(content: str) -> Any:
    return [{"role": "user", "content": content}]


def test_openai_parses_a_class(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=user("hello"), response_format=Person, temperature=1, seed=seed
        )
        person = answer.choices[0].message.parsed
        assert isinstance(person, Person) and person.name in ("Ada", "Bea")
        assert answer.choices[0].finish_reason == "stop"


def test_openai_parses_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user("hello"), response_format=Person, temperature=1, seed=1
    ) as stream:
        for _ in stream:
            pass
        person = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(person, Person)


def test_openai_parses_the_arguments_of_a_tool(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=user("hello"),
        tools=[openai.pydantic_function_tool(Sum)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1,
        seed=2,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)


def test_openai_streams_the_arguments_of_a_tool(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    with client.chat.completions.stream(
        model=MODEL,
        messages=user("hello"),
        tools=[ADD],
        tool_choice=choice,
        temperature=1,
        seed=3,
        max_tokens=300,
    ) as stream:
        pieces = [e for e in stream if e.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls
    assert len(pieces) > 1 and "".join(e.arguments_delta for e in pieces) == call.function.arguments
    assert set(json.loads(call.function.arguments)) == {"a", "b"}


def test_vllm_s_fields_in_the_extra_body(client: openai.OpenAI) -> None:
    for extra in (
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ):
        answer = client.chat.completions.create(
            model=MODEL, messages=user("hello"), extra_body=extra
        )
        assert answer.choices[0].message.content in ("yes", "no")


def test_openai_names_the_place_of_what_is_wrong(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "strin"}}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="/properties/a: Invalid type") as refused:
        client.chat.completions.create(model=MODEL, messages=user("hello"), response_format=wanted)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("method", [None, "json_schema", "function_calling", "json_mode"])
def test_langchain_s_structured_output(parrot: Served, method: str | None) -> None:
    langchain_openai = pytest.importorskip(
        "langchain_openai", reason="needs langchain-openai: make test-clients installs it"
    )
    model = langchain_openai.ChatOpenAI(
        model=MODEL,
        base_url=parrot.api,
        api_key="none",
        temperature=1,
        seed=1,
        max_retries=0,
        max_tokens=300,
    )
    if method == "json_mode":  # any object: only that it is one can be known
        with_mode = model.bind(response_format={"type": "json_object"}, stop=["}"])
        assert with_mode.invoke("hello").content.startswith("{")
        return
    options = {} if method is None else {"method": method}
    structured = model.with_structured_output(Sum, **options)
    assert isinstance(structured.invoke("hello"), Sum)
    *_, last = structured.stream("hello")
    assert isinstance(last, Sum)


@pytest.mark.parametrize("mode", ["default", "TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor_s_modes(client: openai.OpenAI, mode: str) -> None:
    instructor = pytest.importorskip(
        "instructor", reason="needs instructor: make test-clients installs it"
    )
    modes = {} if mode == "default" else {"mode": getattr(instructor.Mode, mode)}
    found = instructor.from_openai(client, **modes).chat.completions.create(
        model=MODEL,
        messages=user("hello"),
        response_model=Sum,
        temperature=1,
        seed=1,
        max_retries=0,
    )
    assert isinstance(found, Sum)
