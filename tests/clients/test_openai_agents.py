"""OpenAI's Agents SDK with its default model, which speaks the Responses API."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from clients.scenes import ARGUMENTS, HELLO, MODEL, RESULT, Served

_REASON = "needs openai-agents: make test-clients installs it"
agents = pytest.importorskip("agents", reason=_REASON)


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Bea"]
    age: int = pydantic.Field(ge=10, le=99)


def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


def make_agent(parrot: Served, **options: Any) -> Any:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=parrot.api, api_key="none", max_retries=0)
    model = agents.OpenAIResponsesModel(model=MODEL, openai_client=client)
    settings = agents.ModelSettings(temperature=0, max_tokens=200, **options.pop("settings", {}))
    return agents.Agent(name="octavo", model=model, model_settings=settings, **options)


def test_an_answer(parrot: Served) -> None:
    agent = make_agent(parrot, instructions="Be kind.")
    result = asyncio.run(agents.Runner.run(agent, "hello"))
    assert result.final_output == HELLO
    assert parrot.seen()[0] == {"role": "system", "content": "Be kind."}
    usage = result.context_wrapper.usage
    assert usage.output_tokens == 4 and usage.total_tokens == usage.input_tokens + 4


def test_its_default_client(parrot: Served) -> None:
    """As a program sets it up for a server of its own: by the address alone."""
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=parrot.api, api_key="none", max_retries=0)
    agents.set_default_openai_client(client, use_for_tracing=False)
    agent = agents.Agent(name="octavo", model=MODEL)
    assert asyncio.run(agents.Runner.run(agent, "hello")).final_output == HELLO


def test_a_tool_is_called_and_its_result_told(parrot: Served) -> None:
    agent = make_agent(parrot, tools=[agents.function_tool(add)])
    result = asyncio.run(agents.Runner.run(agent, "add"))
    assert result.final_output == RESULT
    _, asked, told = parrot.seen()
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert (told["role"], told["content"]) == ("tool", "5")


def test_a_stream_with_a_tool(parrot: Served) -> None:
    agent = make_agent(parrot, tools=[agents.function_tool(add)])

    async def test() -> tuple[list[str], str]:
        result = agents.Runner.run_streamed(agent, "add")
        kinds = []
        async for event in result.stream_events():
            if event.type == "raw_response_event":
                kinds.append(event.data.type)
        return kinds, result.final_output

    kinds, output = asyncio.run(test())
    assert output == RESULT
    assert kinds.count("response.completed") == 2
    assert "response.function_call_arguments.delta" in kinds
    assert "response.output_text.delta" in kinds


def test_a_conversation_goes_on(parrot: Served) -> None:
    agent = make_agent(parrot, tools=[agents.function_tool(add)])

    async def test() -> Any:
        first = await agents.Runner.run(agent, "add")
        more = [*first.to_input_list(), {"role": "user", "content": "hello"}]
        return await agents.Runner.run(agent, more)

    assert asyncio.run(test()).final_output == HELLO
    roles = [message["role"] for message in parrot.seen()]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]


def test_an_output_type(parrot: Served) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    settings = {"extra_body": {"seed": 1}}
    agent = make_agent(parrot, output_type=Person, settings=settings)
    agent.model_settings.temperature = 1
    assert isinstance(asyncio.run(agents.Runner.run(agent, "hello")).final_output, Person)


def test_a_handoff_to_another_agent(parrot: Served) -> None:
    """A tool without parameters, which must be called."""
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    other = make_agent(parrot, handoff_description="says hello")
    other.name = "other"
    agent = make_agent(
        parrot, handoffs=[other], settings={"tool_choice": "required", "parallel_tool_calls": False}
    )
    result = asyncio.run(agents.Runner.run(agent, "hello"))
    assert result.last_agent.name == "other" and result.final_output == RESULT
    call = next(message for message in parrot.seen() if message.get("tool_calls"))
    assert call["tool_calls"][0]["function"]["name"] == "transfer_to_other"
    assert json.dumps(parrot.seen()[-1]).count("other") == 1
