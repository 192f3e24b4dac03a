"""256 requests of mixed lengths through the engine: nano-vllm's workload.

    python benchmarks/gpu/mixed.py [--format int8] [--kv-dtype int8]

Prompts and answers of 100 to 1024 tokens, uniform, seed 0 (nano-vllm, bench.py), in the
Llama-3.2-1B shape with random weights; answers do not end early. All arrive at once. Counted:
answer tokens over the seconds from the first submission to the last answer.
"""

from __future__ import annotations

import argparse
import random
import time

from results import SHAPE, keep

from octavo import LLM, SamplingParams


def main() -> None:
    """Run the workload once to warm up (a quarter of it), once for the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--kv-dtype", default="bf16")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    given = parser.parse_args()
    generator = random.Random(0)
    lengths = [(generator.randint(100, 1024), generator.randint(100, 1024)) for _ in range(256)]
    prompts = [[generator.randint(0, 10000) for _ in range(prompt)] for prompt, _ in lengths]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=answer) for _, answer in lengths
    ]
    llm = LLM(
        SHAPE,
        device="cuda",
        dtype="bf16",
        kv_dtype=given.kv_dtype,
        quantize=None if given.format == "bf16" else given.format,
        load_format="dummy",
        max_model_len=2048,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=8192,
        kv_memory_fraction=0.8,
        enable_prefix_caching=False,  # the warm-up asks some of the same prompts
    )
    llm.generate(prompts[:64], params[:64])
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    answered = sum(len(output.outputs[0].token_ids) for output in outputs)
    expected = sum(answer for _, answer in lengths)
    if answered != expected:
        raise SystemExit(f"{answered} answer tokens; expected {expected}")
    prompted = sum(prompt for prompt, _ in lengths)
    print(f"{answered / seconds:.0f} answer tokens/s ({answered} in {seconds:.1f} s)")
    name = "-".join(["mixed", given.format, *(["kv-int8"] if given.kv_dtype == "int8" else [])])
    keep(
        name,
        {
            "seconds": seconds,
            "answer_tokens": answered,
            "prompt_tokens": prompted,
            "answer_tokens_per_second": answered / seconds,
        },
    )


if __name__ == "__main__":
    main()
