"""The short table: the most telling figures of this machine, from what the stages kept.

python benchmarks/gpu/table.py
"""

from __future__ import annotations

from typing import Any

from results import read

# Published for this shape in bf16, one sequence (performance records: msaroufim,
# megakernels-vs-cuda-graphs, September 2026): microseconds a token.
RECORDS = {"NVIDIA H200": 759.8, "NVIDIA H100": 972.8}
WEIGHT_BYTES = 2.472e9  # of one step in bf16


def main() -> None:
    """Print what there is; what was not run is left out."""
    found = read()
    limits = found.get("limits")
    if limits:
        print(
            f"limits: {limits['read_bytes_per_second'] / 1e12:.2f} TB/s read, "
            f"{limits['mma_flops'] / 1e12:.0f} TFLOP/s mma.sync, "
            f"{limits['cublas_flops'] / 1e12:.0f} TFLOP/s cuBLAS"
        )
    decode(found)
    speeds(found, "prefill", lambda row: f"{row['case']['num_tokens']} tokens")
    speeds(found, "batch", lambda row: f"batch {row['case']['batch']}")
    for name, part in found.items():
        if name.startswith("mixed"):
            print(f"{name}: {part['answer_tokens_per_second']:.0f} answer tokens/s")
    for name, speed in found.get("huggingface", {}).get("tokens_per_second", {}).items():
        print(f"Hugging Face {name}: {speed:.1f} tokens/s")
    kernels(found.get("kernels", {}).get("rows", []))


def decode(found: dict[str, Any]) -> None:
    """One sequence: microseconds a token beside the floor, the record and bf16's own speed."""
    plain: dict[int, float] = {}
    for kind in ("bf16", "int8", "int4"):
        for row in found.get(f"decode-{kind}", {}).get("rows", []):
            if row["mean"] is None:
                print(f"decode {kind} @{row['case']['depth']}: gate FAILED")
                continue
            depth, speed = row["case"]["depth"], row["mean"]
            plain.setdefault(depth, speed)
            line = f"decode {kind} @{depth}: {1e6 / speed:.0f} us a token"
            if row["percent_of_limit"]:
                line += f", {row['percent_of_limit']:.0f} % of the bandwidth"
            device = found[f"decode-{kind}"]["stamp"]["native"].get("device_name", "")
            record = next((us for name, us in RECORDS.items() if device.startswith(name)), None)
            if kind == "bf16" and depth == 128 and record:
                line += f", {1e6 / speed / record:.2f} of the record's {record:.0f} us"
            if kind != "bf16":
                line += f", {speed / plain[depth]:.2f}x bf16"
            print(line)


def speeds(found: dict[str, Any], stage: str, label: Any) -> None:
    """A line a format: tokens a second of every case."""
    for kind in ("bf16", "int8", "int4"):
        rows = found.get(f"{stage}-{kind}", {}).get("rows", [])
        cells = [
            f"{label(row)} {'FAILED' if row['mean'] is None else format(row['mean'], '.0f')}"
            for row in rows
        ]
        if cells:
            print(f"{stage} {kind}, tokens/s: " + ", ".join(cells))


def kernels(rows: list[dict[str, Any]]) -> None:
    """The kernels farthest from their floors, and those slower than their peers."""
    if not rows:
        return
    far = sorted(rows, key=lambda row: row["floor"] / row["seconds"])[:8]
    print("farthest from the floor:")
    for row in far:
        print(f"  {row['name']}: {row['seconds'] * 1e6:.1f} us, floor {row['floor'] * 1e6:.1f}")
    slower = [row for row in rows if row["peer"] and row["peer"] < row["seconds"]]
    print(f"{len(slower)} of {sum(bool(row['peer']) for row in rows)} slower than the peer:")
    for row in sorted(slower, key=lambda row: row["peer"] / row["seconds"])[:8]:
        print(f"  {row['name']}: {row['peer'] / row['seconds']:.2f}x")


if __name__ == "__main__":
    main()
