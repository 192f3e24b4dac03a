"""octavo for compare_cpu.py and compare_hf.py."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from systems import Row, require_tokens

from octavo import LLM, SamplingParams
from octavo.bench.benchmark import Runner, fit_config
from octavo.bench.cases import Case, Peak, Work, least_seconds
from octavo.bench.peak import measure
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.quantization.apply import quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.runtime.loader import load_runtime
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

GATE_BATCH = 8  # sequences whose logits are compared in the gate of many requests
GATE_TOKENS = 8  # tokens of each answer that are compared there


class OctavoCore:
    """octavo: prompts and decoding as `octavo bench` runs them, requests through the engine."""

    def __init__(
        self, path: str, kind: str, threads: int, load_format: str, rows: list[Row]
    ) -> None:
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
        files = read_model(Path(path))
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
                kv_windows=files.spec.kv_windows,
            )
        )

    @staticmethod
    def _cases(row: Row) -> list[Case]:
        """The cases of `octavo bench` that a row consists of."""
        prompt = Case("prefill", row.prompt)
        if row.name == "prefill":
            return [prompt]
        if row.name == "decode":
            return [Case("decode", row.generated)]
        return [prompt, Case("decode", row.generated, row.requests, row.prompt)]

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
        found = {"passed": passed, "logits": [gate.logits_hash for gate in gates]}
        if row.name != "serve":
            return found
        prompts, count = row.prompts(), min(row.generated, GATE_TOKENS)
        together = self._generate(prompts, count)
        alone = self._generate(prompts[-1:], count)
        found["passed"] = passed and alone == together[-1:]
        return {**found, "tokens": hashlib.sha256(repr(together).encode()).hexdigest()[:16]}

    def _generate(self, prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, progress=False)
        found = [tuple(output.outputs[0].token_ids) for output in outputs]
        require_tokens([len(tokens) for tokens in found], count)
        return found

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """The 20 most probable next tokens and their log-probabilities."""
        return top_logprobs(self._llm, prompt)

    def warm_up(self, row: Row) -> None:
        """The gate has run every kernel; a few more steps."""
        self.run(row.short)

    def run(self, row: Row) -> float:
        """Tokens a second."""
        if row.name == "serve":
            start = time.perf_counter()
            self._generate(row.prompts(), row.generated)
            return row.tokens / (time.perf_counter() - start)
        return row.tokens / self._runner.time(self._cases(row)[0], 1, warm_up=False)[0]

    def limits(self) -> dict[str, float]:
        """The machine, measured now: bytes and operations a second."""
        peak = measure(self._loaded.options, self._threads, seconds=0.3)
        return {"bandwidth": peak.bandwidth, "flops": peak.flops}

    def least_seconds(self, row: Row, limits: dict[str, float]) -> tuple[float, str]:
        """How long a row takes at the machine's limits, and the limit of most of that time."""
        peak = Peak(limits["bandwidth"], limits["flops"])
        if row.name != "serve":
            return least_seconds(self._runner.work(self._cases(row)[0]), peak)
        # Prompts share their steps: weights are read once a step, not once a prompt.
        one = self._runner.work(Case("prefill", row.prompt))
        num_steps = -(-row.requests * row.prompt // self._loaded.options.max_num_batched_tokens)
        prompts = Work(self._runner.step_bytes * num_steps, one.num_operations * row.requests)
        decoding = Case("decode", row.generated - 1, row.requests, row.prompt)
        parts = [least_seconds(work, peak) for work in (prompts, self._runner.work(decoding))]
        return sum(seconds for seconds, _ in parts), max(parts)[1]


class Octavo:
    """octavo through its public API, engine and sampler included."""

    def __init__(self, path: str, dtype: str, num_threads: int) -> None:
        # Every round asks the same prompt: it is to be computed each time.
        self._llm = LLM(
            path,
            dtype=dtype,
            num_threads=num_threads,
            max_model_len=2048,
            enable_prefix_caching=False,
        )

    def _run(self, prompt: list[int], num_tokens: int) -> Any:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return self._llm.generate(prompt, params, progress=False)[0]

    def decode(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Tokens a second after the first token ("speed"), and the tokens."""
        output = self._run(prompt, num_tokens)
        tokens = list(output.outputs[0].token_ids)
        return {"speed": output.metrics.tokens_per_second, "tokens": tokens}

    def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens a second, up to the first token of the answer."""
        return float(len(prompt) / self._run(prompt, 1).metrics.time_to_first_token)

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """The 20 most probable next tokens and their log-probabilities."""
        return top_logprobs(self._llm, prompt)


def top_logprobs(llm: LLM, prompt: list[int]) -> dict[int, float]:
    """The 20 most probable next tokens and their log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20)
    first = llm.generate(prompt, params, progress=False)[0].outputs[0].logprobs[0]
    return dict(zip(first.top_token_ids, first.top_logprobs, strict=True))
