"""Hugging Face transformers, for run.py: eager, with a static cache, or compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from systems import Generating
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
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

    The loop is faster than `model.generate`, which does the same and more around it. cache:
    "dynamic", "static" (allocated for all tokens before), or "compiled" (static, and the steps of
    one token by torch.compile, on a GPU with CUDA graphs). Prompts are never compiled.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        threads: int,
        load_format: str = "auto",
        cache: str = "dynamic",
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        self._cache, self._device = cache, device
        self._caches: dict[tuple[int, int], StaticCache] = {}
        self._model = load_model(path, DTYPES[kind], load_format).eval().to(device)
        from octavo.diff.hugging_face import cache_argument

        self._argument = cache_argument(self._model)
        self._step = self._model
        if cache == "compiled":
            mode = "reduce-overhead" if device == "cuda" else "default"
            self._step = torch.compile(self._model.forward, mode=mode, fullgraph=True)
        self.description = {
            "num_parameters": self._model.num_parameters(),
            "weight_bytes": self._model.get_memory_footprint(),
            "version": f"{transformers.__version__}, torch {torch.__version__}",
        }

    def generate(self, prompts: list[list[int]], count: int) -> float:
        start = time.perf_counter()
        for _ in self._tokens(prompts, count):
            pass
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        return (int(ids) for ids in self._tokens([prompt], count))

    def _tokens(self, prompts: list[list[int]], count: int) -> Iterator[torch.Tensor]:
        """The greedy tokens of all prompts, (batch, 1) at a time."""
        ids, cache = torch.tensor(prompts, device=self._device), self._room(prompts, count)
        for number in range(count):
            if number and self._cache == "compiled":
                ids = ids.clone()
                if self._device == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
            output = self._forward(self._step if number else self._model, ids, cache)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            yield ids

    def _room(self, prompts: list[list[int]], count: int) -> Any:
        """An empty cache for the prompts and their answers; a dynamic one grows."""
        if self._cache == "dynamic":
            return DynamicCache(config=self._model.config)
        size = (len(prompts), len(prompts[0]) + count)
        if size not in self._caches:  # kept, since a compiled step knows its cache's place
            self._caches[size] = StaticCache(config=self._model.config, max_cache_len=size[1])
        with torch.inference_mode():
            self._caches[size].reset()
        return self._caches[size]

    def _forward(self, run: Any, ids: torch.Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            return run(ids, **{self._argument: cache}, use_cache=True, logits_to_keep=1)

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """The log-probability of every next token."""
        ids = torch.tensor([prompt], device=self._device)
        logits = self._forward(self._model, ids, None).logits[0, -1].float()
        return dict(enumerate(logits.log_softmax(-1).tolist()))

    def device_memory(self) -> dict[str, int]:
        return {"device": torch.cuda.max_memory_allocated()} if self._device == "cuda" else {}
