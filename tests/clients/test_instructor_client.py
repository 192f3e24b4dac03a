"""instructor where the model may choose; test_structured_clients.py has its other modes."""

from __future__ import annotations

from collections.abc import Iterable

import openai
import pydantic
import pytest

from clients.scenes import ARGUMENTS, MODEL

_REASON = "needs instructor: make test-clients installs it"
instructor = pytest.importorskip("instructor", reason=_REASON)


class add(pydantic.BaseModel):  # the name of the tool
    """Add two numbers."""

    a: int
    b: int


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_tools_that_the_model_chooses(client: openai.OpenAI) -> None:
    instructed = instructor.from_openai(client, mode=instructor.Mode.PARALLEL_TOOLS)
    found = instructed.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "add"}],
        response_model=Iterable[add],
        temperature=0,
        max_retries=0,
    )
    assert [call.model_dump() for call in found] == [ARGUMENTS]


def test_json_in_markdown(client: openai.OpenAI) -> None:
    instructed = instructor.from_openai(client, mode=instructor.Mode.MD_JSON)
    found = instructed.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "person"}],
        response_model=Person,
        temperature=0,
        max_retries=0,
    )
    assert found.model_dump() == {"name": "Ada", "age": 36}
