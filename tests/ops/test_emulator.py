"""The CUDA emulator's own tests and its example: programs that the native build leaves behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def built(name: str) -> Path:
    """The program of the latest build that is not a sanitizer's; skips where there is none."""
    found = [
        path
        for pattern in ("dev", "test/*", "hf/*")
        for path in ROOT.glob(f"build/{pattern}/tests/emulator/{name}")
    ]
    if not found:
        pytest.skip(f"no build left {name} behind: built without OCTAVO_EMULATE_CUDA, or elsewhere")
    return max(found, key=lambda path: path.stat().st_mtime)


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("seed", ["0", "1", "12345"])
def test_the_emulators_own_tests(seed: str) -> None:
    result = run(built("emulator_tests"), CUDA_EMULATOR_SEED=seed)
    assert result.returncode == 0, result.stdout
    assert "planted: missing barrier" in result.stdout


def test_the_example_of_the_guide() -> None:
    result = run(built("emulator_example"), CUDA_EMULATOR_TWICE="1")
    assert result.returncode == 0, result.stdout
    assert "right, largest relative error" in result.stdout


def test_the_example_with_its_mistake() -> None:
    """What docs/emulator.md shows: the missing barrier is seen, and named when run twice."""
    example = built("emulator_example_planted")
    wrong = [run(example, CUDA_EMULATOR_SEED=str(seed)) for seed in range(1, 6)]
    assert all(result.returncode == 1 and "WRONG" in result.stdout for result in wrong)
    named = run(example, CUDA_EMULATOR_TWICE="1")
    assert named.returncode == 1
    for part in ("kernel softmax_rows, block (", "), thread ", "a barrier is missing"):
        assert part in named.stdout


def test_settings_that_are_no_numbers_are_refused() -> None:
    result = run(built("emulator_example"), CUDA_EMULATOR_SEED="seven")
    assert result.returncode == 1
    assert 'CUDA_EMULATOR_SEED is "seven"; expected a number from 0 to' in result.stdout
