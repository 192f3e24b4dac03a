"""Peers of octavo, for run.py: llama.cpp, vLLM and OpenVINO GenAI.

The last two run in a Python that has them, which may lack octavo: none of it is imported here, and
of the peers only what is measured.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from agreement import PROMPT, llama_logprobs
from systems import Generating, Row, System, output_of, require_tokens

TIMEOUT = 900.0  # seconds that one measurement of llama.cpp may take
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
OPENVINO_BITS = {"int8": 8, "int4-g128": 4}
OPENVINO_BLOCK = 16  # tokens; its blocks hold no fewer


class LlamaBinaries(System):
    """llama-bench for prompts and decoding; beside it llama-batched-bench for many requests.

    llama-perplexity, where it lies beside them, tells what is computed. Every run is a process of
    its own, which loads the model first.
    """

    def __init__(self, bench: str, file: str, threads: int) -> None:
        self._batched_bench = Path(bench).with_name("llama-batched-bench")
        self._perplexity = Path(bench).with_name("llama-perplexity")
        self._file, self._threads = Path(file), threads
        common = ["-m", file, "-t", str(threads)]
        self._bench = [bench, *common, "-r", "1", "-o", "json"]
        self._batched = [str(self._batched_bench), *common, "--output-format", "jsonl"]
        self._batched += ["-b", "2048", "-ub", "512"]
        test = self._ask_bench(Row("prefill", 2, 1))
        self.description = {
            "num_parameters": int(test["model_n_params"]),
            "version": f"build {test['build_number']} ({test['build_commit']})",
        }

    def warm_up(self, row: Row) -> None:
        """Nothing: both programs warm up themselves."""

    def run(self, row: Row) -> dict[str, Any]:
        """One run after the program's own warm-up."""
        if row.name == "latency":
            raise NotImplementedError("llama-bench does not tell when each token comes")
        if row.name not in ("requests", "batch"):
            return {"seconds": row.tokens / float(self._ask_bench(row)["avg_ts"])}
        if not self._batched_bench.is_file():
            raise FileNotFoundError(f"no llama-batched-bench beside {self._bench[0]}")
        return {"seconds": self._run_batched(row)}

    def memory(self) -> dict[str, int]:
        """Of the programs."""
        return {"host": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}

    def logprobs(self, prompt: list[int]) -> dict[int, float] | None:
        """Of the next token; None without llama-perplexity beside, which takes PROMPT only."""
        if prompt != PROMPT or not self._perplexity.is_file():
            return None
        return llama_logprobs(self._perplexity, self._file, self._threads)

    def _ask_bench(self, row: Row) -> dict[str, Any]:
        prompt, generated = (row.prompt, 0) if row.name == "prefill" else (0, row.generated)
        command = [*self._bench, "-p", str(prompt), "-n", str(generated)]
        if row.name == "context":
            command += ["-d", str(row.prompt)]
        output, _ = output_of(command, TIMEOUT)
        return only_test(json.loads(output), n_prompt=prompt, n_gen=generated)

    def _run_batched(self, row: Row) -> float:
        sizes = {"-npp": row.prompt, "-ntg": row.generated, "-npl": row.requests}
        sizes["-c"] = max(64, row.requests * row.longest)  # its warm-up takes 16 tokens
        command = [*self._batched, *(str(part) for pair in sizes.items() for part in pair)]
        output, _ = output_of(command, TIMEOUT)
        tests = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        expected = {"pp": row.prompt, "tg": row.generated, "pl": row.requests}
        return row.requests * row.longest / float(only_test(tests, **expected)["speed"])


class Xllamacpp(System):
    """llama.cpp inside the package xllamacpp (built for AVX2), by the timings of its server."""

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
        self.description = {"version": f"xllamacpp {xllamacpp.__version__}, built for AVX2"}

    def run(self, row: Row) -> dict[str, Any]:
        if row.name not in ("decode", "prefill"):
            raise NotImplementedError("xllamacpp tells the speed of one prompt and its answer only")
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
        return {"seconds": row.tokens / float(answer["timings"][f"{stage}_per_second"])}


def only_test(tests: list[dict[str, Any]], **expected: int) -> dict[str, Any]:
    """The only test reported, when it is the one that was asked for."""
    if len(tests) != 1:
        raise ValueError(f"llama.cpp reported {len(tests)} tests; expected 1")
    for name, value in expected.items():
        if int(tests[0][name]) != value:
            raise ValueError(f"llama.cpp measured {name} {tests[0][name]}; expected {value}")
    return tests[0]


class Vllm(Generating):
    """vLLM for CPUs in bf16, in this process: with two cores, one for the engine costs more.

    rows: all that will be asked for. eager: without torch.compile.
    """

    def __init__(
        self, path: str, threads: int, load_format: str, rows: list[Row], eager: bool
    ) -> None:
        os.environ |= _QUIET
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        import vllm

        # It reads the same config.json; its number of parameters is not asked for.
        self.description = {"version": vllm.__version__}
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            path,
            dtype="bfloat16",
            load_format=load_format,
            skip_tokenizer_init=True,
            max_model_len=max(row.longest for row in rows) + 16,
            max_num_seqs=max(row.requests for row in rows),
            enable_prefix_caching=False,
            enforce_eager=eager,
            disable_log_stats=True,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], count: int) -> float:
        params = self._params(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        items: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self._llm.generate(items, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        require_tokens([len(output.outputs[0].token_ids) for output in outputs], count)
        return seconds

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """The 20 most probable next tokens and their log-probabilities."""
        params = self._params(temperature=0, max_tokens=1, logprobs=20, detokenize=False)
        items: Any = [{"prompt_token_ids": prompt}]
        first = self._llm.generate(items, params, use_tqdm=False)[0].outputs[0].logprobs[0]
        return {token: found.logprob for token, found in first.items()}


def preloaded(python: Path) -> dict[str, str]:
    """LD_PRELOAD with the libraries that vLLM asks to have there on a CPU, those that are found."""
    folders = [python.parent.parent / "lib", Path("/usr/lib/x86_64-linux-gnu")]
    found = [folder / name for name in _PRELOADED for folder in folders if (folder / name).exists()]
    chosen = [*found[:1], *[file for file in found[1:] if "tcmalloc" in file.name][:1]]
    return {"LD_PRELOAD": ":".join(map(str, chosen))}


class OpenVino(Generating):
    """One model in OpenVINO GenAI's pipeline with continuous batching, as it serves requests.

    path: the model in Hugging Face's form. folder: where OpenVINO's forms are kept; what is not
    there is made (minutes). form: "bf16",
    "int8" (a scale an output) or "int4-g128". rows: all that will be asked for.
    """

    def __init__(
        self, path: str, folder: str, form: str, threads: int, load_format: str, rows: list[Row]
    ) -> None:
        converted = Path(folder, f"{Path(path).name}-{form}").absolute()
        most_tokens = max(row.requests * row.longest for row in rows)
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not converted.is_dir():
            convert(Path(path), converted, form, load_format)
        import openvino_genai

        self._genai = openvino_genai
        self.description = {
            "version": openvino_genai.__version__,
            **json.loads((converted / "converted.json").read_text(encoding="utf-8")),
        }
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = max(2048, *(row.longest for row in rows))
        scheduler.max_num_seqs = max(row.requests for row in rows)
        # Room for all of them and for every last block; its default grows while it is measured.
        scheduler.num_kv_blocks = 2 * scheduler.max_num_seqs + 2 * -(-most_tokens // OPENVINO_BLOCK)
        # A shape has no tokenizer; token ids go in and come out.
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(converted),
            openvino_genai.Tokenizer(str(converted)),
            scheduler,
            "CPU",
            PERFORMANCE_HINT="LATENCY",
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT="bf16",
        )

    def generate(self, prompts: list[list[int]], count: int) -> float:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.do_sample = False
        config.max_new_tokens = count
        config.set_eos_token_id(0)  # it wants to know one
        config.ignore_eos = True
        start = time.perf_counter()
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(prompts))
        seconds = time.perf_counter() - start
        require_tokens([len(result.m_generation_ids[0]) for result in results], count)
        return seconds


def convert(path: Path, converted: Path, form: str, load_format: str) -> None:
    """Write OpenVINO's form of a model by optimum-intel; made whole or not at all.

    A folder as optimum-intel writes it, with "converted.json" beside: its number of parameters.
    load_format: as `transformers_system.load_model` has it.
    """
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers_system import load_model

    options: dict[str, Any] = {"load_in_8bit": False}
    if form in OPENVINO_BITS:
        sizes: dict[str, Any] = {"bits": OPENVINO_BITS[form], "sym": True}
        if form.startswith("int4"):
            # A width that 128 does not divide takes smaller groups, as in octavo.
            sizes |= {"group_size": 128, "ratio": 1.0, "group_size_fallback": "adjust"}
        options = {"quantization_config": OVWeightQuantizationConfig(**sizes)}
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as temporary:
        source, unfinished = Path(temporary, "source"), Path(temporary, "converted")
        model = load_model(path, torch.bfloat16, load_format)
        model.save_pretrained(source)
        text = json.dumps({"num_parameters": model.num_parameters()})
        del model
        converter = OVModelForCausalLM.from_pretrained(
            source, export=True, compile=False, **options
        )
        converter.save_pretrained(unfinished)
        (unfinished / "converted.json").write_text(text + "\n", encoding="utf-8")
        unfinished.rename(converted)
