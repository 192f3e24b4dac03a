"""A mark of the sources that decide about a figure, which needs no git."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources_hash() -> str:
    """Twelve digits of the SHA-256 of octavo's sources and of what measures them."""
    digest = hashlib.sha256()
    folders = [ROOT / name for name in ("csrc", "cmake", "python", "reference", "benchmarks/gpu")]
    suffixes = {".cu", ".cuh", ".cpp", ".h", ".py", ".cmake"}
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    for path in sorted([ROOT / "CMakeLists.txt", *files]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
