"""lm-eval's local-completions and local-chat-completions, where they generate text.

Log-likelihoods need a tokenizer of transformers: tests/hf/test_lm_eval_hf.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from clients.scenes import HELLO, MODEL, Served

_REASON = "needs lm-eval[api]: make test-clients installs it"
models = pytest.importorskip("lm_eval.models.openai_completions", reason=_REASON)
instance = pytest.importorskip("lm_eval.api.instance", reason=_REASON)


def generate(model: Any, *requests: tuple[Any, dict[str, Any]]) -> list[str]:
    asked = [
        instance.Instance("generate_until", {}, request, index)
        for index, request in enumerate(requests)
    ]
    texts: list[str] = model.generate_until(asked, disable_tqdm=True)
    return texts


def completions(parrot: Served, **options: int) -> Any:
    return models.LocalCompletionsAPI(
        base_url=f"{parrot.api}/completions",
        model=MODEL,
        tokenizer_backend=None,
        tokenized_requests=False,
        max_retries=1,
        **options,
    )


@pytest.mark.parametrize("num_concurrent", [1, 3])
def test_local_completions(parrot: Served, num_concurrent: int) -> None:
    model = completions(parrot, num_concurrent=num_concurrent, batch_size=1)
    wanted = {"until": [" three"], "max_gen_toks": 8}
    requests = [("hello", wanted), ("count", wanted), ("sing", wanted)]
    assert generate(model, *requests) == [HELLO, "one two", "la" * 8]


def test_local_completions_in_batches(parrot: Served) -> None:
    model = completions(parrot, batch_size=2)
    wanted = {"until": [" three"], "max_gen_toks": 8}
    assert generate(model, ("hello", wanted), ("count", wanted)) == [HELLO, "one two"]


def test_local_chat_completions(parrot: Served) -> None:
    model = models.LocalChatCompletion(
        base_url=f"{parrot.api}/chat/completions",
        model=MODEL,
        tokenizer_backend=None,
        tokenized_requests=False,
        max_retries=1,
    )
    chats = [
        model.apply_chat_template([{"role": "user", "content": word}])
        for word in ("hello", "count")
    ]
    wanted = {"until": [" three"], "max_gen_toks": 8}
    assert generate(model, *((chat, wanted) for chat in chats)) == [HELLO, "one two"]
