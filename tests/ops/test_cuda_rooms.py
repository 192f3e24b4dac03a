"""The rooms of csrc/cuda: each includes what stands below it, and nothing else (docs/cuda.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BELOW = {
    "device": [],
    "layout": ["device"],
    "elementwise": ["device", "layout"],
    "products": ["device", "layout", "elementwise"],
    "attention": ["device", "layout", "elementwise"],
    "sampling": ["device", "layout", "elementwise"],
}


def test_every_folder_is_a_room() -> None:
    assert {path.name for path in CUDA.iterdir() if path.is_dir()} == BELOW.keys()


@pytest.mark.parametrize("room", BELOW)
def test_a_room_includes_what_is_below_it(room: str) -> None:
    allowed = {room, *BELOW[room]}
    for path in sorted((CUDA / room).iterdir()):
        found = re.findall(r'#include "cuda/(\w+)(/|\.)', path.read_text())
        # backend.h declares the ops; device/ is below that, too.
        others = {
            name for name, mark in found if mark == "/" or name != "backend" or not BELOW[room]
        }
        assert others <= allowed, path
