"""vLLM's side of compare_cpu.py, run by a Python that has vLLM; octavo is not imported here.

Reads a JSON list a line, [name, arguments...], and answers each with a JSON value on a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Worker:
    """One model in vLLM, in this process: with two cores, a process for the engine costs more."""

    def __init__(self, path: str, threads: int, load_format: str, longest: int, most: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        import vllm

        self.version = vllm.__version__
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
        found = [len(output.outputs[0].token_ids) for output in outputs]
        if found != [count] * len(prompts):
            raise RuntimeError(f"vLLM answered {found} tokens; expected {count} of each")
        return seconds


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    path, threads, load_format, longest, most = json.loads(sys.argv[1])
    worker = Worker(path, threads, load_format, longest, most)
    print(json.dumps({"version": worker.version}), file=answers, flush=True)
    for line in sys.stdin:
        prompts, count = json.loads(line)
        print(json.dumps(worker.generate(prompts, count)), file=answers, flush=True)


if __name__ == "__main__":
    main()
