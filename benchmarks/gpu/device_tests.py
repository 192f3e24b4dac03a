"""The CUDA tests on the device, in parallel; what failed is kept beside every figure.

python benchmarks/gpu/device_tests.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from about import sources_hash
from results import DEVICE, EMULATE, ROOT, keep

WORKERS = min(16, os.cpu_count() or 1)
MOST_FAILURES = 20


def main() -> None:
    """Run them all; ends with 1 where one failed."""
    tests = sorted(str(path) for path in (ROOT / "tests").glob("*/test_cuda_*.py"))
    # `make test` runs all of them, but those beside Hugging Face, on the emulator.
    arguments = ["-k", "test_norms"] if EMULATE else ["-n", str(WORKERS)]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--timeout=60"]
    command += ["-p", "no:benchmark", f"--maxfail={MOST_FAILURES}", *arguments, *tests]
    # pytest cuts its summary of failures off at the terminal's width.
    environment = {**os.environ, "OCTAVO_TEST_CUDA_DEVICE": DEVICE, "COLUMNS": "400"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    lines = []
    for line in run.stdout or ():
        lines.append(line)
        print(line, end="", flush=True)
    status = run.wait()
    # With the message: "... - AssertionError: assert 5.4e-06 < 5e-06".
    failed = [found[1] for line in lines if (found := re.match("(?:FAILED|ERROR) (.+)", line))]
    if status and not failed:
        failed = [f"pytest ended with {status}"]
    keep("tests", {"failed": failed, "summary": lines[-1].strip() if lines else ""})
    print(f"sources {sources_hash()}: {len(failed)} failed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
