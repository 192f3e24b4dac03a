"""Who compare_cpu.py compares: each measures a prompt or decoding once, in tokens a second.

Every side but llama-bench runs in a process of its own (sides.Remote), so that its threads do not
spin while another is measured.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from sides import HuggingFaceSide


class OctavoCore:
    """octavo's native core, as `octavo bench` runs it; no figure without its gate."""

    def __init__(self, path: Path, kind: str, threads: int, load_format: str, longest: int) -> None:
        from octavo.bench.cases import Case
        from octavo.bench.run import Runner, fit_config
        from octavo.config import EngineConfig
        from octavo.engine.loader import load_runtime
        from octavo.models.registry import read_model
        from octavo.weights.checkpoint import open_checkpoint

        settings: dict[str, Any] = {"dtype": "bf16" if kind != "f32" else "f32"}
        if kind in ("int8", "int4"):
            settings["quantize"] = kind
        config = EngineConfig(
            device="cpu", num_threads=threads, load_format=load_format, **settings
        )
        files = read_model(path)
        cases = [Case("prefill", longest), Case("decode", longest)]
        loaded = load_runtime(files, open_checkpoint(files, load_format), fit_config(config, cases))
        self._case = Case
        self._runner = Runner(loaded, files.spec, None)

    def gate(self, prompt: int, generate: int) -> dict[str, Any]:
        """Batch invariance of both tests, and the hashes of their logits."""
        cases = [self._case("prefill", prompt), self._case("decode", generate)]
        gates = {case.name: self._runner.gate(case) for case in cases}
        return {
            "passed": all(gate.passed for gate in gates.values()),
            "logits": {name: gate.logits_hash for name, gate in gates.items()},
        }

    def run(self, kind: str, count: int) -> float:
        """Tokens a second; the first of two runs only warms up."""
        case = self._case(kind, count)
        return count / self._runner.time(case, 1)[0]


class HuggingFaceShape(HuggingFaceSide):
    """transformers; with load_format "dummy" random weights in the configuration's shape."""

    def __init__(self, path: Path, kind: str, threads: int, load_format: str) -> None:
        if load_format != "dummy":
            super().__init__(path, kind, threads)
            return
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
        config = AutoConfig.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_config(config, dtype=self._dtype).eval()

    def run(self, kind: str, count: int) -> float:
        """Tokens a second."""
        tokens = [(7919 * index) % 1000 + 3 for index in range(count)]
        if kind == "prefill":
            return float(self.prefill(tokens)["speed"])
        return float(self.decode(tokens[:1], count)["speed"])


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

    def run(self, kind: str, count: int) -> float:
        """Tokens a second."""
        length = count if kind == "prefill" else 1
        answer = self._server.handle_completions(
            {
                "prompt": [(7919 * index) % 1000 + 300 for index in range(length)],
                "n_predict": 1 if kind == "prefill" else count,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0.0,
            }
        )
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise RuntimeError(f"xllamacpp answered without timings: {str(answer)[:300]}")
        part = "prompt" if kind == "prefill" else "predicted"
        return float(answer["timings"][f"{part}_per_second"])


class LlamaBench:
    """A llama-bench binary."""

    def __init__(self, binary: str, file: Path, threads: int) -> None:
        self._command = [binary, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json"]

    def run(self, kind: str, count: int) -> float:
        """Tokens a second, of one run after llama-bench's own warm-up."""
        sizes = (
            ["-p", str(count), "-n", "0"] if kind == "prefill" else ["-p", "0", "-n", str(count)]
        )
        done = subprocess.run(
            self._command + sizes, capture_output=True, text=True, check=False, timeout=1800
        )
        if done.returncode:
            raise RuntimeError(f"llama-bench failed ({done.returncode}): {done.stderr[-500:]}")
        return parse_llama_bench(done.stdout)

    def close(self) -> None:
        """Nothing runs between measurements."""


def parse_llama_bench(output: str) -> float:
    """Tokens a second of the only test in llama-bench's JSON."""
    tests = json.loads(output)
    if len(tests) != 1:
        raise ValueError(f"llama-bench reported {len(tests)} tests; expected 1")
    return float(tests[0]["avg_ts"])


def why_absent(package: str) -> str | None:
    """None where a package is installed, else a few words."""
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"
