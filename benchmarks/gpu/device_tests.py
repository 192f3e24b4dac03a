"""The CUDA tests on the device, in parallel; what failed is kept beside every figure.

python benchmarks/gpu/device_tests.py
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from about import sources_hash
from results import DEVICE, EMULATE, ROOT, keep

WORKERS = min(16, os.cpu_count() or 1)
MOST_FAILURES = 20
MOST_SECONDS, MOST_SECONDS_HF = 160, 60


def main() -> None:
    """Run them all; ends with 1 where one failed, or not all came to their end."""
    # Programs in the background may ignore it, and those that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tests = sorted((ROOT / "tests").glob("*/test_cuda_*.py"))
    beside_hf = [path for path in tests if path.parent.name == "hf"]
    others = [path for path in tests if path not in beside_hf]
    summary, failed = run(others, MOST_SECONDS, WORKERS)
    # By themselves: what they import may be missing or broken.
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        unfinished = [*failed, "tests beside Hugging Face: not finished"]
        keep("tests", {"failed": unfinished, "summary": summary})
        more = run(beside_hf, MOST_SECONDS_HF, min(4, WORKERS))
        summary, failed = f"{summary}; {more[0]}", failed + more[1]
    keep("tests", {"failed": failed, "summary": summary})
    print(f"sources {sources_hash()}: {len(failed)} failed")
    raise SystemExit(1 if failed else 0)


def run(tests: list[Path], seconds: float, workers: int) -> tuple[str, list[str]]:
    """pytest's last line, and what failed. After so many seconds it is interrupted, and sums up."""
    # `make test` runs all of them, but those beside Hugging Face, on the emulator.
    few = ["-k", "test_norms or test_greedy_tokens_equal"]
    arguments = few if EMULATE else ["-n", str(workers)]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--timeout=60"]
    command += ["-p", "no:benchmark", f"--maxfail={MOST_FAILURES}", "--durations=10", *arguments]
    # pytest cuts its summary of failures off at the terminal's width.
    environment = {**os.environ, "OCTAVO_TEST_CUDA_DEVICE": DEVICE, "COLUMNS": "400"}
    process = subprocess.Popen(
        [*command, *map(str, tests)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(seconds, process.send_signal, [signal.SIGINT])
    timer.start()
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        print(line, end="", flush=True)
    status = process.wait()
    timer.cancel()
    # With the message: "... - AssertionError: assert 5.4e-06 < 5e-06".
    failed = [found[1] for line in lines if (found := re.match("(?:FAILED|ERROR) (.+)", line))]
    summary = lines[-1].strip() if lines else ""
    if status > 1 or (status and not failed):  # 2: interrupted
        failed.append(f"pytest ended with {status}")
    if "passed" not in summary:  # where the device cannot be used, all are skipped
        failed += ["no test passed"]
    return summary, failed


if __name__ == "__main__":
    main()
