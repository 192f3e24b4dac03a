"""Hugging Face transformers in eager mode, for compare_cpu.py and compare_hf.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from systems import Generating
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def load_model(path: str | Path, dtype: torch.dtype, load_format: str) -> Any:
    """The model; load_format "dummy": random weights in the shape that its config.json tells."""
    if load_format != "dummy":
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    model.tie_weights()  # part of what was left out
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-0.03, 0.03)
    return model


class Transformers(Generating):
    """A plain loop over the model with its cache, attention by sdpa.

    The loop is faster than `model.generate`, which does the same and more around it.
    """

    def __init__(self, path: str, kind: str, threads: int, load_format: str = "auto") -> None:
        torch.set_num_threads(threads)
        self._dtype = DTYPES[kind]
        self._model = load_model(path, self._dtype, load_format).eval()
        self.description = {"num_parameters": self._model.num_parameters()}

    def generate(self, prompts: list[list[int]], count: int) -> float:
        start = time.perf_counter()
        ids, cache = torch.tensor(prompts), None
        for _ in range(count):
            ids, cache = self._next(ids, cache)
        return time.perf_counter() - start

    def _next(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        output = self._forward(ids, cache)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    def _forward(self, ids: torch.Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """As octavo_system.Octavo.decode."""
        ids, cache = self._next(torch.tensor([prompt]), None)
        tokens = [int(ids)]
        start = time.perf_counter()
        while len(tokens) < num_tokens:
            ids, cache = self._next(ids, cache)
            tokens.append(int(ids))
        return {"speed": (num_tokens - 1) / (time.perf_counter() - start), "tokens": tokens}

    def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens a second, up to the first token of the answer."""
        return len(prompt) / self.generate([prompt], 1)

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """The log-probability of every next token."""
        logits = self._forward(torch.tensor([prompt]), None).logits[0, -1].float()
        return dict(enumerate(logits.log_softmax(-1).tolist()))

    def matmul_peak(self) -> float:
        """Operations a second of torch's own matrix product in this format: a practical ceiling."""
        size, best = 2048, 0.0
        a, b = (torch.randn(size, size).to(self._dtype) for _ in range(2))
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        return best
