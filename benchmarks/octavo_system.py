"""octavo, and its definition in NumPy, for run.py."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from systems import Generating, Row, System, require_tokens, timed

import octavo
from octavo import LLM, SamplingParams
from octavo.bench.benchmark import Runner, fit_config
from octavo.bench.cases import Case, Work
from octavo.bench.peak import measure, measure_cuda
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.quantization.apply import quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.reference.llama import KVCache, ReferenceModel
from octavo.runtime.loader import load_runtime
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

GATE_BATCH = 8  # sequences whose logits are compared in the gate of many requests
GATE_TOKENS = 8  # tokens of each answer that are compared there


class OctavoCore(System):
    """octavo: prompts and decoding as `octavo bench` runs them, requests through the engine.

    rows: all that will be asked for; the cache has room for them. device: as EngineConfig has it.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        threads: int,
        load_format: str,
        rows: list[Row],
        device: str = "cpu",
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
            device=device,
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
        behind = Case("decode", row.generated, row.requests, row.prompt)
        return [behind] if row.name == "context" else [prompt, behind]

    def describe(self) -> dict[str, Any]:
        """What was loaded."""
        options = self._loaded.options
        return {
            "num_parameters": self._num_parameters,
            "weight_bytes": self._runner.weight_bytes,
            "kv_bytes": self._loaded.runtime.memory()["kv_cache"],
            "kv_dtype": options.kv_dtype,
            "version": octavo.__version__,
        }

    def device_memory(self) -> dict[str, int]:
        if self._loaded.device == "cpu":
            return {}
        return {"device": sum(self._loaded.runtime.memory().values())}

    def check(self, row: Row) -> dict[str, Any]:
        """The gate: the same bits alone and in company, and a hash of them."""
        # The whole batch goes through the engine below.
        cases = [replace(case, batch=min(case.batch, GATE_BATCH)) for case in self._cases(row)]
        gates = [self._runner.gate(case) for case in cases]
        passed = all(gate.passed for gate in gates)
        found = {"passed": passed, "logits": [gate.logits_hash for gate in gates]}
        if row.name not in ("requests", "batch"):
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

    def run(self, row: Row) -> dict[str, Any]:
        if row.name in ("decode", "prefill", "context"):
            return {"seconds": self._runner.time(self._cases(row)[0], 1, warm_up=False)[0]}
        if row.name == "latency":
            params = SamplingParams(temperature=0, max_tokens=row.generated, ignore_eos=True)
            chunks = self._llm.stream({"prompt_token_ids": row.prompts()[0]}, params)
            return timed(self._each_token(chunks), row.generated)
        start = time.perf_counter()
        self._generate(row.prompts(), row.generated)
        return {"seconds": time.perf_counter() - start}

    @staticmethod
    def _each_token(chunks: Iterator[Any]) -> Iterator[int]:
        """Every token of a stream's chunks, when it comes."""
        return (token for chunk in chunks for token in chunk.token_ids)

    def limits(self) -> dict[str, Any]:
        """The machine, measured now: bytes and operations a second; {} of an emulated one."""
        device = self._loaded.device
        if device not in ("cpu", "cuda"):
            return {}
        options = self._loaded.options
        peak = measure_cuda() if device == "cuda" else measure(options, self._threads, seconds=0.3)
        return {
            "bandwidth": peak.bandwidth,
            "flops": peak.flops,
            "arithmetic": peak.arithmetic,
        }

    def works(self, row: Row) -> list[tuple[float, float]]:
        """Bytes and operations of a row's parts, at least: of prompts, then of decoding."""
        if row.name in ("decode", "prefill", "context"):
            parts = [self._runner.work(self._cases(row)[0])]
        else:
            # Prompts share their steps: weights are read once a step, not once a prompt.
            one = self._runner.work(Case("prefill", row.prompt))
            most = self._loaded.options.max_num_batched_tokens
            num_steps = -(-row.requests * row.prompt // most)
            prompts = Work(self._runner.step_bytes * num_steps, one.num_operations * row.requests)
            decoding = Case("decode", row.generated - 1, row.requests, row.prompt)
            parts = [prompts, self._runner.work(decoding)]
        return [(part.num_bytes, part.num_operations) for part in parts]


class Reference(Generating):
    """The definition of the model in NumPy, in float32 and without any haste."""

    def __init__(self, path: str, load_format: str) -> None:
        files = read_model(Path(path))
        checkpoint = open_checkpoint(files, load_format)
        weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
        self._model = ReferenceModel(files.spec, weights)
        self.description = {"num_parameters": checkpoint.num_parameters}

    def generate(self, prompts: list[list[int]], count: int) -> float:
        start = time.perf_counter()
        for prompt in prompts:
            for _ in self.stream(prompt, count):
                pass
        return time.perf_counter() - start

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        cache, ids = KVCache(), prompt
        for _ in range(count):
            logits = self._model.forward(ids, cache, logit_rows=[len(ids) - 1])
            ids = [int(logits[0].argmax())]
            yield ids[0]

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """The log-probability of every next token."""
        logits = self._model.forward(prompt, logit_rows=[len(prompt) - 1])[0].astype(np.float64)
        logits -= logits.max()
        return dict(enumerate((logits - np.log(np.exp(logits).sum())).tolist()))


def top_logprobs(llm: LLM, prompt: list[int]) -> dict[int, float]:
    """The 20 most probable next tokens and their log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20)
    first = llm.generate(prompt, params, progress=False)[0].outputs[0].logprobs[0]
    return dict(zip(first.top_token_ids, first.top_logprobs, strict=True))
