"""Ways to choose the next token over HTTP: as `LLM.generate` has them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_helpers import run, serving, tiny_llm

from octavo.sampling_params import SamplingParams

PROMPT = "A(b2A(b2A("
COMPLETIONS = "/v1/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}


def test_dry_bad_words_and_allowed_tokens(tmp_path: Path) -> None:
    """Over the same engine: the texts of Python's parameters, and none of them is the plain one."""
    llm = tiny_llm(tmp_path)
    (output,) = llm.generate(PROMPT, SamplingParams(**GREEDY), progress=False)
    plain = output.text
    asked: list[dict[str, Any]] = [
        {"dry_multiplier": 4.0, "dry_allowed_length": 1},
        {"dry_multiplier": 4.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["M"]},
        {"bad_words": [plain[3:5], plain[0]]},
        {"allowed_token_ids": [3, 40, 41]},
    ]
    expected = [
        llm.generate(PROMPT, SamplingParams(**GREEDY, **options), progress=False)[0].text
        for options in asked
    ]
    found: list[str] = []

    async def test() -> None:
        async with serving(llm) as (client, _):
            for options in asked:
                body = {"prompt": PROMPT, **GREEDY, **options}
                response = await client.post(COMPLETIONS, json=body)
                assert response.status_code == 200, response.text
                found.append(response.json()["choices"][0]["text"])

    run(test)
    assert found == expected and len({plain, *found}) == 5
    assert plain[3:5] not in found[2] and plain[0] not in found[2]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logits_processors", ["a.b"], "a server runs no code of its clients"),
        ("bad_words", "x" * 3, "bad_words"),
        ("bad_words", [3], "bad_words"),
        ("allowed_token_ids", [], "allowed_token_ids"),
        ("allowed_token_ids", [70_000], "allowed_token_ids"),
        ("dry_multiplier", -1, "dry_multiplier"),
        ("dry_allowed_length", 0, "dry_allowed_length"),
    ],
)
def test_what_is_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    async def test() -> None:
        async with serving(tiny_llm(tmp_path)) as (client, _):
            response = await client.post(COMPLETIONS, json={"prompt": "A", field: value})
            assert response.status_code == 400 and message in response.text
            body = {"prompt": "A", "logits_processors": [], "max_tokens": 1}  # asks for nothing
            assert (await client.post(COMPLETIONS, json=body)).status_code == 200

    run(test)
