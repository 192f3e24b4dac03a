"""Decoding, prefill and batches of the whole model, as `octavo bench` runs them.

    python benchmarks/gpu/model.py decode --format int8
    python benchmarks/gpu/model.py prefill
    python benchmarks/gpu/model.py batch

The Llama-3.2-1B shape with random weights. Gates and limits are `octavo bench`'s own.
"""

from __future__ import annotations

import argparse
from typing import Any

from results import SHAPE, keep

from octavo.bench.cases import Case
from octavo.bench.run import bench
from octavo.config import EngineConfig, read_environment

FORMATS = ("bf16", "int8", "int4")
STAGES = {
    "decode": [Case("decode", 128, 1, depth) for depth in (128, 2048, 16384)],
    "prefill": [Case("prefill", length) for length in (128, 512, 2048, 8192)],
    "batch": [Case("decode", 64, batch, 256) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
}


def main() -> None:
    """Run one stage in one format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    given = parser.parse_args()
    config = EngineConfig(
        device="cuda",
        dtype="bf16",
        quantize=None if given.format == "bf16" else given.format,
        load_format="dummy",
        max_num_batched_tokens=8192,
        deterministic=given.deterministic,
        enforce_eager=given.enforce_eager,
    )
    result = bench(str(SHAPE), config, STAGES[given.stage], 5, read_environment())
    for row in result.rows:
        speed = "gate FAILED" if row.mean is None else f"{row.mean:9.1f} tokens/s"
        if row.percent_of_limit is not None:
            speed += f"  {row.percent_of_limit:5.1f} % of {row.limit}"
        print(f"{given.format} {row.case.name} batch {row.case.batch}: {speed}", flush=True)
    name = "-".join([given.stage, given.format, *_marks(given)])
    keep(name, result.to_json())
    if not result.passed:
        raise SystemExit(1)


def _marks(given: Any) -> list[str]:
    marks = ["deterministic"] if given.deterministic else []
    return [*marks, "eager"] if given.enforce_eager else marks


if __name__ == "__main__":
    main()
