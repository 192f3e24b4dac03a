"""What LoRA adapters cost: a decode step of a batch with several of them, and without.

    python benchmarks/adapters.py                       # Llama-3.2-1B's shape, random weights
    python benchmarks/adapters.py smollm2-135m --load-format auto --batch 8 --rank 32

Every adapter has all matrices of all layers; the sequences of the batch take turns. Both steps run
on one loaded model, in turn; the ratio is the median of the rounds' ratios. The gate comes first:
each has the same bits alone and in the batch, and the adapters change them.
"""

from __future__ import annotations

import statistics
import sys

import numpy as np
from common import ROOT, add_common, header, in_turns, make_parser, median_ratio, write_json

from octavo.bench.benchmark import Runner, fit_config
from octavo.bench.cases import Case
from octavo.config import EngineConfig, read_environment
from octavo.models.adapter import Adapter, LowRank
from octavo.models.layer import linear_nodes
from octavo.models.spec import ModelSpec
from octavo.runtime.loader import load_runtime
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

SHAPE = ROOT / "benchmarks" / "shapes" / "llama-3.2-1b"


def random_adapter(spec: ModelSpec, rank: int, seed: int) -> Adapter:
    """One of all matrices but the head, whose products keep the scale of what they are added to."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)

    matrices = {}
    for name, node in linear_nodes(spec).items():
        outputs, inputs = node.matrix.shape
        matrices[name] = LowRank(normal(rank, inputs), normal(outputs, rank), 0.5)
    return Adapter(f"random {seed}", matrices)


def main() -> None:
    """Check, measure in turn, print, and write JSON where asked to."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", default=str(SHAPE), help="a name or folder, as octavo takes it")
    add("--load-format", default="dummy", choices=("auto", "dummy"))
    add("--dtype", default="bf16", choices=("bf16", "f32"))
    add("--quantize", help="as octavo's option")
    add_common(parser)
    add("--batch", type=int, default=16, help="sequences")
    add("--adapters", type=int, default=4)
    add("--rank", type=int, default=16)
    add("-p", "--prompt", type=int, default=128, help="tokens of each before the first step")
    add("-n", "--generate", type=int, default=32, help="steps measured together")
    add("-r", "--rounds", type=int, default=5)
    a = parser.parse_args()
    case = Case("decode", a.generate, a.batch, a.prompt)
    config = EngineConfig(
        device="cpu",
        num_threads=a.threads,
        load_format=a.load_format,
        dtype=a.dtype,
        quantize=a.quantize,
        max_adapters=a.adapters,
    )
    files = read_model(resolve_model(a.model, read_environment()))
    loaded = load_runtime(files, open_checkpoint(files, a.load_format), fit_config(config, [case]))
    adapters = [random_adapter(files.spec, a.rank, seed) for seed in range(a.adapters)]
    runners = {
        "without": Runner(loaded, files.spec, None),
        "with": Runner(loaded, files.spec, None, adapters),
    }
    gates = {name: runner.gate(case) for name, runner in runners.items()}
    hashes = {gate.logits_hash for gate in gates.values()}
    if not all(gate.passed for gate in gates.values()) or len(hashes) < 2:
        sys.exit(f"error: bits depend on the batch, or the adapters change nothing: {gates}")
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(a.rounds + 1):
        for name in in_turns(runners, number):
            seconds[name] += runners[name].time(case, 1, warm_up=False)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first warms up
    ratio = median_ratio(seconds["with"], seconds["without"])
    for name, values in seconds.items():
        each = [1e3 * value / a.generate for value in values]
        print(
            f"{name:8} {statistics.median(each):8.2f} ms a step "
            f"({min(each):.2f} to {max(each):.2f}, {len(each)} rounds)"
        )
    print(f"{a.adapters} adapters of rank {a.rank} cost {100 * (ratio - 1):+.1f} % of a step")
    result = {**header("adapters", a), "model": files.path.name, "seconds": seconds, "ratio": ratio}
    gated = {name: gate.logits_hash for name, gate in gates.items()}
    write_json(a.output, {**result, "passed": True, "logits": gated})


if __name__ == "__main__":
    main()
