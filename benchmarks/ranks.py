"""What does it cost to divide a model among processes, at the same number of cores?

The model with all threads in one process, and divided among ranks with a part of them each, in
turns: a prompt, then decoding at its end. On one socket dividing gains nothing: what is measured is
the exchange, and that a rank waits for the slowest. The logits must agree.

    python benchmarks/ranks.py [MODEL] [--ranks 2] [--quantize int8] [--rounds 7]
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from common import in_turns, make_parser, median_ratio

from octavo import EngineConfig
from octavo.config import read_environment
from octavo.runtime.loader import load_runtime
from octavo.runtime.session import Session
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

_DECODED, _MOST_DIFFERENT = 32, 0.05  # of the logits' spread: bf16 caches round here and there


def open_session(model: str, config: EngineConfig) -> Session:
    files = read_model(resolve_model(model, read_environment()))
    checkpoint = open_checkpoint(files, config.load_format, config.seed)
    return Session(load_runtime(files, checkpoint, config))


def run(session: Session, prompt: list[int]) -> tuple[float, float]:
    """Seconds of the prompt and of a decoded token."""
    session.rewind(0)
    start = time.perf_counter()
    session.feed(prompt)
    middle = time.perf_counter()
    for token in prompt[:_DECODED]:
        session.step({0: [token]})
    return middle - start, (time.perf_counter() - middle) / _DECODED


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="benchmarks/shapes/llama-3.2-1b")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    sessions = {}
    for ranks in (1, given.ranks):
        config = EngineConfig(
            device="cpu",
            dtype=given.dtype,
            quantize=given.quantize,
            load_format=given.load_format,
            max_model_len=given.tokens + _DECODED,
            max_num_seqs=1,
            tensor_parallel_size=ranks,
        )
        sessions[ranks] = open_session(given.model, config)
    prompt = [(7919 * i + i * i) % 40000 for i in range(given.tokens)]
    one, several = (session.step({0: prompt[:64]}).logits for session in sessions.values())
    difference = float(np.abs(one - several).max() / one.std())
    if not difference < _MOST_DIFFERENT:
        raise SystemExit(f"the logits differ by {difference:.2g} of their standard deviation")
    found: dict[int, list[tuple[float, float]]] = {ranks: [] for ranks in sessions}
    for number in range(given.rounds + 1):
        for ranks in in_turns(found, number):
            seconds = run(sessions[ranks], prompt)
            if number:  # the first round only warms up
                found[ranks].append(seconds)
    print(f"logits within {difference:.2g} of their standard deviation")
    for place, what in enumerate((f"prompt of {given.tokens}", "decoded token")):
        ours, alone = ([each[place] for each in found[n]] for n in (given.ranks, 1))
        print(
            f"{what:16} {1e3 * statistics.median(alone):8.2f} ms in one process, "
            f"{1e3 * statistics.median(ours):8.2f} ms by {given.ranks} ranks: "
            f"{median_ratio(ours, alone):.3f} of the time"
        )


if __name__ == "__main__":
    main()
