"""llama.cpp's sides of compare_cpu.py: its own binaries, or the package xllamacpp (AVX2)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from rows import Row

TIMEOUT = 900.0  # seconds that one measurement may take


class LlamaBinaries:
    """llama-bench for prompts and decoding, llama-batched-bench for many requests."""

    def __init__(self, bench: Path, batched: Path, file: Path, threads: int) -> None:
        self._bench = [str(bench), "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json"]
        self._batched = [str(batched), "-m", str(file), "-t", str(threads)]
        self._batched += ["--output-format", "jsonl", "-b", "2048", "-ub", "512"]
        self._check: dict[str, Any] | None = None

    def check(self, row: Row) -> dict[str, Any]:
        """The shape, from a run of two tokens, once; and what was built."""
        if self._check is None:
            self._check = self._ask_shape()
        return self._check

    def _ask_shape(self) -> dict[str, Any]:
        test = self._ask_bench(Row("prefill", 2, 1))
        return {
            "num_parameters": int(test["model_n_params"]),
            "build": f"{test['build_commit']} ({test['build_number']})",
            "cpu": str(test.get("cpu_info", "")),
        }

    def warm_up(self, row: Row) -> None:
        """Nothing: both programs warm up themselves."""

    def run(self, row: Row) -> float:
        """Tokens a second, of one run after the program's own warm-up."""
        if row.name == "serve":
            return self._run_batched(row)
        return float(self._ask_bench(row)["avg_ts"])

    def _ask_bench(self, row: Row) -> dict[str, Any]:
        prompt, generated = (row.prompt, 0) if row.name == "prefill" else (0, row.generated)
        output = _output_of([*self._bench, "-p", str(prompt), "-n", str(generated)])
        return only_test(json.loads(output), n_prompt=prompt, n_gen=generated)

    def _run_batched(self, row: Row) -> float:
        sizes = {"-npp": row.prompt, "-ntg": row.generated, "-npl": row.requests}
        sizes["-c"] = row.requests * (row.prompt + row.generated)
        command = [*self._batched, *(str(part) for pair in sizes.items() for part in pair)]
        lines = [line for line in _output_of(command).splitlines() if line.startswith("{")]
        tests = [json.loads(line) for line in lines]
        expected = {"pp": row.prompt, "tg": row.generated, "pl": row.requests}
        return float(only_test(tests, **expected)["speed"])

    def close(self) -> None:
        """Nothing runs between measurements."""


class XllamacppServer:
    """llama.cpp inside the package xllamacpp (built for AVX2), by the timings of its server."""

    def __init__(self, file: Path, threads: int, longest: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = longest + 64
        params.n_parallel = 1
        params.verbosity = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def check(self, row: Row) -> dict[str, Any]:
        """The server does not tell the number of parameters."""
        return {}

    def warm_up(self, row: Row) -> None:
        """A short one of the same kind."""
        self.run(Row(row.name, min(row.prompt, 16), min(row.generated, 4)))

    def run(self, row: Row) -> float:
        """Tokens a second."""
        prefill = row.name == "prefill"
        answer = self._server.handle_completions(
            {
                "prompt": row.prompts()[0] if prefill else [300],
                "n_predict": 1 if prefill else row.generated,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0.0,
            }
        )
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise RuntimeError(f"xllamacpp answered without timings: {str(answer)[:300]}")
        return float(answer["timings"][f"{'prompt' if prefill else 'predicted'}_per_second"])


def only_test(tests: list[dict[str, Any]], **expected: int) -> dict[str, Any]:
    """The only test reported, when it is the one that was asked for."""
    if len(tests) != 1:
        raise ValueError(f"llama.cpp reported {len(tests)} tests; expected 1")
    for name, value in expected.items():
        if int(tests[0][name]) != value:
            raise ValueError(f"llama.cpp measured {name} {tests[0][name]}; expected {value}")
    return tests[0]


def _output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if done.returncode:
        name = Path(command[0]).name
        raise RuntimeError(f"{name} failed ({done.returncode}): {done.stderr[-500:]}")
    return done.stdout
