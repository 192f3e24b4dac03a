"""What a step costs in Python, with a runtime that computes nothing.

Prints milliseconds of processor time a step: scheduling, packing the batch, reading the results,
text and stop strings, for 64 decoding sequences of 1,000 tokens of context. No model is needed:
the tokenizer is made on the spot.

    python benchmarks/engine_overhead.py
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.engine.prefix_cache import extend_block_hashes
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

NUM_SEQUENCES = 64
NUM_PROMPT_TOKENS = 1000
NUM_STEPS = 60
NUM_ROUNDS = 10
CASES = {
    "plain": SamplingParams(max_tokens=5000),
    "2 stop strings": SamplingParams(max_tokens=5000, stop=("\n\n\n", "The end")),
    "logprobs=5": SamplingParams(max_tokens=5000, logprobs=5),
}


class NullRuntime:
    """Draws random tokens and computes nothing; the batch is packed and checked as always."""

    def __init__(self, vocab_size: int) -> None:
        self._generator = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self._num_rows = 0

    def make_batch(self, **arrays: Any) -> Any:
        self._num_rows = len(arrays["logit_rows"])
        return _native.Batch(**arrays)

    def submit(self, batch: Any, sample: bool) -> int:
        return 1

    def sample(self, ticket: int, masks: Any = None, adjustments: Any = None) -> None:
        return None

    def wait(self, ticket: int) -> Any:
        rows = self._num_rows
        return SimpleNamespace(
            token_ids=self._generator.integers(0, self._vocab_size, rows, np.int32),
            finite=np.ones(rows, np.bool_),
            logprobs=np.zeros(rows, np.float32),
            ranks=np.ones(rows, np.int32),
            top_token_ids=np.zeros((rows, 5), np.int32),
            top_logprobs=np.zeros((rows, 5), np.float32),
        )


def byte_tokenizer(directory: Path) -> Tokenizer:
    """One token a byte: every piece of text passes the UTF-8 decoder."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.decoder = decoders.ByteLevel()
    fast.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def make_engine(tokenizer: Tokenizer, params: SamplingParams, stream: bool) -> Engine:
    vocab_size = tokenizer.vocab_size
    runtime = NullRuntime(vocab_size)
    num_tokens = NUM_SEQUENCES * NUM_PROMPT_TOKENS
    options = RuntimeOptions("f32", "f32", 16, 8192, NUM_SEQUENCES, num_tokens)
    engine = Engine(
        runtime,
        options,
        num_kv_blocks=NUM_SEQUENCES * 512,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        make_batch=runtime.make_batch,
    )
    prompt = [i % vocab_size for i in range(NUM_PROMPT_TOKENS)]
    for i in range(NUM_SEQUENCES):
        engine.add_request(str(i), prompt, params, stream=stream)
    engine.step()  # all prompts
    return engine


def best_of(function: Callable[[], Any]) -> float:
    """Seconds of processor time a call: the best of ten rounds, since others use the machine."""
    rounds = []
    for _ in range(NUM_ROUNDS):
        start = time.process_time()
        for _ in range(NUM_STEPS):
            function()
        rounds.append((time.process_time() - start) / NUM_STEPS)
    return min(rounds)


def print_parts(tokenizer: Tokenizer) -> None:
    """Microseconds of single decisions, and of what the log and the prefix cache add."""
    engine = make_engine(tokenizer, CASES["plain"], stream=False)
    scheduler, prompt = engine.scheduler, [i % 256 for i in range(NUM_PROMPT_TOKENS)]
    event = (time.monotonic(), "chunk", ("request", 0), 0, 512)
    names: list[bytes] = []
    extend_block_hashes(names, prompt, 16, None)
    parts = {
        f"a schedule of {NUM_SEQUENCES} decodes": scheduler.schedule,
        "one event": lambda: engine.events.record(event),
        f"naming {len(names)} blocks": lambda: extend_block_hashes([], prompt, 16, None),
        f"finding {len(names)} blocks": lambda: engine.blocks.find_prefix(names, len(prompt) - 1),
        "checking 1,000 token ids": lambda: engine.check_request(prompt, CASES["plain"]),
    }
    for name, function in parts.items():
        print(f"  {name:26} {best_of(function) * 1e6:6.1f} µs")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = byte_tokenizer(Path(directory))
    print(f"{NUM_SEQUENCES} decoding sequences, Python {sys.version.split()[0]}")
    for name, params in CASES.items():
        for stream in (False, True):
            engine = make_engine(tokenizer, params, stream)
            milliseconds = best_of(engine.step) * 1e3
            label = f"{name}{', streamed' if stream else ''}"
            print(f"  {label:26} {milliseconds:6.3f} ms a step")
    print_parts(tokenizer)
    if "--profile" in sys.argv:
        engine = make_engine(tokenizer, CASES["plain"], stream=True)
        with cProfile.Profile() as profile:
            for _ in range(NUM_STEPS):
                engine.step()
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
