"""The short table: the most telling figures of this machine, from what the steps kept.

python benchmarks/gpu/table.py
"""

from __future__ import annotations

from typing import Any

from about import sources_hash
from results import gate, read

# Published for this shape in bf16, one sequence (performance records: msaroufim,
# megakernels-vs-cuda-graphs, September 2026): microseconds a token.
RECORDS = {"NVIDIA H200": 759.8, "NVIDIA H100": 972.8}


def main() -> None:
    """Print what there is; what was not run is left out."""
    found = read()
    if not found:
        print("nothing was measured")
        return
    for name, part in found.items():  # the longest part first: the end is what stays in view
        if name.startswith("kernels"):
            kernels(name, part["rows"])
    native = next(iter(found.values()))["stamp"]["native"]
    print(f"{native['device_name'] or 'emulated'}, CUDA {native['cuda_runtime']}", end="")
    print(f" (driver {native['cuda_driver']}), many rows by {native['products'] or 'the emulator'}")
    print(f"gate (the device's tests): {gate(found, sources_hash())}")
    if "tests" in found:
        print(f"tests: {found['tests']['summary']}")
    limits = found.get("limits")
    if limits:
        print(
            f"limits: {limits['read_bytes_per_second'] / 1e12:.2f} TB/s read, "
            f"{limits['mma_flops'] / 1e12:.0f} TFLOP/s mma.sync, "
            f"{limits.get('cublas_flops', 0.0) / 1e12:.0f} TFLOP/s cuBLAS"
        )
    decode(found)
    speeds(found, "prefill", lambda row: f"{row['case']['num_tokens']} tokens")
    speeds(found, "batch", lambda row: f"batch {row['case']['batch']}")
    for name, part in found.items():
        if name.startswith("mixed"):
            least, seconds = part["least_seconds"], part["seconds"]
            beside = f", {100 * least / seconds:.0f} % of the ceiling" if least else ""
            print(f"{name}: {part['answer_tokens_per_second']:.0f} answer tokens/s{beside}")
        for what, speed in part.get("tokens_per_second", {}).items():
            print(f"{name} {what}: {speed:.1f} tokens/s")


def decode(found: dict[str, Any]) -> None:
    """One sequence: microseconds a token beside the limit, the record and bf16's own speed."""
    plain: dict[tuple[str, int], float] = {}
    parts = [(n, p) for n, p in found.items() if n.startswith(("headline", "decode"))]
    for name, part in sorted(parts, key=lambda item: "bf16" not in item[0]):
        kind, _, what = name.partition("-")
        for row in part["rows"]:
            depth, speed = row["case"]["depth"], row["mean"]
            if speed is None:
                print(f"{name} @{depth}: gate FAILED")
                continue
            line = f"{name} @{depth}: {1e6 / speed:.0f} us a token"
            if row["percent_of_limit"]:
                line += f", {row['percent_of_limit']:.0f} % of the limit of {row['limit']}"
            device = part["stamp"]["native"].get("device_name", "")
            record = next((us for key, us in RECORDS.items() if device.startswith(key)), None)
            if what == "bf16":
                plain[kind, depth] = speed
                if record and depth == 128:
                    line += f", {1e6 / speed / record:.2f} of the record's {record:.0f} us"
            elif (kind, depth) in plain:
                line += f", {speed / plain[kind, depth]:.2f}x bf16"
            print(line)


def speeds(found: dict[str, Any], stage: str, label: Any) -> None:
    """A line a format: tokens a second of every case, with how near the limit it is."""
    for name, part in found.items():
        if not name.startswith(f"{stage}-"):
            continue
        cells = []
        for row in part["rows"]:
            if row["mean"] is None:
                cells.append(f"{label(row)} gate FAILED")
                continue
            percent = row["percent_of_limit"]
            beside = f" ({percent:.0f} %)" if percent else ""
            cells.append(f"{label(row)} {row['mean']:.0f}{beside}")
        print(f"{name}, tokens/s (of the limit): " + ", ".join(cells))


def kernels(name: str, rows: list[dict[str, Any]]) -> None:
    """Every kernel beside its floor and its peer."""
    print(f"{name}: us, % of the floor, peer's time over ours")
    for row in rows:
        peer = f"{row['peer'] / row['seconds']:6.2f}x" if row["peer"] else "      -"
        percent = 100 * row["floor"] / row["seconds"]
        print(f"  {row['name']:44s} {row['seconds'] * 1e6:9.1f} {percent:6.1f} % {peer}")


if __name__ == "__main__":
    main()
