"""Everything at once: answers, streams, clients that go, deadlines, bad bodies, too little cache.

Nothing leaks, nothing is wrong, and there is no 5xx but 503 and 504. OCTAVO_TEST_EXPLORE asks for
ten thousand requests, other ones in every run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

from fake_runtime import EOS
from server_helpers import RawClient, events_of, run, serving, tiny_llm

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.server.service import Service

EXPLORE = bool(os.environ.get("OCTAVO_TEST_EXPLORE"))
COUNT = 10_000 if EXPLORE else 500
USERS = 24
BAD: list[dict[str, Any]] = [
    {"temperature": -1},
    {"prompt": []},
    {"prompt": "A" * 400},
    {"n": 0},
    {"stop_token_ids": [10_000]},
    {"logit_bias": {"x": 1}},
]


def make_body(rng: random.Random) -> dict[str, Any]:
    """A request whose answer is a function of itself alone."""
    body: dict[str, Any] = {
        "prompt": [rng.randrange(6, 80) for _ in range(rng.choice([3, 17, 40, 90]))],
        "max_tokens": rng.choice([1, 8, 30, 60]),
        "temperature": rng.choice([0.0, 0.9]),
        "seed": rng.randrange(1000),
        "n": rng.choice([1, 1, 1, 2, 3]),
        "stream": rng.random() < 0.5,
        "priority": rng.choice([0, 0, 1, -1]),
    }
    if rng.random() < 0.2:
        body["presence_penalty"] = 0.7
    if rng.random() < 0.3:
        body["prompt"] = [*range(6, 6 + 48), *body["prompt"][:9]]  # a prefix that many share
    return body


class Soak:
    """Users that ask one thing after another, and what came of it."""

    def __init__(self, service: Service, rng: random.Random) -> None:
        self.service = service
        self.rng = rng
        self.statuses: Counter[int] = Counter()
        self.gone = 0
        self.answers: list[tuple[dict[str, Any], list[str]]] = []

    async def user(self, count: int) -> None:
        for _ in range(count):
            kind = self.rng.random()
            body = make_body(self.rng)
            if kind < 0.1:
                body |= self.rng.choice(BAD)
            elif kind < 0.25:
                body["timeout"] = self.rng.choice([0.001, 0.01, 0.1])
            raw = RawClient(self.service, "/v1/completions", body)
            task = asyncio.ensure_future(raw.run())
            if 0.25 <= kind < 0.5:
                await asyncio.wait([task], timeout=self.rng.choice([0.0, 0.002, 0.02, 0.1]))
                raw.gone.set()
                self.gone += not task.done()
                await task
                continue
            await task
            status = raw.sent[0]["status"]
            self.statuses[status] += 1
            if status == 200 and kind >= 0.5:
                content = b"".join(message.get("body", b"") for message in raw.sent)
                self.answers.append((body, texts_of(body, content.decode())))


def texts_of(body: dict[str, Any], content: str) -> list[str]:
    if not body["stream"]:
        return [choice["text"] for choice in json.loads(content)["choices"]]
    texts = [""] * body["n"]
    for event in events_of(content):
        assert "error" not in event, event
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def solo(llm: LLM, body: dict[str, Any]) -> list[str]:
    """The same request, alone."""
    names = ("max_tokens", "temperature", "seed", "n", "presence_penalty")
    params = SamplingParams(**{name: body[name] for name in names if name in body})
    (output,) = llm.generate([body["prompt"]], params, progress=False)
    return [answer.text for answer in output.outputs]


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_everything_at_once(tmp_path: Path) -> None:
    # Eight sequences of up to 150 tokens want 76 blocks; there are 18.
    llm = tiny_llm(tmp_path / "served", num_blocks=18, max_waiting_requests=14)
    rng = random.Random(None if EXPLORE else 11)
    found: list[Soak] = []
    memory: list[int] = []

    async def test() -> None:
        async with serving(llm) as (_, service):
            soak = Soak(service, rng)
            found.append(soak)
            for _ in range(5):
                await asyncio.gather(*(soak.user(COUNT // (5 * USERS)) for _ in range(USERS)))
                memory.append(resident_bytes())
            assert service.engine.num_open == 0
            assert service.metrics is not None

    run(test, seconds=1200)
    (soak,) = found
    assert set(soak.statuses) <= {200, 400, 429, 504}, soak.statuses
    assert min(soak.statuses[status] for status in (200, 400, 429, 504)) > COUNT / 100
    assert soak.gone > COUNT / 20
    assert llm.engine.stats().num_preemptions > 0 and llm.engine.stats().num_prefix_hits > 0
    assert memory[-1] - memory[0] < 30 << 20, memory
    alone = tiny_llm(tmp_path / "alone")
    assert len(soak.answers) > COUNT / 10 and EOS == 5
    for body, texts in soak.answers[:: 2 if len(soak.answers) < 400 else 7]:
        assert texts == solo(alone, body), body
