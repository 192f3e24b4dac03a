"""256 requests of mixed lengths through the engine: nano-vllm's workload.

    python benchmarks/gpu/mixed.py [--format int8] [--kv-dtype int8]

Prompts and answers of 100 to 1024 tokens as nano-vllm's bench.py draws them (seed 0: 142,827 tokens
in, 133,966 out), in the Llama-3.2-1B shape with random weights; answers do not end early. All
arrive at once. Counted: answer tokens over the seconds from the first submission to the last
answer. The ceiling: every step as fast as the measured bandwidth and arithmetic allow, all requests
together from the first step on.
"""

from __future__ import annotations

import argparse
import random
import time

from results import DEVICE, EMULATE, SHAPE, keep, read_peak

from octavo import LLM, SamplingParams
from octavo.bench.cases import BYTES, Work, least_seconds, linear_weights
from octavo.weights.model_files import read_model

REQUESTS, SHORTEST, LONGEST = (4, 3, 9) if EMULATE else (256, 100, 1024)


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each is to be answered with."""
    generator = random.Random(0)
    most = 306 if EMULATE else 10000
    prompts = [
        [generator.randint(0, most) for _ in range(generator.randint(SHORTEST, LONGEST))]
        for _ in range(REQUESTS)
    ]
    return prompts, [generator.randint(SHORTEST, LONGEST) for _ in range(REQUESTS)]


def ceiling_seconds(
    prompts: list[int], answers: list[int], weight_bytes: float, kv_dtype: str
) -> float | None:
    """Least seconds of prompts and decoding; None where the limits were not measured."""
    peak = read_peak()
    if peak is None:
        return None
    spec = read_model(SHAPE).spec
    kv_bytes = sum(2 * layer.kv_size * BYTES[kv_dtype] for layer in spec.layers)
    layers = linear_weights(spec)
    per_token = 2.0 * (layers + spec.vocab_size * spec.hidden_size)
    seconds = 2.0 * layers * sum(prompts) / peak.flops
    for step in range(1, max(answers)):
        alive = [n for n, answer in zip(prompts, answers, strict=True) if answer > step]
        read_bytes = weight_bytes + kv_bytes * sum(n + step for n in alive)
        seconds += least_seconds(Work(read_bytes, per_token * len(alive)), peak)[0]
    return seconds


def main() -> None:
    """Run the workload once to warm up, with short answers, once for the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--kv-dtype", default="bf16")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    given = parser.parse_args()
    prompts, answers = workload()

    def params(lengths: list[int]) -> list[SamplingParams]:
        return [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lengths]

    llm = LLM(
        SHAPE,
        device=DEVICE,
        dtype="bf16",
        kv_dtype=given.kv_dtype,
        quantize=None if given.format == "bf16" else given.format,
        load_format="dummy",
        max_model_len=64 if EMULATE else 2048,
        max_num_seqs=8 if EMULATE else given.max_num_seqs,
        max_num_batched_tokens=64 if EMULATE else 8192,
        num_kv_blocks=32 if EMULATE else None,
        kv_memory_fraction=0.8,
        enable_prefix_caching=False,  # the warm-up asks the same prompts
    )
    # As many together as afterwards, so that nearly every shape of step is recorded.
    llm.generate(prompts, params([max(1, n // 8) for n in answers]))
    start = time.perf_counter()
    outputs = llm.generate(prompts, params(answers))
    seconds = time.perf_counter() - start
    answered = sum(len(output.outputs[0].token_ids) for output in outputs)
    if answered != sum(answers):
        raise SystemExit(f"{answered} answer tokens; expected {sum(answers)}")
    weight_bytes = llm.engine.runtime.memory()["weights"]
    least = ceiling_seconds([len(p) for p in prompts], answers, weight_bytes, given.kv_dtype)
    line = f"{answered / seconds:.0f} answer tokens/s ({answered} in {seconds:.1f} s)"
    print(line + (f", {100 * least / seconds:.0f} % of the ceiling" if least else ""))
    name = f"mixed-{given.format}" + ("-kv-int8" if given.kv_dtype == "int8" else "")
    values = {
        "seconds": seconds,
        "least_seconds": least,
        "answer_tokens": answered,
        "prompt_tokens": sum(len(prompt) for prompt in prompts),
        "answer_tokens_per_second": answered / seconds,
    }
    keep(name, values)


if __name__ == "__main__":
    main()
