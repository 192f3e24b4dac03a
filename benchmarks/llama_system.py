"""llama.cpp for compare_cpu.py: its own binaries, or the package xllamacpp (AVX2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from common import output_of
from systems import Generating, Row

TIMEOUT = 900.0  # seconds that one measurement may take


class LlamaBinaries:
    """llama-bench for prompts and decoding; beside it llama-batched-bench for many requests."""

    def __init__(self, bench: Path, file: Path, threads: int) -> None:
        self.batched = bench.with_name("llama-batched-bench")
        common = ["-m", str(file), "-t", str(threads)]
        self._bench = [str(bench), *common, "-r", "1", "-o", "json"]
        self._batched = [str(self.batched), *common, "--output-format", "jsonl"]
        self._batched += ["-b", "2048", "-ub", "512"]

    @cached_property
    def _shape(self) -> dict[str, Any]:
        """From a run of two tokens."""
        test = self._ask_bench(Row("prefill", 2, 1))
        return {
            "num_parameters": int(test["model_n_params"]),
            "build": f"{test['build_commit']} ({test['build_number']})",
            "cpu": str(test.get("cpu_info", "")),
        }

    def check(self, row: Row) -> dict[str, Any]:
        """The shape, and what was built."""
        return self._shape

    def warm_up(self, row: Row) -> None:
        """Nothing: both programs warm up themselves."""

    def run(self, row: Row) -> float:
        """Tokens a second, of one run after the program's own warm-up."""
        if row.name == "serve":
            return self._run_batched(row)
        return float(self._ask_bench(row)["avg_ts"])

    def _ask_bench(self, row: Row) -> dict[str, Any]:
        prompt, generated = (row.prompt, 0) if row.name == "prefill" else (0, row.generated)
        command = [*self._bench, "-p", str(prompt), "-n", str(generated)]
        output, _ = output_of(command, TIMEOUT)
        return only_test(json.loads(output), n_prompt=prompt, n_gen=generated)

    def _run_batched(self, row: Row) -> float:
        sizes = {"-npp": row.prompt, "-ntg": row.generated, "-npl": row.requests}
        sizes["-c"] = row.requests * row.longest
        command = [*self._batched, *(str(part) for pair in sizes.items() for part in pair)]
        output, _ = output_of(command, TIMEOUT)
        tests = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        expected = {"pp": row.prompt, "tg": row.generated, "pl": row.requests}
        return float(only_test(tests, **expected)["speed"])

    def close(self) -> None:
        """Nothing runs between measurements."""


class Xllamacpp(Generating):
    """llama.cpp inside the package xllamacpp (built for AVX2), by the timings of its server."""

    description: Mapping[str, Any] = {}  # it does not tell the number of parameters

    def __init__(self, file: str, threads: int, longest: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx = longest + 64
        params.n_parallel = 1
        params.verbosity = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def run(self, row: Row) -> float:
        answer = self._server.handle_completions(
            {
                "prompt": row.prompts()[0],
                "n_predict": row.generated,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0.0,
            }
        )
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise RuntimeError(f"xllamacpp answered without timings: {str(answer)[:300]}")
        stage = "prompt" if row.name == "prefill" else "predicted"
        return float(answer["timings"][f"{stage}_per_second"])


def only_test(tests: list[dict[str, Any]], **expected: int) -> dict[str, Any]:
    """The only test reported, when it is the one that was asked for."""
    if len(tests) != 1:
        raise ValueError(f"llama.cpp reported {len(tests)} tests; expected 1")
    for name, value in expected.items():
        if int(tests[0][name]) != value:
            raise ValueError(f"llama.cpp measured {name} {tests[0][name]}; expected {value}")
    return tests[0]
