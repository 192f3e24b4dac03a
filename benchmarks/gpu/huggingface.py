"""Hugging Face transformers on the same GPU, in the same shape.

    python benchmarks/gpu/huggingface.py [--compiled]

Plain: eager, sdpa, dynamic cache. Compiled: a static cache and torch.compile with CUDA graphs
("reduce-overhead"), its fastest way to decode one sequence; compiling takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import EMULATE, SHAPE, TORCH_DEVICE, keep
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from octavo.diff.hugging_face import cache_argument

DECODED, ROUNDS, PROMPTS, DEPTHS = 128, 3, (128, 512, 2048, 8192), (128, 2048)
if EMULATE:
    DECODED, ROUNDS, PROMPTS, DEPTHS = 2, 1, (5,), (5,)


class HuggingFace:
    """A random model of the shape."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.config = AutoConfig.from_pretrained(SHAPE)
        with torch.device(TORCH_DEVICE):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        self.model = model.eval()
        self._cache = cache_argument(self.model)

    def prompt(self, length: int) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, (1, length), device=TORCH_DEVICE)

    def next(self, run: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """The greedy token; the cache grows in place."""
        out = run(ids, **{self._cache: cache}, use_cache=True, logits_to_keep=1)
        token: torch.Tensor = out.logits[:, -1:].argmax(-1)
        return token

    def decoding(self, step: Any, depth: int, compiled: bool = False) -> Callable[[], None]:
        """A greedy loop behind a prompt of `depth` tokens, which is part of it, and small."""
        length = depth + DECODED + 8
        static = StaticCache(config=self.config, max_cache_len=length) if compiled else None

        def run() -> None:
            cache: Any = DynamicCache() if static is None else static
            if compiled:
                cache.reset()
            ids = self.next(self.model, self.prompt(depth), cache)
            for _ in range(DECODED):
                if compiled:
                    ids = ids.clone()
                    if not EMULATE:
                        torch.compiler.cudagraph_mark_step_begin()
                ids = self.next(step, ids, cache)

        return run


def median(work: Callable[[], object]) -> float:
    """Seconds, the median of some rounds after one that does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronize() -> None:
    if not EMULATE:
        torch.cuda.synchronize()


def main() -> None:
    """Time prefill and decoding and keep the medians, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    system = HuggingFace()
    found: dict[str, float] = {}
    name = "huggingface-compiled" if given.compiled else "huggingface"

    def note(what: str, tokens: int, seconds: float) -> None:
        found[what] = tokens / seconds
        print(f"{what}: {found[what]:.1f} tokens/s", flush=True)
        keep(name, {"tokens_per_second": found})

    with torch.inference_mode():
        step: Any = system.model
        if given.compiled:
            if not EMULATE:
                step = torch.compile(system.model.forward, mode="reduce-overhead", fullgraph=True)
            for depth in DEPTHS:
                run = system.decoding(step, depth, compiled=True)
                run()
                note(f"decode @{depth}, compiled", DECODED, median(run))
            return
        for length in PROMPTS:
            ids = system.prompt(length)
            seconds = median(lambda ids=ids: system.model(ids, logits_to_keep=1))
            note(f"prefill {length}", length, seconds)
        for depth in DEPTHS:
            note(f"decode @{depth}", DECODED, median(system.decoding(system.model, depth)))


if __name__ == "__main__":
    main()
