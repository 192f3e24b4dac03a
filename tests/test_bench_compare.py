"""What benchmarks/compare_cpu.py stands on: the GGUF it writes, peers it asks, ratios it prints."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from octavo.models.registry import read_model
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf import GgufFile
from octavo.weights.gguf_llama import unpermute_rows
from text_helpers import tiny_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("write_gguf", "cpu_sides", "compare_cpu", "sides", "machine")

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_the_gguf_holds_the_model(load, kind: str, tmp_path: Path) -> None:
    writer = load("write_gguf")
    files = read_model(tiny_model(tmp_path / "tiny"))
    checkpoint = open_checkpoint(files, "dummy")
    path = tmp_path / f"{kind}.gguf"
    writer.write_gguf(path, files, checkpoint, kind)
    file = GgufFile(path)
    assert set(file.tensors) == {writer.gguf_name(name) for name in checkpoint}
    tolerance = {"f32": 0, "bf16": 0, "q8_0": 0.01, "q4_0": 0.15}[kind]
    for name, tensor in checkpoint.items():
        found = file.decode(writer.gguf_name(name)).to_float32()
        part = name.split(".")[-2]
        if part in ("q", "k"):
            found = unpermute_rows(found, 4 if part == "q" else 2)
        expected = tensor.to_float32()
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), name


def test_llama_bench_is_asked_and_understood(load, tmp_path: Path) -> None:
    """A script in its place: it reports the arguments it was given."""
    sides = load("cpu_sides")
    script = tmp_path / "llama-bench"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "a = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert a['-o'] == 'json' and a['-t'] == '3' and a['-m'].endswith('m.gguf'), a\n"
        "print(json.dumps([{'n_prompt': int(a['-p']), 'n_gen': int(a['-n']),"
        " 'avg_ts': 1000.5 * int(a['-p']) + int(a['-n'])}]))\n"
    )
    script.chmod(0o755)
    side = sides.LlamaBench(str(script), tmp_path / "m.gguf", 3)
    assert side.run("prefill", 2) == 2001.0 and side.run("decode", 7) == 7.0
    script.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match=r"llama-bench failed \(3\): broken"):
        side.run("decode", 7)
    with pytest.raises(ValueError, match="reported 2 tests"):
        sides.parse_llama_bench(json.dumps([{"avg_ts": 1}, {"avg_ts": 2}]))


def test_octavos_side_has_its_gate(load, tmp_path: Path) -> None:
    sides = load("cpu_sides")
    side = sides.OctavoCore(tiny_model(tmp_path / "tiny"), "bf16", 1, "dummy", 24)
    gate = side.gate(24, 3)
    assert gate["passed"] and set(gate["logits"]) == {"pp24", "tg3"}
    assert side.run("prefill", 24) > 0 and side.run("decode", 3) > 0


def test_ratios_are_of_medians(load) -> None:
    compare = load("compare_cpu")
    speeds = {"decode": {"octavo": [10.0, 12.0, 90.0], "peer": [1.0, 4.0, 6.0]}}
    assert compare.ratios(speeds) == {"decode": {"peer": 3.0}}


def test_absent_peers_are_named(load) -> None:
    sides = load("cpu_sides")
    assert sides.why_absent("numpy") is None
    assert sides.why_absent("no_such_peer") == "the package no_such_peer is not installed"
