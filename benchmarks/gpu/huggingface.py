"""Hugging Face transformers on the same GPU, in the same shape: plain, and compiled.

    python benchmarks/gpu/huggingface.py

Plain: eager, sdpa, dynamic cache. Compiled: a static cache and torch.compile with CUDA graphs
("reduce-overhead"), its fastest way to decode one sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import SHAPE, keep
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

DECODED, ROUNDS = 128, 5


def main() -> None:
    """Time prefill and decoding both ways and keep the medians."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(SHAPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for length in (128, 512, 2048, 8192):
            ids = torch.randint(0, config.vocab_size, (1, length), device="cuda")
            seconds = median(lambda ids=ids: model(ids, logits_to_keep=1))
            found[f"prefill {length}"] = length / seconds
        for depth in (128, 2048):
            found[f"decode @{depth}"] = DECODED / median(lambda depth=depth: plain(model, depth))
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        for depth in (128, 2048):
            run = compiled(model, step, depth)
            run()
            found[f"decode @{depth}, compiled"] = DECODED / median(run)
    for name, value in found.items():
        print(f"{name}: {value:.1f} tokens/s", flush=True)
    keep("huggingface", {"tokens_per_second": found})


def median(work: Callable[[], object]) -> float:
    """Seconds, the median of some rounds after one that does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def plain(model: Any, depth: int) -> None:
    """A greedy loop; prefilling `depth` tokens is part of it, and small beside it."""
    ids = torch.ones(1, depth, dtype=torch.long, device="cuda")
    cache = None
    for _ in range(DECODED):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)


def compiled(model: Any, step: Any, depth: int) -> Callable[[], None]:
    """The same with a static cache and a compiled step."""
    cache = StaticCache(config=model.config, max_cache_len=depth + DECODED + 8)

    def run() -> None:
        cache.reset()
        ids = torch.ones(1, depth, dtype=torch.long, device="cuda")
        position = torch.arange(depth, device="cuda")
        out = model(ids, past_key_values=cache, cache_position=position, logits_to_keep=1)
        for i in range(DECODED):
            ids = out.logits[:, -1:].argmax(-1)
            position = torch.tensor([depth + i], device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            out = step(ids, past_key_values=cache, cache_position=position, logits_to_keep=1)

    return run


if __name__ == "__main__":
    main()
