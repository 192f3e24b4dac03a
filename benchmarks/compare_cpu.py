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

The sides take turns in every round, and the order turns round too; a ratio is the median of the
rounds' ratios. Nothing of octavo's is timed before its gate has passed: the same bits alone and in
company. Of the peers only the shape is checked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpu_report import summarize, tables
from cpu_sides import OctavoSide, TransformersSide, forced_isa, why_absent
from llama_sides import LlamaBinaries, XllamacppServer
from machine import asked, stamp
from openvino_side import OPENVINO_FORMATS, OpenvinoSide
from rows import Row
from sides import Remote
from vllm_side import VllmSide

from octavo import _native
from octavo.config import QUANTIZE, read_environment
from octavo.machine import processor
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.fingerprint import model_digest
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

FORMATS = ("f32", "bf16", *QUANTIZE, "int4-g128")
GGUF_FORMATS = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "w8a8": "q8_0", "int4": "q4_0"}
ROWS = ("decode", "prefill", "serve")
PEERS = ("transformers", "llama.cpp", "vllm", "openvino")
# w8a8 decodes as int8 does: it is of use where arithmetic is the limit.
NOT_MEASURED = {("decode", "w8a8")}
LARGE = 500_000_000  # parameters; transformers decodes fewer tokens of such a model


def say(text: str) -> None:
    """A line of progress, with the time since the start."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


START = time.perf_counter()


class Comparison:
    """The sides, started one after the other; `measure` lets them take turns."""

    def __init__(self, arguments: argparse.Namespace, path: Path, folder: Path) -> None:
        self.arguments, self.path, self.folder = arguments, path, folder
        self.rows = make_rows(arguments)
        self.sides: dict[str, Any] = {}
        self.forms: dict[str, str] = {}  # side -> format
        self.absent: dict[str, str] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.skipped: dict[tuple[str, str], str] = {}  # (row, side) -> why it is not measured
        self.limits: dict[str, dict[str, float]] = {}

    def start(self) -> None:
        """Start every side, and check each on every row."""
        a = self.arguments
        for kind in a.formats:
            rows = [row for row in self.rows if (row.name, kind) not in NOT_MEASURED]
            if rows:
                self._add(
                    f"octavo {kind}",
                    kind,
                    lambda k=kind, r=rows: Remote(
                        OctavoSide, self.path, k, a.threads, a.load_format, r
                    ),
                )
        floats = [kind for kind in a.formats if kind in ("f32", "bf16")]
        self._start_transformers([kind for kind in floats if "transformers" in a.peers])
        if "llama.cpp" in a.peers:
            self._start_llama_cpp(_beside(GGUF_FORMATS, a.formats))
        if "vllm" in a.peers:
            self._start_vllm()
        if "openvino" in a.peers:
            self._start_openvino(_beside(OPENVINO_FORMATS, a.formats))
        for name in self.sides:
            self._check(name)

    def _add(self, name: str, form: str, start: Callable[[], Any]) -> None:
        say(f"starting {name}")
        self.sides[name] = start()
        self.forms[name] = form

    def _start_transformers(self, kinds: list[str]) -> None:
        a = self.arguments
        reason = why_absent("transformers") or why_absent("torch")
        if reason:
            self.absent["transformers"] = reason
            return
        for kind in kinds:
            self._add(
                f"transformers {kind}",
                kind,
                lambda k=kind: Remote(TransformersSide, self.path, k, a.threads, a.load_format),
            )

    def _start_llama_cpp(self, forms: list[str]) -> None:
        a = self.arguments
        binary = a.llama_bench or shutil.which("llama-bench")
        reason = why_absent("gguf") or (why_absent("xllamacpp") if binary is None else None)
        if reason:
            self.absent["llama.cpp"] = f"no llama-bench on the PATH, and {reason}"
            return
        longest = max(row.prompt + row.generated for row in self.rows)
        for form in forms:
            file = self._gguf(form)
            name = f"llama.cpp {form}{a.llama_label}"
            if binary is not None:
                batched = Path(binary).with_name("llama-batched-bench")
                self._add(
                    name,
                    form,
                    lambda f=file, b=batched: LlamaBinaries(Path(binary), b, f, a.threads),
                )
                if not batched.is_file():
                    self.skipped["serve", name] = f"no {batched.name} beside {Path(binary).name}"
                continue
            name += " (xllamacpp, AVX2 build)"
            self._add(name, form, lambda f=file: Remote(XllamacppServer, f, a.threads, longest))
            self.skipped["serve", name] = "llama-batched-bench is not part of xllamacpp"

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

    def _start_vllm(self) -> None:
        a = self.arguments
        if a.vllm_python is None or not a.vllm_python.is_file():
            self.absent["vllm"] = "no Python that has it was given (--vllm-python)"
            return
        self._add(
            "vllm bf16",
            "bf16",
            lambda: VllmSide(
                a.vllm_python, self.path, a.threads, a.load_format, self.rows, a.vllm_eager
            ),
        )

    def _start_openvino(self, forms: list[str]) -> None:
        a = self.arguments
        if a.openvino_python is None or not a.openvino_python.is_file():
            self.absent["openvino"] = "no Python that has it was given (--openvino-python)"
            return
        for form in forms:
            self._add(
                f"openvino {form}",
                form,
                lambda f=form: OpenvinoSide(
                    a.openvino_python,
                    self.path,
                    self.folder / "openvino",
                    f,
                    a.threads,
                    a.load_format,
                    self.rows,
                ),
            )

    def call(self, name: str, what: str, *values: Any) -> Any:
        """Ask a side, wherever it runs."""
        side = self.sides[name]
        return side(what, *values) if isinstance(side, Remote) else getattr(side, what)(*values)

    def measured(self, row: Row) -> list[str]:
        """The sides that take part in a row."""
        return [
            name
            for name in self.sides
            if (row.name, self.forms[name]) not in NOT_MEASURED
            and (row.name, name) not in self.skipped
        ]

    def row_for(self, row: Row, name: str) -> Row:
        """The row, shorter where a side would take minutes; its speed is in its favour."""
        octavo = next(check for side, check in self.checks.items() if side.startswith("octavo"))
        large = octavo["num_parameters"] > LARGE
        if row.name == "decode" and name.startswith("transformers") and large:
            return Row(row.name, row.prompt, min(row.generated, self.arguments.slow_generate))
        return row

    def _check(self, name: str) -> None:
        """octavo's gate, or a peer's shape; exits with 1 where one fails."""
        say(f"checking {name}")
        octavo = name.startswith("octavo")
        check: dict[str, Any] = self.call(name, "describe") if octavo else {}
        for row in self.rows:
            if name in self.measured(row):
                check[row.name] = self.call(name, "check", row)
                if not check[row.name].get("passed", True):
                    sys.exit(f"error: {name}: its bits depend on what shares the batch ({check})")
                found = check[row.name].get("num_parameters")
                expected = next(iter(self.checks.values()), check).get("num_parameters", found)
                if found is not None and found != expected:
                    sys.exit(f"error: {name} has {found} parameters; octavo has {expected}")
        self.checks[name] = check

    def measure(self) -> dict[str, dict[str, list[float]]]:
        """Row -> side -> tokens a second of each round."""
        speeds: dict[str, dict[str, list[float]]] = {
            row.name: {name: [] for name in self.measured(row)} for row in self.rows
        }
        for name in self.sides:
            say(f"warming up {name}")
            for row in self.rows:
                if name in self.measured(row):
                    self.call(name, "warm_up", self.row_for(row, name))
        slow: set[tuple[str, str]] = set()
        for number in range(self.arguments.rounds):
            self._measure_limits()
            for row in self.rows:
                for name in self.measured(row)[:: 1 if number % 2 == 0 else -1]:
                    if (row.name, name) in slow:
                        continue
                    start = time.perf_counter()
                    speed = float(self.call(name, "run", self.row_for(row, name)))
                    speeds[row.name][name].append(speed)
                    if time.perf_counter() - start > self.arguments.slow:
                        slow.add((row.name, name))
                    say(f"round {number + 1}: {row.name:8} {name:32} {speed:9.1f} tok/s")
        self._measure_limits()
        return speeds

    def _measure_limits(self) -> None:
        """What the machine can do in each of octavo's formats: the best seen in this run."""
        for name in self.sides:
            if name.startswith("octavo"):
                for limit, value in self.call(name, "limits").items():
                    best = self.limits.setdefault(name, {})
                    best[limit] = max(best.get(limit, 0.0), value)

    def speeds_at_the_limit(self) -> dict[str, dict[str, tuple[float, str]]]:
        """Row -> octavo's side -> (tokens a second at the machine's limit, which one it is)."""
        found: dict[str, dict[str, tuple[float, str]]] = {row.name: {} for row in self.rows}
        for row in self.rows:
            for name in self.measured(row):
                if name in self.limits:
                    seconds, limit = self.call(name, "least_seconds", row, self.limits[name])
                    found[row.name][name] = (row.tokens / seconds, limit)
        return found

    def close(self) -> None:
        """End every process."""
        for side in self.sides.values():
            side.close()


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


def parse_choices(name: str, known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A reader of comma-separated choices for argparse."""

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",") if part.strip()]
        wrong = [part for part in chosen if part not in known]
        if wrong:
            raise argparse.ArgumentTypeError(
                f"{name} has {wrong[0]!r}; expected some of {', '.join(known)}"
            )
        return chosen

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("model", nargs="?", help="a name or folder, as octavo takes it")
    add("--load-format", default="auto", choices=("auto", "dummy"))
    formats, rows, peers = (
        parse_choices(name, known)
        for name, known in (("--formats", FORMATS), ("--rows", ROWS), ("--peers", PEERS))
    )
    add("--formats", type=formats, default=["bf16", "int8", "w8a8", "int4", "int4-g128"])
    add("--rows", type=rows, default=list(ROWS))
    add("--peers", type=peers, default=list(PEERS), help="of: " + ", ".join(PEERS))
    add("--threads", type=int, default=_native.build_info()["physical_cores"])
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
    add("--output", type=Path, help="also write everything to this JSON file")
    return parser


def main() -> None:
    """Compare, print, and write JSON where asked to."""
    arguments = make_parser().parse_args()
    path = resolve_model(arguments.model, read_environment())
    print(f"{path.name}: {processor()}, {arguments.threads} threads, ISA {forced_isa()}")
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
    for name, reason in comparison.absent.items():
        print(f"absent: {name}: {reason}")
    for (row, name), reason in comparison.skipped.items():
        print(f"not measured: {row}, {name}: {reason}")
    if arguments.output is not None:
        result = {
            "benchmark": "compare_cpu",
            "model": path.name,
            "arguments": asked(arguments),
            "isa": forced_isa(),
            "seconds": time.perf_counter() - START,
            "machine": stamp(arguments.threads),
            "checks": comparison.checks,
            "limits": comparison.limits,
            "tokens_per_second": speeds,
            "summary": summary,
            "absent": comparison.absent,
            "not_measured": [[*where, why] for where, why in comparison.skipped.items()],
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
