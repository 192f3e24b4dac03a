"""Beam search through the API, as vLLM spells it, and what does not go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runtime import VOCAB, top_tokens
from server_helpers import error_of, fake_llm, run, serving

from octavo.llm import LLM
from octavo.reference.search import beam_search

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
IDS = [3, 60, 31]


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


def fake_row(history: list[int]) -> np.ndarray:
    tokens, logprobs = top_tokens(history, VOCAB)
    row = np.zeros(VOCAB, np.float32)
    row[list(tokens)] = logprobs
    return row


def test_the_beams_are_the_choices(llm: LLM) -> None:
    body: dict[str, Any] = {"use_beam_search": True, "max_tokens": 6, "ignore_eos": True, "n": 3}
    body |= {"length_penalty": 0.5, "early_stopping": "never", "temperature": 0}
    grouped = {**body, "n": 4, "num_beam_groups": 2, "diversity_penalty": 0.8}

    async def test() -> None:
        async with serving(llm) as (client, _):
            for asked, groups, penalty in ((body, 1, 0.0), (grouped, 2, 0.8)):
                response = await client.post(COMPLETIONS, json={**asked, "prompt": IDS})
                assert response.status_code == 200, response.text
                found = response.json()
                expected = beam_search(
                    fake_row, IDS, asked["n"], 6, (), 0.5, "never", groups, penalty
                )
                texts = ["".join(chr(33 + t) for t in tokens if t != 5) for tokens, _ in expected]
                assert [choice["text"] for choice in found["choices"]] == texts
                assert found["usage"]["completion_tokens"] == 6 * asked["n"]
            response = await client.post(CHAT, json={**body, "messages": USER})
            assert len(response.json()["choices"]) == 3

    run(test)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"use_beam_search": True, "stream": True}, "stream"),
    ({"use_beam_search": True, "presence_penalty": 0.5}, "presence_penalty"),
    ({"use_beam_search": True, "temperature": 0.7}, "temperature"),
    ({"use_beam_search": True, "logprobs": 1}, "logprobs"),
    ({"use_beam_search": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"use_beam_search": True, "stop": ["x"]}, "stop"),
    ({"use_beam_search": True, "min_tokens": 2}, "min_tokens"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
    ({"use_beam_search": True, "n": 3, "num_beam_groups": 2}, None),  # type: ignore[list-item]
    ({"use_beam_search": True, "n": 100}, None),  # type: ignore[list-item]
]


def test_what_does_not_go_with_it_is_named(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            for body, name in WRONG:
                asked = {"prompt": IDS, "max_tokens": 5, **body}
                error = error_of(await client.post(COMPLETIONS, json=asked), 400)
                assert name is None or (error["param"] or "").startswith(name), (body, error)
            plain = {"prompt": IDS, "max_tokens": 2, "length_penalty": 1.0, "early_stopping": False}
            assert (await client.post(COMPLETIONS, json=plain)).status_code == 200

    run(test)
