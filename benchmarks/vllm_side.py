"""vLLM's side of compare_cpu.py, from here: a process of the Python that has vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rows import Row

_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


class VllmSide:
    """vLLM for CPUs in bf16. python: the interpreter of an environment that has it."""

    def __init__(
        self, python: Path, path: Path, threads: int, load_format: str, rows: list[Row], eager: bool
    ) -> None:
        longest = max(row.prompt + row.generated for row in rows) + 16
        settings = [str(path), threads, load_format, longest, max(row.requests for row in rows)]
        environment = {**os.environ, **_QUIET, "COMPARE_VLLM_EAGER": "1" if eager else "0"}
        environment["LD_PRELOAD"] = ":".join(str(file) for file in find_preloaded(python))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("vllm_worker.py")), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        try:
            self.version = self._answer()["version"]
        except RuntimeError:
            self.close()
            raise

    def _answer(self) -> Any:
        if self._process.stdout is None:
            raise RuntimeError("vLLM's process has no output")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(30)
            self._log.seek(0)
            raise RuntimeError(f"vLLM ended: {self._log.read()[-1500:]}")
        return json.loads(line)

    def check(self, row: Row) -> dict[str, Any]:
        """vLLM reads the same config.json; every run counts its tokens."""
        return {"version": self.version}

    def warm_up(self, row: Row) -> None:
        """A short one of the same kind."""
        self.run(Row(row.name, min(row.prompt, 16), min(row.generated, 4), row.requests))

    def run(self, row: Row) -> float:
        """Tokens a second."""
        if self._process.stdin is None:
            raise RuntimeError("vLLM's process has no input")
        prompts = [[10]] if row.name == "decode" else row.prompts()
        count = 1 if row.name == "prefill" else row.generated
        self._process.stdin.write(json.dumps([prompts, count]) + "\n")
        self._process.stdin.flush()
        return row.tokens / float(self._answer())

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def find_preloaded(python: Path) -> list[Path]:
    """Libraries that vLLM asks to have preloaded on a CPU, those that are there."""
    folders = [python.parent.parent / "lib", Path("/usr/lib/x86_64-linux-gnu")]
    found = [folder / name for name in _PRELOADED for folder in folders if (folder / name).exists()]
    return [*found[:1], *[file for file in found[1:] if "tcmalloc" in file.name][:1]]
