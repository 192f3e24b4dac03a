"""vLLM's side of compare_cpu.py, from here: a process of the Python that has vLLM."""

from __future__ import annotations

from pathlib import Path

from other_python import OtherPythonSide
from rows import Row, longest_of, most_requests_of

_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


class VllmSide(OtherPythonSide):
    """vLLM for CPUs in bf16. python: the interpreter of an environment that has it."""

    def __init__(
        self, python: Path, path: Path, threads: int, load_format: str, rows: list[Row], eager: bool
    ) -> None:
        longest = longest_of(rows) + 16
        settings = [str(path), threads, load_format, longest, most_requests_of(rows)]
        environment = {**_QUIET, "COMPARE_VLLM_EAGER": "1" if eager else "0"}
        environment["LD_PRELOAD"] = ":".join(str(file) for file in find_preloaded(python))
        super().__init__("vLLM", python, "vllm_worker.py", settings, environment)


def find_preloaded(python: Path) -> list[Path]:
    """Libraries that vLLM asks to have preloaded on a CPU, those that are there."""
    folders = [python.parent.parent / "lib", Path("/usr/lib/x86_64-linux-gnu")]
    found = [folder / name for name in _PRELOADED for folder in folders if (folder / name).exists()]
    return [*found[:1], *[file for file in found[1:] if "tcmalloc" in file.name][:1]]
