"""A side of compare_cpu.py that runs in another Python: the process, and how it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import Row


class OtherPythonSide:
    """One model in a process of another Python, run by a worker of this folder (`worker.py`).

    label: what errors call it. python: the interpreter of an environment that has the peer.
    worker: the file that it runs. settings: the arguments of the worker's class. environment: set
    beside what is set already.
    """

    def __init__(
        self,
        label: str,
        python: Path,
        worker: str,
        settings: Sequence[Any],
        environment: Mapping[str, str],
    ) -> None:
        self._label = label
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(worker)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            text=True,
        )
        try:
            self.description: dict[str, Any] = self._answer()
        except RuntimeError:
            self.close()
            raise

    def _answer(self) -> Any:
        if self._process.stdout is None:
            raise RuntimeError(f"{self._label}'s process has no output")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(30)
            self._log.seek(0)
            raise RuntimeError(f"{self._label} ended: {self._log.read()[-1500:]}")
        return json.loads(line)

    def check(self, row: Row) -> dict[str, Any]:
        """What the worker says of itself; every run counts its tokens."""
        return self.description

    def warm_up(self, row: Row) -> None:
        """A short one of the same kind."""
        self.run(Row(row.name, min(row.prompt, 16), min(row.generated, 4), row.requests))

    def run(self, row: Row) -> float:
        """Tokens a second."""
        if self._process.stdin is None:
            raise RuntimeError(f"{self._label}'s process has no input")
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
