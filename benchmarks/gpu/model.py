"""Decoding, prefill and batches of the whole model, as `octavo bench` runs them.

    python benchmarks/gpu/model.py headline
    python benchmarks/gpu/model.py decode batch --format int8

The Llama-3.2-1B shape with random weights, loaded once. Gates are `octavo bench`'s own; percents
are of what limits.py measured. Every case is kept as soon as it is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from results import DEVICE, EMULATE, SHAPE, keep, read_peak

from octavo import _native
from octavo.bench.benchmark import Row, bench
from octavo.bench.cases import Case
from octavo.config import EngineConfig, read_environment

FORMATS = ("bf16", "int8", "int4")
DEPTHS, PROMPTS = (128, 2048, 16384), (128, 512, 2048, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS, REPETITIONS = 128, 5
if EMULATE:
    DEPTHS, PROMPTS, BATCHES, STEPS, REPETITIONS = (3, 20), (5, 20), (1, 3), 2, 1
PARTS = {
    "headline": [Case("decode", STEPS, 1, DEPTHS[0])],
    "decode": [Case("decode", STEPS, 1, depth) for depth in DEPTHS],
    "prefill": [Case("prefill", length) for length in PROMPTS],
    "batch": [Case("decode", max(2, STEPS // 2), batch, 2 * DEPTHS[0]) for batch in BATCHES],
}


def main() -> None:
    """Run the parts in one format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="part", help=", ".join(PARTS))
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--label", default="", help="what variant this is, behind the part's name")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that divide the model")
    given = parser.parse_args()
    num_gpus = _native.build_info()["num_devices"]
    if not EMULATE and given.ranks > num_gpus:
        print(f"left out: {given.ranks} ranks need as many GPUs, and there is {num_gpus}")
        return
    config = EngineConfig(
        device=DEVICE,
        dtype="bf16",
        quantize=None if given.format == "bf16" else given.format,
        load_format="dummy",
        max_num_batched_tokens=64 if EMULATE else 8192,
        deterministic=given.deterministic,
        enforce_eager=given.enforce_eager,
        tensor_parallel_size=given.ranks,
    )
    marks = [given.label, "deterministic" * given.deterministic, "eager" * given.enforce_eager]
    mark = "-".join([given.format, *filter(None, marks)])
    cases = [(part, case) for part in given.parts for case in PARTS[part]]
    waiting, peak = iter(cases), read_peak()
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in given.parts}

    def measured(row: Row) -> None:
        part, case = next(waiting)
        speed = "gate FAILED" if row.mean is None else f"{row.mean:9.1f} tokens/s"
        if peak and row.bytes_per_second and row.flops:
            # `octavo bench` does not know what the library can do, which multiplies many rows.
            used = {
                "memory": row.bytes_per_second / (given.ranks * peak.bandwidth),
                "arithmetic": row.flops / (given.ranks * peak.flops),
            }
            limit = max(used, key=lambda name: used[name])
            row = replace(row, limit=limit, percent_of_limit=100 * used[limit])
        if row.percent_of_limit is not None:
            speed += f"  {row.percent_of_limit:5.1f} % of {row.limit}"
        rows[part].append(row.to_json())
        print(f"{part} {given.format} {case.name} batch {case.batch}: {speed}", flush=True)
        keep(f"{part}-{mark}", {"rows": rows[part]})

    all_cases = [case for _, case in cases]
    result = bench(
        str(SHAPE), config, all_cases, REPETITIONS, read_environment(), measured=measured
    )
    print(f"loaded in {result.loading.seconds if result.loading else 0:.1f} s")
    if not result.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
