"""octavo beside transformers and llama.cpp on one CPU, on the same shapes, in turn, in one run.

    python benchmarks/compare_cpu.py                                  # SmolLM2-135M
    python benchmarks/compare_cpu.py benchmarks/shapes/llama-3.2-1b --load-format dummy
    python benchmarks/compare_cpu.py --formats bf16,int8 --llama-bench ~/llama.cpp/bin/llama-bench

octavo's bf16 is held against Hugging Face's and llama.cpp's bf16, int8 against Q8_0, int4 against
Q4_0: formats of about the same size. llama.cpp is a llama-bench binary (--llama-bench, else on the
PATH), else the package xllamacpp, whose build knows AVX2 and no more: ratios against it say so.
Peers that are not there are listed as absent. The GGUF files are written from the same weights.

octavo's figures are those of its native core, without engine and sampler's options, as
llama-bench's are; each stands behind the gate of `octavo bench` (the same bits alone and in a
batch). A ratio is that of the medians over the rounds, in which the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu_sides import HuggingFaceShape, LlamaBench, OctavoCore, XllamacppServer, why_absent
from machine import stamp
from sides import Remote

from octavo import _native
from octavo.config import read_environment
from octavo.machine import processor
from octavo.models.registry import read_model
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model

GGUF_FORMATS = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
Side = Callable[..., Any]


class Comparison:
    """All sides of one format."""

    def __init__(self, arguments: argparse.Namespace, path: Path, kind: str, folder: Path) -> None:
        self.arguments = arguments
        self.kind = kind
        self.absent: dict[str, str] = {}
        self.sides: dict[str, Any] = {}
        longest = max(arguments.prompt, arguments.generate)
        threads, load_format = arguments.threads, arguments.load_format
        self.sides["octavo"] = Remote(OctavoCore, path, kind, threads, load_format, longest)
        if kind not in ("f32", "bf16"):
            self.absent["transformers"] = f"has no format like {kind} on a CPU here"
        elif reason := why_absent("transformers") or why_absent("torch"):
            self.absent["transformers"] = reason
        else:
            self.sides["transformers"] = Remote(HuggingFaceShape, path, kind, threads, load_format)
        self._add_llama_cpp(path, folder, longest)

    def _add_llama_cpp(self, path: Path, folder: Path, longest: int) -> None:
        binary = self.arguments.llama_bench or shutil.which("llama-bench")
        reason = why_absent("xllamacpp")
        if binary is None and reason is not None:
            self.absent["llama.cpp"] = f"no llama-bench on the PATH, and {reason}"
            return
        from write_gguf import write_gguf

        form = GGUF_FORMATS[self.kind]
        file = folder / f"{form}.gguf"
        files = read_model(path)
        write_gguf(file, files, open_checkpoint(files, self.arguments.load_format), form)
        threads = self.arguments.threads
        if binary is not None:
            self.sides[f"llama.cpp {form}"] = LlamaBench(binary, file, threads)
        else:
            name = f"llama.cpp {form} (xllamacpp, AVX2 build)"
            self.sides[name] = Remote(XllamacppServer, file, threads, longest)

    def call(self, name: str, kind: str, count: int) -> float:
        """One measurement of one side."""
        side = self.sides[name]
        return float(
            side("run", kind, count) if isinstance(side, Remote) else side.run(kind, count)
        )

    def measure(self) -> dict[str, dict[str, list[float]]]:
        """Test -> side -> tokens a second of each round; who goes first changes."""
        tests = {"prefill": self.arguments.prompt, "decode": self.arguments.generate}
        speeds: dict[str, dict[str, list[float]]] = {
            test: {name: [] for name in self.sides} for test in tests
        }
        for number in range(-1, self.arguments.rounds):  # the round before the first warms up
            for test, count in tests.items():
                for name in list(self.sides)[:: 1 if number % 2 == 0 else -1]:
                    speed = self.call(name, test, count)
                    if number >= 0:
                        speeds[test][name].append(speed)
        return speeds

    def close(self) -> None:
        for side in self.sides.values():
            side.close()


def ratios(speeds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Test -> peer -> octavo's median speed over the peer's."""
    return {
        test: {
            name: statistics.median(sides["octavo"]) / statistics.median(values)
            for name, values in sides.items()
            if name != "octavo"
        }
        for test, sides in speeds.items()
    }


def report(kind: str, speeds: dict[str, dict[str, list[float]]]) -> None:
    """A line a test and side."""
    found = ratios(speeds)
    for test, sides in speeds.items():
        for name, values in sides.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            ratio = f"octavo is {found[test][name]:.2f}x" if name in found[test] else ""
            print(
                f"{kind:5} {test:8} {name:44} {statistics.median(values):9.1f} ± {spread:7.1f} "
                f"tok/s  {ratio}",
                flush=True,
            )


def compare(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Every format in turn; exits with 1 where a gate fails."""
    result: dict[str, Any] = {}
    for kind in arguments.formats.split(","):
        if kind not in GGUF_FORMATS:
            sys.exit(f"error: --formats has {kind!r}; expected some of {', '.join(GGUF_FORMATS)}")
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(arguments, path, kind, Path(folder))
            try:
                gate = comparison.sides["octavo"]("gate", arguments.prompt, arguments.generate)
                if not gate["passed"]:
                    sys.exit(f"error: {kind}: octavo's logits depend on what shares the batch")
                speeds = comparison.measure()
            finally:
                comparison.close()
        report(kind, speeds)
        for name, reason in comparison.absent.items():
            print(f"{kind:5} absent: {name}: {reason}", flush=True)
        result[kind] = {
            "gate": gate,
            "tokens_per_second": speeds,
            "ratios": ratios(speeds),
            "absent": comparison.absent,
        }
    return result


def main() -> None:
    """Compare, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="a name or folder, as octavo takes it")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--threads", type=int, default=_native.build_info()["physical_cores"])
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-n", "--generate", type=int, default=128, help="tokens decoded")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--llama-bench", help="path of the binary; left out: from the PATH")
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")
    arguments = parser.parse_args()
    path = resolve_model(arguments.model, read_environment())
    print(f"{path.name}: {processor()}, {arguments.threads} threads", flush=True)
    result = compare(arguments, path)
    if arguments.output is not None:
        asked = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
        stamped = {"benchmark": "compare_cpu", "arguments": asked}
        stamped["machine"] = stamp(arguments.threads)
        text = json.dumps({**stamped, **result}, indent=1)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
