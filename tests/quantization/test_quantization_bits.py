"""Importance from random tokens, sensitivity of the parts, and bits spent by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quantization_helpers import CONFIG, SCHEMES, write_float_model
from runtime_helpers import tiny_spec
from weights_helpers import random_weights, write_model

from octavo.cli.app import run
from octavo.config import Environment
from octavo.errors import InvalidArgumentError
from octavo.models.layer import linear_nodes, weight_shapes
from octavo.models.spec import MoeSpec, WeightFormat
from octavo.quantization.apply import quantize_checkpoint
from octavo.quantization.plan import Scheme, stored_bits
from octavo.quantize.importance import measure_importance
from octavo.quantize.sensitivity import (
    PartCost,
    Sensitivity,
    layer_parts,
    measure_sensitivity,
    scheme_bits,
    spend_bits,
)
from octavo.quantize.writer import quantize_directory
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

ENVIRONMENT = Environment(home=Path("/nowhere"), num_threads=1, isa="auto")


def test_importance_is_the_mean_square_of_the_inputs(tmp_path: Path) -> None:
    files = read_model(write_float_model(tmp_path / "float", dtype="F32"))
    checkpoint = open_checkpoint(files)
    found = measure_importance(files, checkpoint)
    assert set(found) == set(linear_nodes(files.spec))
    weights = {name: checkpoint[name].to_float32() for name in weight_shapes(files.spec)}
    tokens = min(256, files.spec.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, files.spec.vocab_size, (4, tokens), np.int32)
    squares: dict[str, list[np.ndarray]] = {}
    for sequence in ids:
        taps: dict[str, np.ndarray] = {}
        ReferenceModel(files.spec, weights).forward(sequence.tolist(), taps=taps)
        for name in ("layers.1.attn_norm", "layers.0.attn", "layers.0.mlp_norm", "layers.1.act"):
            squares.setdefault(name, []).append(np.square(taps[name]))
    expected = {name: np.concatenate(parts).mean(axis=0) for name, parts in squares.items()}
    for matrix, tap in (("1.v", "1.attn_norm"), ("0.o", "0.attn"), ("0.up", "0.mlp_norm")):
        wanted = expected["layers." + tap]
        assert np.allclose(found["layers." + matrix], wanted, rtol=1e-4, atol=1e-9)
    assert np.allclose(found["layers.1.down"], expected["layers.1.act"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["int4", "int4-nonuniform"])
def test_a_weighted_directory_is_what_importance_makes_of_it(tmp_path: Path, name: str) -> None:
    source = write_float_model(tmp_path / "float")
    files = read_model(source)
    scheme = Scheme(name, method="weighted")
    importance = measure_importance(files, open_checkpoint(files))
    quantize_directory(source, tmp_path / "out", scheme, importance=importance)
    stored = open_checkpoint(read_model(tmp_path / "out"))
    at_load = quantize_checkpoint(
        open_checkpoint(files), files.spec, scheme, keep_embedding=True, importance=importance
    )
    plain = quantize_checkpoint(
        open_checkpoint(files), files.spec, replace(scheme, method="search")
    )
    assert set(at_load) == set(stored)
    for tensor in at_load:
        assert np.array_equal(at_load[tensor].data, stored[tensor].data) or tensor.endswith("scale")
    assert not np.array_equal(
        plain["layers.1.down.weight"].data, stored["layers.1.down.weight"].data
    )


def test_parts_are_what_kernels_take_together(tmp_path: Path) -> None:
    spec = read_model(write_float_model(tmp_path / "float")).spec
    parts = layer_parts(spec)
    assert list(parts)[:4] == [f"layers.0.{part}" for part in ("qkv", "o", "gate_up", "down")]
    assert parts["layers.1.gate_up"] == ("layers.1.gate", "layers.1.up")
    assert sorted(sum(parts.values(), ())) == sorted(linear_nodes(spec))


def test_experts_of_a_layer_are_two_parts() -> None:
    spec = tiny_spec(moe=MoeSpec(3, 2))
    parts = layer_parts(spec)
    names = [f"layers.1.{part}" for part in ("qkv", "o", "experts.gate_up", "experts.down")]
    assert list(parts)[4:] == names
    assert parts["layers.0.experts.down"] == tuple(f"layers.0.experts.{i}.down" for i in range(3))
    assert len(parts["layers.0.experts.gate_up"]) == 6
    assert sorted(sum(parts.values(), ())) == sorted(linear_nodes(spec))


def measure(path: Path, scheme: Scheme) -> Sensitivity:
    files = read_model(path)
    tokens = np.random.default_rng(5).integers(0, files.spec.vocab_size, 90, np.int32)
    return measure_sensitivity(files, open_checkpoint(files), scheme, tokens, ENVIRONMENT)


def test_sensitivity_is_of_one_part_at_a_time(tmp_path: Path) -> None:
    source = write_float_model(tmp_path / "float", dtype="F32")
    rough, fine = measure(source, Scheme("int4")), measure(source, Scheme("int4", int8=("*",)))
    gains = [part.kl_per_megabit for part in rough.parts]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0 and rough.num_scored == 89
    assert 4.5 < rough.bits < 4.6 and fine.bits > 8.1  # 16 bits of scale for a narrow row
    by_name = {part.name: part for part in fine.parts}
    for part in rough.parts:  # the weights were put back in between
        assert part.kl > 30 * by_name[part.name].kl > 0
        assert by_name[part.name].kl_per_megabit == 0


def test_sensitivity_finds_the_part_that_suffers(tmp_path: Path) -> None:
    """Planted: outliers in every group of one matrix, which 4 bits cannot keep beside the rest."""
    weights = random_weights(CONFIG, seed=3)
    write_model(tmp_path / "plain", CONFIG, weights=weights)
    assert measure(tmp_path / "plain", Scheme("int4")).parts[0].name != "layers.1.down"
    down = weights["model.layers.1.mlp.down_proj.weight"]
    down[:, ::32] = 8 * np.abs(down).max() * np.sign(down[:, ::32])
    write_model(tmp_path / "planted", CONFIG, weights=weights)
    assert measure(tmp_path / "planted", Scheme("int4")).parts[0].name == "layers.1.down"


def part(name: str, weights: int, kl: float, bits: float = 4.5) -> PartCost:
    return PartCost(name, (name + "_a", name + "_b"), weights, bits, 8.0, kl)


def test_bits_go_where_they_gain_most() -> None:
    parts = (part("a", 100, 0.3), part("b", 1000, 0.4), part("c", 100, 0.03), part("d", 800, 0.1))
    found = Sensitivity(parts, 4.5, 10)
    scheme = Scheme("int4", int8=("*.v",))
    # 0.1 bit of 2,000 weights is 200 bits: none fits but one of the hundreds would need 350.
    assert spend_bits(found, scheme, 4.6).int8 == ("*.v",)
    assert spend_bits(found, scheme, 4.7).int8 == ("*.v", "a_a", "a_b")
    # b does not fit any more, c does.
    assert spend_bits(found, scheme, 4.9).int8 == ("*.v", "a_a", "a_b", "c_a", "c_b")
    assert len(spend_bits(found, scheme, 8).int8) == 9
    with pytest.raises(InvalidArgumentError, match="takes 4.500 by itself"):
        spend_bits(found, scheme, 4.25)
    assert part("a", 2_000_000, 0.7).kl_per_megabit == pytest.approx(0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_bits_are_those_of_the_file(tmp_path: Path, scheme: str) -> None:
    source = write_float_model(tmp_path / "float")
    result = quantize_directory(source, tmp_path / "out", SCHEMES[scheme])
    bits = scheme_bits(read_model(source).spec, SCHEMES[scheme])
    assert bits == pytest.approx(result.bits_per_weight)
    assert stored_bits(WeightFormat("int4", 32, True), (9, 64)) == 9 * 64 * 4 + 288 + 128 + 128


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_float_model(tmp_path / "float"))
    assert run(["quantize", source, "--scheme", "int4", "--sensitivity", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "layers.1.gate_up" in printed.out and not printed.err
    target = tmp_path / "out"
    arguments = ["quantize", source, str(target), "--scheme", "int4-nonuniform", "--json"]
    assert run([*arguments, "--bits-per-weight", "5.5", "--max-windows", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["int8"] and 4.6 < facts["bits_per_weight"] <= 5.5
    formats = open_checkpoint(read_model(target)).formats
    eight = {name for name, format in formats.items() if format.dtype == "int8"}
    assert eight == set(facts["int8"])
    best = facts["sensitivity"]["parts"][0]
    assert set(best["matrices"]) <= eight and best["kl_per_megabit"] > 0
    assert run(["quantize", source, "--scheme", "int4"]) == 2
    assert "OUT is missing" in capsys.readouterr().err
    assert run(["quantize", source, "--sensitivity"]) == 2
    assert "expected --scheme int4" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["4", "nan"])
def test_too_few_bits_are_refused_before_anything_is_measured(
    tmp_path: Path,
    bits: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("octavo.quantize.model.measure_importance", None)
    monkeypatch.setattr("octavo.quantize.model.measure_sensitivity", None)
    source, target = str(write_float_model(tmp_path / "float")), str(tmp_path / "out")
    assert run(["quantize", source, target, "--scheme", "int4", "--bits-per-weight", bits]) == 2
    assert f"bits_per_weight is {bits}; int4 in groups of 32 takes 4.5" in capsys.readouterr().err
