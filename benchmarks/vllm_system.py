"""vLLM, in a Python that has it: what compare_cpu.py asks, and its environment."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from systems import Generating, Row, require_tokens

_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


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


def preloaded(python: Path) -> dict[str, str]:
    """LD_PRELOAD with the libraries that vLLM asks to have there on a CPU, those that are found."""
    folders = [python.parent.parent / "lib", Path("/usr/lib/x86_64-linux-gnu")]
    found = [folder / name for name in _PRELOADED for folder in folders if (folder / name).exists()]
    chosen = [*found[:1], *[file for file in found[1:] if "tcmalloc" in file.name][:1]]
    return {"LD_PRELOAD": ":".join(map(str, chosen))}
