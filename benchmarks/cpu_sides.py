"""octavo's and transformers' sides of compare_cpu.py, each in a process of its own.

A side has `check(row)`, asked once before anything is timed, `warm_up(row)`, and `run(row)`: tokens
a second. None of a side's threads may spin while another one is measured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rows import Row
from sides import HuggingFaceSide

GATE_BATCH = 8  # sequences whose logits are compared in the gate of many requests
GATE_TOKENS = 8  # tokens of each answer that are compared there


class OctavoSide:
    """octavo: prompts and decoding as `octavo bench` runs them, requests through the engine."""

    def __init__(
        self, path: Path, kind: str, threads: int, load_format: str, rows: list[Row]
    ) -> None:
        from octavo import LLM
        from octavo.bench.benchmark import Runner, fit_config
        from octavo.config import EngineConfig
        from octavo.engine.engine import Engine
        from octavo.quantization.apply import quantize_checkpoint
        from octavo.quantization.plan import Scheme
        from octavo.runtime.loader import load_runtime
        from octavo.weights.checkpoint import open_checkpoint
        from octavo.weights.model_files import read_model

        settings: dict[str, Any] = {"dtype": kind if kind in ("f32", "bf16") else "bf16"}
        scheme: Scheme | None = None
        if kind == "int4-g128":
            # As `octavo quantize --group-size 128` writes it: --quantize takes groups of 32.
            method = "rtn" if load_format == "dummy" else "search"
            scheme = Scheme("int4", group_size=128, method=method)
        elif kind not in ("f32", "bf16"):
            settings["quantize"] = kind
        # Every round asks the same prompts: they are to be computed each time.
        config = EngineConfig(
            device="cpu",
            num_threads=threads,
            load_format=load_format,
            enable_prefix_caching=False,
            **settings,
        )
        files = read_model(path)
        checkpoint = open_checkpoint(files, load_format)
        self._num_parameters = checkpoint.num_parameters
        checkpoint = quantize_checkpoint(checkpoint, files.spec, scheme)
        cases = [case for row in rows for case in self._cases(row)]
        self._loaded = load_runtime(files, checkpoint, fit_config(config, cases))
        self._runner = Runner(self._loaded, files.spec, None)
        self._spec, self._threads = files.spec, threads
        self._llm = LLM.from_engine(
            Engine(
                self._loaded.runtime,
                self._loaded.options,
                num_kv_blocks=self._loaded.num_kv_blocks,
                vocab_size=files.spec.vocab_size,
                num_kv_groups=files.spec.num_kv_groups,
            )
        )

    @staticmethod
    def _cases(row: Row) -> list[Any]:
        """The cases of `octavo bench` that a row consists of."""
        from octavo.bench.cases import Case

        if row.name == "prefill":
            return [Case("prefill", row.prompt)]
        if row.name == "decode":
            return [Case("decode", row.generated)]
        decoded = Case("decode", row.generated, row.requests, row.prompt)
        return [Case("prefill", row.prompt), decoded]

    def describe(self) -> dict[str, Any]:
        """What was loaded."""
        options = self._loaded.options
        return {
            "num_parameters": self._num_parameters,
            "weight_bytes": self._runner.weight_bytes,
            "kv_dtype": options.kv_dtype,
            "isa": options.isa,
        }

    def check(self, row: Row) -> dict[str, Any]:
        """The gate: the same bits alone and in company, and a hash of them."""
        cases = self._cases(row)
        if row.name == "serve":  # the whole batch goes through the engine below
            cases[1] = replace(cases[1], batch=min(row.requests, GATE_BATCH))
        gates = [self._runner.gate(case) for case in cases]
        passed = all(gate.passed for gate in gates)
        logits = [gate.logits_hash for gate in gates]
        if row.name != "serve":
            return {"passed": passed, "logits": logits}
        prompts, count = row.prompts(), min(row.generated, GATE_TOKENS)
        together = self._generate(prompts, count)
        alone = self._generate(prompts[-1:], count)
        data = repr(together).encode()
        return {
            "passed": passed and alone == together[-1:],
            "logits": logits,
            "tokens": hashlib.sha256(data).hexdigest()[:16],
        }

    def _generate(self, prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
        from octavo import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, progress=False)
        found = [tuple(output.outputs[0].token_ids) for output in outputs]
        if any(len(tokens) != count for tokens in found):
            raise RuntimeError(f"an answer has not {count} tokens: {[len(t) for t in found]}")
        return found

    def warm_up(self, row: Row) -> None:
        """The gate has run every kernel; a few more steps."""
        self.run(Row(row.name, min(row.prompt, 16), min(row.generated, 4), row.requests))

    def run(self, row: Row) -> float:
        """Tokens a second."""
        if row.name == "serve":
            start = time.perf_counter()
            self._generate(row.prompts(), row.generated)
            return row.tokens / (time.perf_counter() - start)
        return row.tokens / self._runner.time(self._cases(row)[0], 1, warm_up=False)[0]

    def limits(self) -> dict[str, float]:
        """The machine, measured now: bytes and operations a second."""
        from octavo.bench.peak import measure

        peak = measure(self._loaded.options, self._threads, seconds=0.3)
        return {"bandwidth": peak.bandwidth, "flops": peak.flops}

    def least_seconds(self, row: Row, limits: dict[str, float]) -> tuple[float, str]:
        """How long a row takes at the machine's limits, and the limit of most of that time."""
        from octavo.bench.cases import Case, Peak, Work, least_seconds

        peak = Peak(limits["bandwidth"], limits["flops"])
        if row.name != "serve":
            return least_seconds(self._runner.work(self._cases(row)[0]), peak)
        # Prompts share their steps: weights are read once a step, not once a prompt.
        one = self._runner.work(Case("prefill", row.prompt))
        num_steps = -(-row.requests * row.prompt // self._loaded.options.max_num_batched_tokens)
        prompts = Work(self._runner.step_bytes * num_steps, one.num_operations * row.requests)
        parts = [
            least_seconds(prompts, peak),
            least_seconds(
                self._runner.work(Case("decode", row.generated - 1, row.requests, row.prompt)), peak
            ),
        ]
        return sum(seconds for seconds, _ in parts), max(parts)[1]


class TransformersSide(HuggingFaceSide):
    """transformers, eager, sdpa; with load_format "dummy" random weights in the shape."""

    def __init__(self, path: Path, kind: str, threads: int, load_format: str) -> None:
        import torch

        if load_format != "dummy":
            super().__init__(path, kind, threads)
        else:
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.initialization import no_init_weights

            torch.set_num_threads(threads)
            self._dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
            config = AutoConfig.from_pretrained(path)
            with no_init_weights():
                self._model = AutoModelForCausalLM.from_config(config, dtype=self._dtype).eval()
            self._model.tie_weights()  # part of what was left out
            with torch.no_grad():
                for weight in self._model.parameters():
                    weight.uniform_(-0.03, 0.03)
        self._torch = torch

    def check(self, row: Row) -> dict[str, Any]:
        """The shape."""
        return {"num_parameters": sum(p.numel() for p in self._model.parameters())}

    def warm_up(self, row: Row) -> None:
        """A short one of the same kind."""
        self.run(Row(row.name, min(row.prompt, 16), min(row.generated, 2), min(row.requests, 2)))

    def run(self, row: Row) -> float:
        """Tokens a second."""
        if row.name == "prefill":
            return float(self.prefill(row.prompts()[0])["speed"])
        prompts = row.prompts() if row.name == "serve" else [[10]]
        steps = row.generated if row.name == "decode" else row.generated - 1
        cache, ids = None, self._torch.tensor(prompts)
        start = time.perf_counter()
        with self._torch.inference_mode():
            if row.name == "serve":
                ids, cache = self._next(ids, cache)
            for _ in range(steps):
                ids, cache = self._next(ids, cache)
        return row.tokens / (time.perf_counter() - start)

    def _next(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values


def why_absent(package: str) -> str | None:
    """None where a package is installed, else a few words."""
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def forced_isa() -> str:
    """What OCTAVO_ISA forces; "auto" where it says nothing."""
    return os.environ.get("OCTAVO_ISA") or "auto"
