"""instructor where the model may choose; test_structured_clients.py has its other modes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import openai
import pydantic
import pytest

from clients.scenes import ARGUMENTS, MODEL, Served

_REASON = "needs instructor: make test-clients installs it"
instructor = pytest.importorskip("instructor", reason=_REASON)


class add(pydantic.BaseModel):  # the name of the tool
    """Add two numbers."""

    a: int
    b: int


class Person(pydantic.BaseModel):
    name: str
    age: int


def client_of(parrot: Served, mode: Any) -> Any:
    plain = openai.OpenAI(base_url=parrot.api, api_key="none", max_retries=0)
    return instructor.from_openai(plain, mode=mode)


def test_tools_that_the_model_chooses(parrot: Served) -> None:
    client = client_of(parrot, instructor.Mode.PARALLEL_TOOLS)
    found = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "add"}],
        response_model=Iterable[add],
        temperature=0,
        max_retries=0,
    )
    assert [call.model_dump() for call in found] == [ARGUMENTS]


def test_json_in_markdown(parrot: Served) -> None:
    client = client_of(parrot, instructor.Mode.MD_JSON)
    found = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "person"}],
        response_model=Person,
        temperature=0,
        max_retries=0,
    )
    assert found.model_dump() == {"name": "Ada", "age": 36}
