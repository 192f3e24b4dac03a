"""What each way to choose the next token costs, as a part of a step that takes the largest logit.

Answers of one prompt decode together, by the whole engine, with weights of random numbers. In every
round each way has its turn; a figure is the median over the rounds of its step beside greedy's.

    python benchmarks/sampling_cost.py [MODEL] [--batch 1,64] [--context 512] [--ways dry,top]
    python benchmarks/sampling_cost.py benchmarks/shapes/tiny --batch 1,4 --steps 4 --rounds 2

The random weights' logits are flat: they differ far less than a trained model's, so that top-p and
typical keep most of the vocabulary. That is the worst case. --temperature 0.1 makes them steep.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from common import ROOT, add_common, header, in_turns, make_parser, median_ratio, write_json

from octavo import LLM, EngineConfig, SamplingParams
from octavo.engine.engine import Engine

GREEDY = "greedy"
MOST = 0.03  # of a step; what octavo promises


def identity(prompt: Any, answer: Any, logits: np.ndarray) -> np.ndarray:
    """A logits processor that changes nothing: what remains is its way there and back."""
    return logits


def ways(temperature: float, vocab_size: int) -> dict[str, dict[str, Any]]:
    """Options of requests by name."""
    warm = {"temperature": temperature}
    every_third = tuple(range(0, vocab_size, 3))
    bias = dict.fromkeys(range(min(300, vocab_size)), -1.0)
    return {
        GREEDY: {"temperature": 0.0},
        "temperature": warm,
        "top-k 50": {**warm, "top_k": 50},
        "top-p 0.9": {**warm, "top_p": 0.9},
        "top-k 50, top-p 0.9": {**warm, "top_k": 50, "top_p": 0.9},
        "min-p 0.05": {**warm, "min_p": 0.05},
        "top-n-sigma 1": {**warm, "top_n_sigma": 1.0},
        "typical 0.9": {**warm, "typical_p": 0.9},
        "min-p 0.05, XTC": {**warm, "min_p": 0.05, "xtc_probability": 1.0, "xtc_threshold": 0.01},
        "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        "logit bias": {"temperature": 0.0, "logit_bias": bias},
        "DRY": {"temperature": 0.0, "dry_multiplier": 0.8},
        "a third allowed": {**warm, "allowed_token_ids": every_third},
        "5 log-probabilities": {"temperature": 0.0, "logprobs": 5},
        "identity processor": {"temperature": 0.0, "logits_processors": [identity]},
    }


class Steps:
    """The seconds of steps in which `batch` answers decode."""

    def __init__(self, engine: Engine, prompt: list[int], batch: int, num_steps: int) -> None:
        self._engine, self._prompt = engine, prompt
        self._batch, self._num_steps = batch, num_steps
        self._num_asked = 0

    def seconds(self, options: dict[str, Any]) -> float:
        """The median of some steps."""
        engine = self._engine
        num_tokens = self._num_steps + 2 * self._batch + 16
        params = SamplingParams(
            max_tokens=num_tokens, n=self._batch, ignore_eos=True, seed=1, **options
        )
        self._num_asked += 1
        name = str(self._num_asked)
        engine.add_request(name, self._prompt, params)
        while engine.stats().num_running < self._batch:
            engine.step()  # the prompt, most often from the cache, and each answer's first token
        found = []
        for index in range(self._num_steps + 2):
            start = time.perf_counter()
            engine.step()
            if index >= 2:
                found.append(time.perf_counter() - start)
        engine.abort(name)
        while engine.has_unfinished_requests:
            engine.step()
        return statistics.median(found)


def measure(arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Milliseconds and ratios by way, for one size of batch."""
    room = arguments.context + arguments.steps + 2 * batch + 32
    config = EngineConfig(
        load_format="dummy",
        device=arguments.device,
        num_threads=arguments.threads,
        max_model_len=room,
        max_num_seqs=batch,
    )
    with LLM(arguments.model, config=config) as llm:
        vocab = llm.engine.vocab_size
        # Words that come again and again, so that DRY and penalties have something to find.
        prompt = [(i * i % 61 + 977 * (i // 97 % 3)) % vocab for i in range(arguments.context)]
        steps = Steps(llm.engine, prompt, batch, arguments.steps)
        chosen = ways(arguments.temperature, vocab)
        asked = [part.strip() for part in arguments.ways.split(",")]
        names = [name for name in chosen if any(part in name for part in asked)]
        found: dict[str, list[float]] = {name: [] for name in dict.fromkeys([GREEDY, *names])}
        for number in range(arguments.rounds + 1):
            for name in in_turns(found, number):
                seconds = steps.seconds(chosen[name])
                if number:  # the first round only warms up
                    found[name].append(seconds)
    return {
        name: {
            "milliseconds": statistics.median(seconds) * 1e3,
            "cost": median_ratio(seconds, found[GREEDY]) - 1,
        }
        for name, seconds in found.items()
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "model", nargs="?", default=str(ROOT / "benchmarks" / "shapes" / "llama-3.2-1b")
    )
    parser.add_argument("--batch", default="1,64", help="answers a step, several with commas")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=12, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--ways", default="", help="parts of the names of those to measure")
    parser.add_argument("--device", default="auto")
    add_common(parser)
    arguments = parser.parse_args()
    results = {}
    for batch in map(int, arguments.batch.split(",")):
        results[str(batch)] = found = measure(arguments, batch)
        print(f"batch {batch}: {'':16}{'ms a step':>12}{'beside greedy':>16}")
        for name, row in found.items():
            over = "  over" if row["cost"] > MOST else ""
            print(f"  {name:24}{row['milliseconds']:12.2f}{row['cost']:+16.1%}{over}")
    write_json(arguments.output, {**header("sampling_cost", arguments), "results": results})


if __name__ == "__main__":
    main()
