"""octavo beside transformers, llama.cpp, vLLM and OpenVINO on one CPU: in turn, in one run.

    python benchmarks/compare_cpu.py --llama-bench PATH --vllm-python PATH \\
        --openvino-python PATH                                                   # SmolLM2-135M
    python benchmarks/compare_cpu.py benchmarks/shapes/llama-3.2-1b --load-format dummy ...
    OCTAVO_ISA=avx2 python benchmarks/compare_cpu.py --rows prefill --formats int8,w8a8 \\
        --llama-bench PATH_OF_AN_AVX2_BUILD

Three rows: one sequence decoded, a prompt, many requests at once. llama.cpp is a llama-bench
binary (--llama-bench, else on the PATH) with llama-batched-bench beside it, or the package
xllamacpp, whose build knows AVX2 and no more: its name in the tables says so. vLLM and OpenVINO
GenAI are those of other Pythons (--vllm-python, --openvino-python). Peers that are not there are
listed as absent. The GGUF files are written from octavo's weights, OpenVINO's by optimum-intel.

The systems take turns in every round, and the order turns round too; a ratio is the median of the
rounds' ratios. Nothing is timed before the gates have passed: octavo's bits alone and in company,
the peers' shapes, and where weights are read the log-probabilities of all (agreement.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agreement import PROMPT, agreement, is_compared
from common import add_common, header, in_turns, make_parser, write_json
from cpu_report import summarize, tables
from peers import LlamaBinaries, preloaded
from systems import Process, Row

from octavo.config import QUANTIZE, read_environment
from octavo.machine import processor
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.fingerprint import model_digest
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

FORMATS = ("f32", "bf16", *QUANTIZE, "int4-g128")
# octavo's format -> a peer's beside it.
GGUF_FORMATS = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "w8a8": "q8_0", "int4": "q4_0"}
OPENVINO_FORMATS = {"bf16": "bf16", "int8": "int8", "w8a8": "int8", "int4-g128": "int4-g128"}
ROWS = ("decode", "prefill", "serve")
PEERS = ("transformers", "llama.cpp", "vllm", "openvino")
# w8a8 decodes as int8 does: it is of use where arithmetic is the limit.
NOT_MEASURED = {("decode", "w8a8")}
LARGE = 500_000_000  # parameters; transformers decodes fewer tokens of such a model


START = time.perf_counter()


def say(text: str) -> None:
    """A line of progress, with the time since the start."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


class Comparison:
    """The systems, started one after the other; `measure` lets them take turns."""

    def __init__(self, arguments: argparse.Namespace, path: Path, folder: Path) -> None:
        self.arguments, self.path, self.folder = arguments, path, folder
        self.rows = make_rows(arguments)
        self.systems: dict[str, Any] = {}
        self.forms: dict[str, str] = {}  # system -> format
        self.absent: dict[str, str] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, float] = {}  # of log-probabilities, by system
        self.skipped: dict[tuple[str, str], str] = {}  # (row, system) -> why it is not measured
        self.limits: dict[str, dict[str, float]] = {}
        self._common = (arguments.threads, arguments.load_format)

    def start(self) -> None:
        """Start every system, check each on every row, and that all compute the same."""
        truth = self._truth()
        for form in self.arguments.formats:
            rows = [row for row in self.rows if (row.name, form) not in NOT_MEASURED]
            if rows:
                kind = "octavo_system.OctavoCore"
                self._add(
                    f"octavo {form}", form, Process, kind, self.path, form, *self._common, rows
                )
        starts = (self._transformers, self._llama_cpp, self._vllm, self._openvino)
        for peer, start in zip(PEERS, starts, strict=True):
            reason = start() if peer in self.arguments.peers else None
            if reason is not None:
                self.absent[peer] = reason
        for name in self.systems:
            self._check(name)
        if truth is not None:
            self._agree(truth)

    def _truth(self) -> dict[int, float] | None:
        """What transformers computes in float32; None where there is nothing to compare."""
        reason = why_absent("transformers", "torch")
        if self.arguments.load_format == "dummy":
            reason = "dummy weights differ from system to system"
        if reason:
            self.absent["the comparison of log-probabilities"] = reason
            return None
        say("asking transformers in float32")
        system = Process("transformers_system.Transformers", self.path, "f32", *self._common)
        truth: dict[int, float] = system.logprobs(PROMPT)
        system.close()
        return truth

    def _agree(self, truth: dict[int, float]) -> None:
        """Compare log-probabilities; exits with 1 where a system computes another model."""
        found = {
            name: system.logprobs(PROMPT)
            for name, system in self.systems.items()
            if is_compared(self.forms[name])
        }
        told = {name: given for name, given in found.items() if given is not None}
        self.errors = agreement(truth, told, self.forms)

    def _add(
        self, name: str, form: str, make: Callable[..., Any], *settings: Any, **more: Any
    ) -> None:
        say(f"starting {name}")
        self.systems[name] = make(*settings, **more)
        self.forms[name] = form

    def _transformers(self) -> str | None:
        """Start it; returns why it is absent, as all of these do."""
        reason = why_absent("transformers", "torch")
        for form in () if reason else self.arguments.formats:
            if form in ("f32", "bf16"):
                kind = "transformers_system.Transformers"
                self._add(
                    f"transformers {form}", form, Process, kind, self.path, form, *self._common
                )
        return reason

    def _llama_cpp(self) -> str | None:
        a = self.arguments
        binary = a.llama_bench or shutil.which("llama-bench")
        reason = why_absent("gguf") if binary else why_absent("gguf", "xllamacpp")
        if reason:
            return f"no llama-bench on the PATH, and {reason}"
        longest = max(row.longest for row in self.rows)
        for form in _beside(GGUF_FORMATS, a.formats):
            file, name = self._gguf(form), f"llama.cpp {form}{a.llama_label}"
            if binary is not None:
                self._add(name, form, LlamaBinaries, Path(binary), file, a.threads)
                batched = self.systems[name].batched
                if not batched.is_file():
                    self.skipped["serve", name] = f"no {batched.name} beside {Path(binary).name}"
            else:
                name += " (xllamacpp, AVX2 build)"
                kind = "peers.Xllamacpp"
                self._add(name, form, Process, kind, file, a.threads, longest)
                self.skipped["serve", name] = "llama-batched-bench is not part of xllamacpp"
        return None

    def _gguf(self, form: str) -> Path:
        from write_gguf import write_gguf

        file = self.folder / f"{self.path.name}-{form}.gguf"
        if not file.is_file():
            say(f"writing {file.name}")
            files = read_model(self.path)
            unfinished = file.with_suffix(".part")
            write_gguf(unfinished, files, open_checkpoint(files, self.arguments.load_format), form)
            unfinished.rename(file)
        return file

    def _vllm(self) -> str | None:
        a = self.arguments
        if a.vllm_python is None or not a.vllm_python.is_file():
            return "no Python that has it was given (--vllm-python)"
        settings = (self.path, *self._common, self.rows, a.vllm_eager)
        more = {"python": a.vllm_python, "environment": preloaded(a.vllm_python)}
        self._add("vllm bf16", "bf16", Process, "peers.Vllm", *settings, **more)
        return None

    def _openvino(self) -> str | None:
        a = self.arguments
        if a.openvino_python is None or not a.openvino_python.is_file():
            return "no Python that has it was given (--openvino-python)"
        for form in _beside(OPENVINO_FORMATS, a.formats):
            settings = (self.path, self.folder / "openvino", form, *self._common, self.rows)
            kind = "peers.OpenVino"
            self._add(f"openvino {form}", form, Process, kind, *settings, python=a.openvino_python)
        return None

    def measured(self, row: Row) -> list[str]:
        """The systems that take part in a row."""
        return [
            name
            for name in self.systems
            if (row.name, self.forms[name]) not in NOT_MEASURED
            and (row.name, name) not in self.skipped
        ]

    def row_for(self, row: Row, name: str) -> Row:
        """The row, shorter where a system would take minutes; its speed is in its favour."""
        large = next(iter(self.checks.values()))["num_parameters"] > LARGE  # the first is octavo
        if row.name == "decode" and name.startswith("transformers") and large:
            return Row(row.name, row.prompt, min(row.generated, self.arguments.slow_generate))
        return row

    def _check(self, name: str) -> None:
        """octavo's gate, or a peer's shape; exits with 1 where one fails."""
        say(f"checking {name}")
        system = self.systems[name]
        check: dict[str, Any] = system.describe() if name.startswith("octavo") else {}
        for row in self.rows:
            if name in self.measured(row):
                check[row.name] = system.check(row)
                if not check[row.name].get("passed", True):
                    sys.exit(f"error: {name}: its bits depend on what shares the batch ({check})")
                found = check[row.name].get("num_parameters")
                expected = next(iter(self.checks.values()), check).get("num_parameters", found)
                if found is not None and found != expected:
                    sys.exit(f"error: {name} has {found} parameters; octavo has {expected}")
        self.checks[name] = check

    def measure(self) -> dict[str, dict[str, list[float]]]:
        """Row -> system -> tokens a second of each round."""
        speeds: dict[str, dict[str, list[float]]] = {
            row.name: {name: [] for name in self.measured(row)} for row in self.rows
        }
        for name in self.systems:
            say(f"warming up {name}")
            for row in self.rows:
                if name in self.measured(row):
                    self.systems[name].warm_up(self.row_for(row, name))
        slow: set[tuple[str, str]] = set()
        for number in range(self.arguments.rounds):
            self._measure_limits()
            for row in self.rows:
                for name in in_turns(self.measured(row), number):
                    if (row.name, name) in slow:
                        continue
                    start = time.perf_counter()
                    speed = float(self.systems[name].run(self.row_for(row, name)))
                    speeds[row.name][name].append(speed)
                    if time.perf_counter() - start > self.arguments.slow:
                        slow.add((row.name, name))
                    say(f"round {number + 1}: {row.name:8} {name:32} {speed:9.1f} tok/s")
        self._measure_limits()
        return speeds

    def _measure_limits(self) -> None:
        """What the machine can do in each of octavo's formats: the best seen in this run."""
        for name, system in self.systems.items():
            if name.startswith("octavo"):
                for limit, value in system.limits().items():
                    best = self.limits.setdefault(name, {})
                    best[limit] = max(best.get(limit, 0.0), value)

    def speeds_at_the_limit(self) -> dict[str, dict[str, tuple[float, str]]]:
        """Row -> octavo's format -> (tokens a second at the machine's limit, which one it is)."""
        found: dict[str, dict[str, tuple[float, str]]] = {row.name: {} for row in self.rows}
        for row in self.rows:
            for name in self.measured(row):
                if name in self.limits:
                    seconds, limit = self.systems[name].least_seconds(row, self.limits[name])
                    found[row.name][name] = (row.tokens / seconds, limit)
        return found

    def close(self) -> None:
        """End every process."""
        for system in self.systems.values():
            system.close()


def why_absent(*packages: str) -> str | None:
    """None where all packages are installed, else a few words about the first that is not."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"the package {missing[0]} is not installed" if missing else None


def _beside(peers: Mapping[str, str], formats: list[str]) -> list[str]:
    """A peer's formats beside octavo's, each once. peers: octavo's format -> the peer's."""
    return list(dict.fromkeys(peers[kind] for kind in formats if kind in peers))


def make_rows(arguments: argparse.Namespace) -> list[Row]:
    """The rows asked for."""
    a = arguments
    rows = [
        Row("decode", 1, a.generate),
        Row("prefill", a.prompt, 1),
        Row("serve", a.request_prompt, a.request_generate, a.requests),
    ]
    return [row for row in rows if row.name in a.rows]


def choices(option: str, known: Sequence[str], text: str) -> list[str]:
    """The choices in an option's text, with commas between them."""
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for part in chosen:
        if part not in known:
            raise argparse.ArgumentTypeError(
                f"{option} has {part!r}; expected some of {', '.join(known)}"
            )
    return chosen


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="a name or folder, as octavo takes it")
    add("--load-format", default="auto", choices=("auto", "dummy"))
    formats = ["bf16", "int8", "w8a8", "int4", "int4-g128"]
    add("--formats", type=partial(choices, "--formats", FORMATS), default=formats)
    add("--rows", type=partial(choices, "--rows", ROWS), default=list(ROWS))
    peers = "of: " + ", ".join(PEERS)
    add("--peers", type=partial(choices, "--peers", PEERS), default=list(PEERS), help=peers)
    add_common(parser)
    add("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    add("-n", "--generate", type=int, default=64, help="tokens decoded")
    add("--slow-generate", type=int, default=12, help="by transformers, of a large model")
    add("--requests", type=int, default=32, help="requests at once")
    add("--request-prompt", type=int, default=128, help="tokens of each request's prompt")
    add("--request-generate", type=int, default=32, help="tokens of each answer")
    add("-r", "--rounds", type=int, default=3)
    add("--slow", type=float, default=25, help="seconds; what takes longer is measured once only")
    add("--llama-bench", help="path of the binary; left out: from the PATH")
    add("--llama-label", default="", help="put behind llama.cpp's name, as ' (AVX2 build)'")
    add("--vllm-python", type=Path, help="a Python that has vLLM for CPUs")
    add("--vllm-eager", action="store_true", help="vLLM without torch.compile: starts sooner")
    add("--openvino-python", type=Path, help="a Python that has openvino-genai and optimum-intel")
    add("--gguf-folder", type=Path, help="keep GGUF files and OpenVINO's here for the next run")
    return parser


def main() -> None:
    """Compare, print, and write JSON where asked to."""
    arguments = options().parse_args()
    path = resolve_model(arguments.model, read_environment())
    isa = os.environ.get("OCTAVO_ISA") or "auto"
    print(f"{path.name}: {processor()}, {arguments.threads} threads, ISA {isa}")
    with tempfile.TemporaryDirectory() as temporary:
        # One for each model: another one, or another version, may have the same name.
        digest = model_digest(path, arguments.load_format)
        folder = (arguments.gguf_folder or Path(temporary)) / digest
        folder.mkdir(parents=True, exist_ok=True)
        comparison = Comparison(arguments, path, folder)
        try:
            comparison.start()
            speeds = comparison.measure()
            at_the_limit = comparison.speeds_at_the_limit()
        finally:
            comparison.close()
    titles = {row.name: row.title for row in comparison.rows}
    summary = summarize(speeds, at_the_limit, comparison.forms)
    for line in tables(summary, titles):
        print(line)
    for name, error in comparison.errors.items():
        print(f"log-probabilities from float32: {name}: {error:.4f}")
    for name, reason in comparison.absent.items():
        print(f"absent: {name}: {reason}")
    for (row, name), reason in comparison.skipped.items():
        print(f"not measured: {row}, {name}: {reason}")
    result = {
        **header("compare_cpu", arguments),
        "model": path.name,
        "isa": isa,
        "seconds": time.perf_counter() - START,
        "checks": comparison.checks,
        "logprob_errors": comparison.errors,
        "limits": comparison.limits,
        "tokens_per_second": speeds,
        "summary": summary,
        "absent": comparison.absent,
        "not_measured": [[*where, why] for where, why in comparison.skipped.items()],
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
