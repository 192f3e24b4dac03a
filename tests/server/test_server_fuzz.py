"""Mutated bodies by the thousand: none may give a 500, a traceback, or a server that is worse off.

OCTAVO_TEST_EXPLORE asks for fifty thousand, other ones in every run.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import message_helpers
import pytest
from response_helpers import response_events, told
from server_helpers import events_of, run, serving, tiny_llm

from octavo.server.service import Service

EXPLORE = bool(os.environ.get("OCTAVO_TEST_EXPLORE"))
COUNT = 50_000 if EXPLORE else 2_500
EXPECTED = {200, 400, 404, 405, 413, 415, 429}

SAMPLING: dict[str, Any] = {
    "model": "model",
    "max_tokens": 5,
    "min_tokens": 1,
    "n": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "stop": ["x", "yz"],
    "stop_token_ids": [7],
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {"7": 2.5},
    "stream": True,
    "stream_options": {"include_usage": True},
    "priority": 1,
    "timeout": 20.0,
    "cache_salt": "s",
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "user": "u",
}
OF_CHATS = ("n", "max_tokens", "response_format")
USER = [{"role": "user", "content": "U"}]
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {**SAMPLING, "prompt": "ABC", "logprobs": 2},
        {**SAMPLING, "prompt": ["ABC", "D"], "echo": True},
        {"prompt": [1, 2, 3], "max_tokens": 3},
        {"prompt": [[1, 2], [3]], "stream": True},
    ],
    "/v1/chat/completions": [
        {
            **SAMPLING,
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "U"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "content": "T", "tool_call_id": "c"},
            ],
            "logprobs": True,
            "top_logprobs": 2,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto",
            "chat_template_kwargs": {"date": "today"},
        },
        {"messages": [{"role": "user", "content": "U"}], "max_completion_tokens": 4},
    ],
    "/v1/responses": [
        {
            **{name: SAMPLING[name] for name in SAMPLING if name not in OF_CHATS},
            "instructions": "S",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "U"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "R"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "T"},
            ],
            "max_output_tokens": 5,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": "auto",
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "metadata": {"a": "b"},
        },
        {"input": "U", "max_output_tokens": 4},
    ],
    "/tokenize": [
        {"prompt": "ABC", "return_token_strs": True},
        {"messages": [{"role": "user", "content": "U"}], "add_generation_prompt": False},
    ],
    "/detokenize": [{"tokens": [1, 2, 3]}],
    "/v1/messages": [
        {
            **{"max_tokens": 3, "stream": True, "top_k": 5, "metadata": {"user_id": "u"}},
            **{"stop_sequences": ["x"], "thinking": {"type": "enabled", "budget_tokens": 9}},
            **{"system": [{"type": "text", "text": "S"}], "output_config": {"effort": "low"}},
            "messages": [
                {"role": "user", "content": "U"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "T", "signature": ""},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]},
            ],
            "tools": [{"name": "f", "description": "F", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
        {"max_tokens": 3, "messages": [*USER, {"role": "assistant", "content": "A"}]},
    ],
    "/v1/messages/count_tokens": [{"messages": USER, "system": "S"}],
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}A"
)
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 97, 1000, 2**31, 2**63, 2**64, -(2**63), 10**40),
    *(0.5, -0.5, 1e-45, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "A", "ABC", "~" * 60, "\x00", "é", "😀", "\ud800", "[1]", "{}", "null", "1e5"),
    *([], [[]], [None], [0], ["A"], [{}], [[1], "A"], {}, {"": None}, {"type": "text"}),
    *({"role": "user", "content": "x"}, {"a": {"b": {"c": []}}}, list(range(97)), ["A"] * 40),
]


def mutate(body: Any, rng: random.Random) -> Any:
    """One change at a random place."""
    paths: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            paths.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(body)
    strange = copy.deepcopy(rng.choice(STRANGE))
    if not paths:
        return strange
    node, key = rng.choice(paths)
    kind = rng.random()
    if kind < 0.15:
        del node[key]
    elif kind < 0.25 and isinstance(node, dict):
        node[rng.choice(["", "é", "prompt", "messages", "n", "echo", "input", "guided_json"])] = (
            strange
        )
    elif kind < 0.35 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), strange)
    elif kind < 0.45:
        node[key] = [node[key]]
    else:
        node[key] = strange
    return body


def make_content(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body: mostly JSON with a few changes, sometimes JSON with bytes changed."""
    path = rng.choice(list(BODIES))
    body: Any = copy.deepcopy(rng.choice(BODIES[path]))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 6])):
        if isinstance(body, (dict, list)):
            body = mutate(body, rng)
    content = json.dumps(body).encode()
    if rng.random() < 0.15:
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(damaged) + 1)
            damaged[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        content = bytes(damaged)
    return path, content


def check(response: httpx.Response, path: str, content: bytes) -> None:
    # A body may name a deadline, and one that has passed when it arrives.
    expected = {*EXPECTED, 504} if b"timeout" in content else EXPECTED
    assert response.status_code in expected, (response.status_code, response.text, content)
    if response.status_code != 200:
        error = response.json()["error"]
        names = {"message", "type"} if "messages" in path else {"message", "type", "param", "code"}
        assert set(error) == names and error["message"], content
    elif response.headers["content-type"].startswith("text/event-stream"):
        if response.text.startswith("event: response.created"):
            told(response_events(response.text))
        elif "messages" in path:
            message_helpers.put_together(message_helpers.events_of(response.text))
        else:
            assert all("error" not in event for event in events_of(response.text)), content
    else:
        response.json()


async def ask(client: httpx.AsyncClient, rng: random.Random, statuses: Counter[int]) -> None:
    path, content = make_content(rng)
    kind = "application/json" if rng.random() < 0.98 else rng.choice(["", "text/plain", "é"])
    headers = {"content-type": kind.encode()}
    response = await client.post(path, content=content, headers=headers)
    check(response, path, content)
    statuses[response.status_code] += 1


def test_mutated_bodies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = tiny_llm(tmp_path, TEMPLATE)
    rng = random.Random(None if EXPLORE else 5)
    statuses: Counter[int] = Counter()

    async def one_of_several(client: httpx.AsyncClient, count: int) -> None:
        for _ in range(count):
            await ask(client, rng, statuses)

    async def test() -> None:
        async with serving(llm, max_body_bytes=20_000) as (client, service):
            await asyncio.gather(*(one_of_several(client, COUNT // 10) for _ in range(10)))
            assert_alive(service)

    logging.getLogger("octavo").propagate = True
    with caplog.at_level(logging.WARNING, "octavo"):
        run(test, seconds=3000)
    assert [record.getMessage() for record in caplog.records] == []
    # Mutations that are all refused, or all accepted, would test little.
    assert statuses[200] > COUNT / 5 and statuses[400] > COUNT / 5, statuses


def assert_alive(service: Service) -> None:
    assert service.engine.health().ok and service.engine.num_open == 0
