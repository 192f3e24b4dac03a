"""Calibration of experts: whose tokens count for whom, and what is done where they are few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_helpers import write_family_model
from text_helpers import byte_level_directory

from octavo.cli.app import run as run_cli
from octavo.models.layer import weight_shapes
from octavo.quantization.plan import Scheme, plan_formats
from octavo.quantization.rounding import QuantizedMatrix, quantize_matrix
from octavo.quantize.calibrate import LayerByLayer, calibrate
from octavo.quantize.calibration import Calibration, read_windows
from octavo.quantize.experts import LEAST_TOKENS
from octavo.quantize.gptq import damp, gptq
from octavo.reference import ops
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

TEXT = " ".join(f"Ship number {n} carries {n * n % 97} planks and {n % 7} men." for n in range(150))
WINDOW = 31


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "mixtral"
    limits = {"vocab_size": 421, "max_position_embeddings": 64}
    return byte_level_directory(write_family_model(path, "mixtral", uneven=True, **limits))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def weights_of(files: ModelFiles, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint[name].to_float32() for name in weight_shapes(files.spec)}


def taps_of(files: ModelFiles, weights: Any, tokens: np.ndarray, names: list[str]) -> Any:
    """The definition's taps of all windows, one after the other."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for row in tokens:
        taps: dict[str, np.ndarray] = {}
        ReferenceModel(files.spec, weights).forward(row, taps=taps)
        for name in names:
            found[name].append(taps[name])
    return [np.concatenate(found[name]) for name in names]


def same_codes(one: QuantizedMatrix, other: QuantizedMatrix) -> float:
    return float((one.codes == other.codes).mean())


def test_each_expert_is_fitted_to_its_own_tokens(model: Path, text: Path) -> None:
    """Layer 0, with all before its experts left as it is: nothing to make up for."""
    files = read_model(model)
    checkpoint = open_checkpoint(files)
    formats, _ = plan_formats(files.spec, Scheme("int4"))
    formats = {name: each for name, each in formats.items() if "layers.0.experts" in name}
    tokens, _ = read_windows(Calibration(text, windows=12, window=WINDOW), files)
    run = LayerByLayer(files.spec, checkpoint, formats, "gptq", tokens)
    run.quantize_layer(0)
    weights = weights_of(files, checkpoint)
    x, logits = taps_of(files, weights, tokens, ["layers.0.mlp_norm", "layers.0.router"])
    chosen, _ = ops.route(logits, 2, True)
    for expert in range(4):
        own = x[(chosen == expert).any(axis=1)]
        assert LEAST_TOKENS <= len(own) < 0.9 * len(x)
        name = f"layers.0.experts.{expert}."
        halves = [weights[f"{name}{part}.weight"] for part in ("gate", "up")]
        joined = np.concatenate(halves).T.copy()
        sizes = [len(half) for half in halves]
        expected = gptq(joined, own.T @ own / len(own), formats[name + "up"]).split(sizes)
        others = gptq(joined, x.T @ x / len(x), formats[name + "up"]).split(sizes)
        for part, right, wrong in zip(("gate", "up"), expected, others, strict=True):
            assert same_codes(run.matrices[name + part], right) > 0.99
            assert same_codes(run.matrices[name + part], wrong) < 0.9
        gate, up = (
            run.matrices[name + part].decode(formats[name + part]) for part in ("gate", "up")
        )
        made = ops.gated_activation(own @ gate.T, own @ up.T, "silu")
        wanted = ops.gated_activation(own @ halves[0].T, own @ halves[1].T, "silu")
        down = weights[f"{name}down.weight"].T.copy()
        for inner, like in ((made, True), (wanted, False)):
            hessian = inner.T @ inner / len(own)
            gap = inner.T @ wanted / len(own) @ down - hessian @ down
            target = down + np.linalg.solve(damp(hessian, 1.0), gap).astype(np.float32)
            (expected_down,) = gptq(target, hessian, formats[name + "down"]).split([96])
            assert (same_codes(run.matrices[name + "down"], expected_down) > 0.985) is like


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_that_see_little_are_rounded_without_the_text(
    method: str, model: Path, text: Path
) -> None:
    files = read_model(model)
    checkpoint = open_checkpoint(files)
    formats, _ = plan_formats(files.spec, Scheme("int4"))
    asked = Calibration(text, method, windows=4, window=WINDOW)
    found = calibrate(files, checkpoint, formats, asked)
    tokens, _ = read_windows(asked, files)
    run = LayerByLayer(files.spec, checkpoint, formats, method, tokens)
    run.quantize_layer(0)
    few = run.few[0]
    assert 0 < len(few) < 4
    (note,) = (note for note in found.notes if "experts saw fewer than 64 tokens" in note)
    assert f"layer 0: {', '.join(map(str, few))}; layer 1: " in note
    weights = weights_of(files, checkpoint)
    for expert in range(4):
        for part in ("gate", "up", "down"):
            name = f"layers.0.experts.{expert}.{part}"
            plain = quantize_matrix(weights[name + ".weight"], formats[name])
            is_plain = same_codes(found.matrices[name], plain) == 1
            if method == "gptq" or part == "down":  # AWQ scales the inputs of gate and up
                assert is_plain == (expert in few), name


def test_the_routers_weights_take_the_factors_of_their_norm(model: Path, text: Path) -> None:
    """So the routing stays what it was, and the directory holds the router in float32."""
    files = read_model(model)
    checkpoint = open_checkpoint(files)
    formats, _ = plan_formats(files.spec, Scheme("int4"))
    found = calibrate(files, checkpoint, formats, Calibration(text, "awq", 12, WINDOW))
    for layer in range(2):
        norm, router = (f"layers.{layer}.{part}.weight" for part in ("mlp_norm", "router"))
        factors = checkpoint[norm].to_float32() / found.vectors[norm]
        assert factors.max() > 1.2 * factors.min()
        expected = checkpoint[router].to_float32() * factors
        np.testing.assert_allclose(found.vectors[router], expected, rtol=1e-6)


def test_the_command(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scheme", "int4", "--calibrate", str(text), "--window", "31", "--windows", "5"]
    assert run_cli(["quantize", str(model), str(tmp_path / "out"), *options, "-q"]) == 0
    assert "and were rounded without it (layer 0: " in capsys.readouterr().out
    assert len(read_model(tmp_path / "out").quantized) == 2 * (4 + 3 * 4)
