"""`prompt_logprobs`, and `echo` with `logprobs`, as vLLM and OpenAI write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import solo_answer
from fake_runtime import rank_of, target_logprob, top_tokens
from server_helpers import fake_llm, run, serving

from octavo.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.server.prompt_logprobs import PromptLogprobs

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "A(b2c~"
IDS = [ord(character) - 33 for character in PROMPT]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


def answer(llm: LLM, path: str, body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    async def test() -> None:
        async with serving(llm) as (client, _):
            response = await client.post(path, json={**GREEDY, **body})
            assert response.status_code == 200, response.text
            found.update(response.json())

    run(test)
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_echo_with_logprobs(llm: LLM, prompt: Any, max_tokens: int) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": 2}
    found = answer(llm, COMPLETIONS, body)
    params = SamplingParams(temperature=0, max_tokens=max(max_tokens, 1), ignore_eos=True)
    tokens = [*IDS, *solo_answer(IDS, params, max_model_len=512).token_ids][: 6 + max_tokens]
    names = [chr(33 + token) for token in tokens]
    assert found["usage"]["completion_tokens"] == 2 * max_tokens
    for choice in found["choices"]:
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(names)
        assert choice["finish_reason"] == "length"
        assert logprobs["tokens"] == names
        assert logprobs["text_offset"] == list(range(len(names)))
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for place, token in enumerate(IDS[1:], 1):
            assert logprobs["token_logprobs"][place] == target_logprob(IDS[:place], token)
            best = top_tokens(IDS[:place], 2)[0]
            assert set(logprobs["top_logprobs"][place]) == {chr(33 + t) for t in (token, *best)}


def test_echo_of_several_prompts_and_without_logprobs(llm: LLM) -> None:
    found = answer(llm, COMPLETIONS, {"prompt": ["A", "xyz"], "echo": True, "max_tokens": 0})
    assert [(c["text"], c["logprobs"]) for c in found["choices"]] == [("A", None), ("xyz", None)]
    body = {"prompt": ["A", "xyz"], "echo": True, "max_tokens": 1, "logprobs": 0}
    choices = answer(llm, COMPLETIONS, body)["choices"]
    assert [len(c["logprobs"]["tokens"]) for c in choices] == [2, 4]


def test_prompt_logprobs(llm: LLM) -> None:
    body = {"prompt": PROMPT, "prompt_logprobs": 2, "max_tokens": 2, "prompt_logprobs_start": 3}
    (choice,) = answer(llm, COMPLETIONS, body)["choices"]
    assert choice["logprobs"] is None
    entries = choice["prompt_logprobs"]
    assert entries[:3] == [None] * 3 and len(entries) == 6
    for place, entry in enumerate(entries[3:], 3):
        best, logprobs = top_tokens(IDS[:place], 2)
        own = {"rank": rank_of(IDS[:place], IDS[place]), "decoded_token": PROMPT[place]}
        expected = {str(IDS[place]): {"logprob": target_logprob(IDS[:place], IDS[place]), **own}}
        for rank, (token, logprob) in enumerate(zip(best, logprobs, strict=True), 1):
            decoded = {"rank": rank, "decoded_token": chr(33 + token)}
            expected[str(token)] = {"logprob": logprob, **decoded}
        assert entry == expected
    del body["prompt"]
    chat = answer(llm, CHAT, {"messages": [{"role": "user", "content": "Hi"}], **body})
    assert chat["prompt_logprobs"][2] is None and chat["prompt_logprobs"][-1] is not None
    both = {"prompt": PROMPT, "echo": True, "logprobs": 1, "prompt_logprobs": 0, "max_tokens": 1}
    (choice,) = answer(llm, COMPLETIONS, both)["choices"]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [1] * 5
    assert all(len(entry) <= 2 for entry in choice["logprobs"]["top_logprobs"][1:])


class Words:
    """A tokenizer of whole words, with a token that begins every text and is not in it."""

    special_ids = frozenset({0})
    words = ("<s>", "é", " two", "three", "<s>x")

    def token(self, token_id: int) -> str:
        return self.words[token_id]

    def token_bytes(self, token_id: int, *, at_start: bool) -> bytes:
        word = self.words[token_id]
        return (word.lstrip() if at_start else word).encode()


@pytest.mark.parametrize(
    ("echo", "tokens", "offsets"),
    [
        ("étwo three", (0, 1, 2, 3), [0, 0, 1, 5]),
        ("<s>é two three", (0, 1, 2, 3), [0, 3, 4, 8]),
        ("<s>é two", (0, 0, 1, 2), [0, 0, 3, 4]),
        ("<s><s>é two", (0, 0, 1, 2), [0, 3, 6, 7]),
        ("<s><s>é", (0, 0, 0, 1), [0, 0, 3, 6]),
    ],
)
def test_a_token_before_the_text_is_not_in_it(
    echo: str, tokens: tuple[int, ...], offsets: list[int]
) -> None:
    entries = (None, *(TokenLogprob(token, -float(token)) for token in tokens[1:]))
    metrics = RequestMetrics(0.0, 0.0, 0.0, 0.0, 4, 0, 0)
    result = RequestOutput(
        "r", None, tokens, (CompletionOutput(0, "", ()),), None, metrics, entries
    )
    answered = {"tokens": ["!"], "token_logprobs": [-9.0], "top_logprobs": [{}], "text_offset": [0]}
    shown = PromptLogprobs(Words(), None, 0)  # type: ignore[arg-type]
    found = shown.before(answered, result, echo)
    assert found["tokens"] == [*(Words.words[token] for token in tokens), "!"]
    assert found["text_offset"] == [*offsets, len(echo)]
    assert found["token_logprobs"] == [None, *(-float(token) for token in tokens[1:]), -9.0]
    assert np.diff(found["text_offset"]).min() >= 0
