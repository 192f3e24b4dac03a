"""octavo beside Hugging Face on one machine in one run: decoding and prefill, with their ceilings.

    python benchmarks/compare_hf.py [--quick] [--dtypes bf16,f32] [--rounds 5]

No figure without its gate: before anything is timed, both systems must give the same answer
(float32: log-probabilities within 1e-3 and 64 greedy tokens identical; bf16: no further from
float32 than half as far again as Hugging Face's own bf16). Then the two take turns, and the ratio
is the median over the rounds. Beside each figure stands its limit: what decoding reads from memory
against the memory's measured bandwidth, and what prefill computes against the peak of the
multiply-adds in use, reckoned from the measured one of float32. benchmarks/README.md says more.
Written to a file in benchmarks/results, unless --output names another.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from pathlib import Path
from typing import Any

from agreement import error_of
from common import add_common, header, in_turns, make_parser, median_ratio, slug, write_json
from systems import Process

from octavo import _native
from octavo.bench.cases import BYTES, Case, Work, linear_weights, work_of
from octavo.bench.peak import arithmetic_of, operations_per_second
from octavo.config import read_environment
from octavo.machine import processor
from octavo.text.tokenizer import Tokenizer
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

RESULTS = Path(__file__).resolve().parent / "results"
GATE_TOKENS = 64
TEXT = """The octavo is a book made of sheets that were folded three times, so that each of them
gives eight leaves, or sixteen pages. Printers chose it when a book had to be cheap and easy to
carry: a traveller could hold it in one hand and read by a window. In 1501 a printer in Venice
published Virgil this way, in a slanted type that saved space, and within a few years 3,000 copies
were on the road. What had been furniture became company. Consider how much is decided by such a
format: the length of a line, the size of a letter, the number of words an eye takes in at once.
"""


class Peaks:
    """The most that the machine was seen to do, measured between the rounds.

    Between them and not once, since neighbours on a shared machine come and go: a ceiling that
    was measured in a bad moment would be below the figure that it limits.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.bandwidth = 0.0  # bytes a second
        self.flops = 0.0  # float32 operations a second
        self.measure()

    def measure(self) -> None:
        self.bandwidth = max(self.bandwidth, _native.measure_bandwidth(self.num_threads, 0.5))
        self.flops = max(self.flops, _native.measure_flops(self.num_threads, "auto", 0.3))


class Comparison:
    """Both systems in one format."""

    def __init__(self, arguments: argparse.Namespace, path: Path, dtype: str) -> None:
        self.arguments, self.path, self.dtype = arguments, path, dtype
        self.spec = read_model(path).spec
        tokens = Tokenizer(path).encode(TEXT * 8)
        self.prompt = tokens[: arguments.prompt_tokens]
        self.long_prompt = tokens[: arguments.prefill_tokens]
        self.systems = {
            "octavo": Process("octavo_system.Octavo", path, dtype, arguments.threads),
            "hugging face": self._hugging_face(dtype),
        }

    def _hugging_face(self, dtype: str) -> Process:
        kind = "transformers_system.Transformers"
        return Process(kind, self.path, dtype, self.arguments.threads)

    def close(self) -> None:
        for system in self.systems.values():
            system.close()

    def gate(self) -> dict[str, Any]:
        """What must hold before anything is timed; also warms both systems up."""
        hugging_face = self.systems["hugging face"]
        exact = hugging_face if self.dtype == "f32" else self._hugging_face("f32")
        prompts = (self.prompt, self.long_prompt)
        truths = [exact.logprobs(prompt) for prompt in prompts]
        if exact is not hugging_face:
            exact.close()
        errors = {
            name: max(
                error_of(truth, system.logprobs(prompt), name)
                for truth, prompt in zip(truths, prompts, strict=True)
            )
            for name, system in self.systems.items()
        }
        tokens = {
            name: system.decode(self.prompt, self.arguments.new_tokens)["tokens"]
            for name, system in self.systems.items()
        }
        pairs = list(zip(*tokens.values(), strict=True))
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
        if self.dtype == "f32":
            passed = errors["octavo"] <= 1e-3 and same >= min(GATE_TOKENS, len(pairs))
        else:
            passed = errors["octavo"] <= 1.5 * errors["hugging face"]
        text = ",".join(map(str, tokens["octavo"]))
        result = {
            "passed": passed,
            "logprob_errors": errors,
            "same_greedy_tokens": f"{same} of {len(pairs)}",
            "tokens_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        }
        print(
            f"{self.dtype}: gate {'passed' if passed else 'FAILED'}: log-probabilities from "
            f"float32: octavo {errors['octavo']:.1e}, Hugging Face {errors['hugging face']:.1e}; "
            f"greedy tokens the same: {result['same_greedy_tokens']}",
            flush=True,
        )
        return result

    def measure(self, machine: Peaks) -> dict[str, dict[str, list[float]]]:
        """Speeds of every round; the two take turns at going first."""
        speeds: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in self.systems} for kind in ("decode", "prefill")
        }
        for number in range(self.arguments.rounds):
            turns = in_turns(self.systems.items(), number)
            for name, system in turns:
                found = system.decode(self.prompt, self.arguments.new_tokens)
                speeds["decode"][name].append(found["speed"])
            for name, system in turns:
                speeds["prefill"][name].append(system.prefill(self.long_prompt))
            machine.measure()
        return speeds

    def ceilings(self, machine: Peaks) -> dict[str, Any]:
        """The machine's limits, and what they would allow in tokens a second."""
        head = self.spec.vocab_size * self.spec.hidden_size
        step_bytes = BYTES[self.dtype] * (linear_weights(self.spec) + head)

        def work(case: Case) -> Work:
            return work_of(case, self.spec, step_bytes, self.dtype, case.num_tokens)

        num_tokens, num_prompt = self.arguments.new_tokens, len(self.long_prompt)
        decode = work(Case("decode", num_tokens, 1, len(self.prompt)))
        token_bytes = decode.num_bytes / num_tokens
        operations = work(Case("prefill", num_prompt)).num_operations / num_prompt
        isa = str(_native.build_info()["isa"])
        flops = operations_per_second(machine.flops, isa, {arithmetic_of(None, self.dtype)})
        return {
            "read_bandwidth": machine.bandwidth,
            "bytes_per_decoded_token": token_bytes,
            "decode": machine.bandwidth / token_bytes,
            "multiply_add_peak": flops,
            "operations_per_prompt_token": operations,
            "prefill": flops / operations,
        }


def report(dtype: str, speeds: dict[str, dict[str, list[float]]], limits: dict[str, Any]) -> dict:
    """Print the two rows of a format; returns the ratios."""
    ratios = {}
    for kind, of_kind in speeds.items():
        ours, theirs = (statistics.median(values) for values in of_kind.values())
        ratios[kind] = median_ratio(*of_kind.values())
        if kind == "decode":
            limit, unit, digits = limits["read_bandwidth"] / 1e9, "GB/s", 1
        else:
            limit, unit, digits = limits["multiply_add_peak"] / 1e9, "Gop/s", 0
        share = ours / limits[kind]
        reached = f"{share * limit:.{digits}f} of {limit:.{digits}f} {unit}"
        print(
            f"{kind:8} {dtype:5} {ours:10.1f} {theirs:14.1f} {ratios[kind]:8.2f}   "
            f"{reached:22} {100 * share:4.0f}%",
            flush=True,
        )
    return ratios


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", default="bf16,f32")
    add_common(parser)
    parser.add_argument("--prompt-tokens", type=int, default=32, help="before decoding")
    parser.add_argument("--new-tokens", type=int, default=128, help="decoded")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds, nothing written")
    parser.add_argument("--min-decode", type=float, default=0.0, help="fail below this ratio, bf16")
    parser.add_argument("--min-prefill", type=float, default=0.0, help="the same for prefill")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.new_tokens = 2, GATE_TOKENS
    return arguments


def main() -> None:
    """Compare in every format asked for; exit code 1 when a gate fails."""
    arguments = parse_arguments()
    path = resolve_model(arguments.model, read_environment())
    print(f"{processor()}, {arguments.threads} threads", flush=True)
    result: dict[str, Any] = header("compare_hf", arguments)
    machine = Peaks(arguments.threads)
    rows = []
    for dtype in arguments.dtypes.split(","):
        comparison = Comparison(arguments, path, dtype)
        try:
            gate = comparison.gate()
            if not gate["passed"]:
                sys.exit(1)
            speeds = comparison.measure(machine)
            torch_matmul = comparison.systems["hugging face"].matmul_peak()
        finally:
            comparison.close()
        result[dtype] = {"gate": gate, "tokens_per_second": speeds, "torch_matmul": torch_matmul}
        rows.append((dtype, speeds, comparison))

    print(f"\n{'tokens/s':14} {'octavo':>10} {'Hugging Face':>14} {'ratio':>8}   of the ceiling")
    too_slow = False
    for dtype, speeds, comparison in rows:
        limits = comparison.ceilings(machine)
        ratios = report(dtype, speeds, limits)
        result[dtype].update(ratios=ratios, ceilings=limits)
        if dtype == "bf16":
            wanted = {"decode": arguments.min_decode, "prefill": arguments.min_prefill}
            too_slow = any(ratios[kind] < ratio for kind, ratio in wanted.items())
    if not arguments.quick:
        name = f"compare_hf-{slug(processor())}-{arguments.threads}t.json"
        file = arguments.output or RESULTS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        print(f"\nwritten: {file}")
    if too_slow:
        sys.exit("error: octavo is slower than asked for (--min-decode, --min-prefill)")


if __name__ == "__main__":
    main()
