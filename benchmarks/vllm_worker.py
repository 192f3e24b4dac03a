"""vLLM's side of compare_cpu.py, run by a Python that has vLLM; `worker.py` has the rest."""

from __future__ import annotations

import os
import time
from typing import Any

from worker import require_tokens, serve


class VllmWorker:
    """One model in vLLM, in this process: with two cores, a process for the engine costs more."""

    def __init__(self, path: str, threads: int, load_format: str, longest: int, most: int) -> None:
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
            max_model_len=longest,
            max_num_seqs=most,
            enable_prefix_caching=False,
            enforce_eager=os.environ.get("COMPARE_VLLM_EAGER") == "1",
            disable_log_stats=True,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` greedy tokens after each prompt."""
        params = self._params(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        items: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self._llm.generate(items, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        require_tokens("vLLM", [len(output.outputs[0].token_ids) for output in outputs], count)
        return seconds


if __name__ == "__main__":
    serve(VllmWorker)
