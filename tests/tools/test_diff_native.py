"""octavo's native core against the reference, right and deliberately wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diff_helpers import MISTAKES, broken_reference, tokens_for, write_model

from octavo.diff.comparison import Comparison, DiffOptions
from octavo.diff.implementations import ReferenceImplementation
from octavo.diff.native import load_native
from octavo.models.rope import default_rope
from octavo.models.spec import LayerSpec, NormSpec
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "plain tied": {"num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True},
    "multi-query, head_dim 80": {"num_key_value_heads": 1, "head_dim": 80},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def compare_native(
    files: ModelFiles,
    checkpoint: Checkpoint,
    *,
    dtype: str = "f32",
    native_files: ModelFiles | None = None,
    right: Any = None,
    count: int = 41,
    chunk_size: int = 9,
) -> Any:
    """Native (from native_files, if another) against the reference or `right`."""
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    model = ReferenceModel(files.spec, weights, dtype=dtype, kv_dtype=dtype)
    left = load_native(
        native_files or files,
        checkpoint,
        device="cpu",
        dtype=dtype,
        max_tokens=count + 8,
        chunk_size=chunk_size,
        num_threads=2,
    )
    truth = None
    if dtype == "bf16":
        truth = ReferenceImplementation(ReferenceModel(files.spec, model.weights))
    options = DiffOptions(steps=8, decode_rows=12, chunk_size=chunk_size)
    ids = tokens_for(files.spec, count)
    return Comparison(
        left, right or ReferenceImplementation(model), model, ids, options, truth
    ).run("small")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_agrees_with_the_reference(tmp_path: Path, shape: str, dtype: str) -> None:
    files = read_model(write_model(tmp_path, **SHAPES[shape]))
    result = compare_native(files, open_checkpoint(files), dtype=dtype)
    assert result.ok, (result.first_bad, result.findings)
    assert all(tap.own[0] is not None for tap in result.taps) and not result.missing
    assert result.decode.promised and result.decode.different == 0
    assert result.greedy.parted_at is None or dtype == "bf16"


def _broken_spec(files: ModelFiles, **changed: Any) -> ModelFiles:
    def change(layer: LayerSpec) -> LayerSpec:
        return replace(layer, **changed)

    return replace(files, spec=replace(files.spec, layers=tuple(map(change, files.spec.layers))))


def test_native_with_a_wrong_epsilon(tmp_path: Path) -> None:
    files = read_model(write_model(tmp_path))
    wrong = _broken_spec(files, norm=NormSpec(eps=1e-6))
    result = compare_native(files, open_checkpoint(files), native_files=wrong)
    assert result.first_bad.name == "layers.0.attn_norm"
    first = result.findings[0]
    assert (first.side, first.op) == ("octavo", "norm")
    assert first.mistake == "epsilon 1e-06 instead of 1e-05"
    assert "csrc/cpu/kernels/elementwise.h" in first.files


def test_native_with_a_wrong_rope(tmp_path: Path) -> None:
    files = read_model(write_model(tmp_path))
    rope = default_rope(10000.0, files.spec.layers[0].head_dim)
    result = compare_native(
        files, open_checkpoint(files), native_files=_broken_spec(files, rope=rope)
    )
    assert result.first_bad.name == "layers.0.q_rope"
    assert result.findings[0].mistake == "theta 10000 instead of the model's"


def test_native_with_a_wrong_activation(tmp_path: Path) -> None:
    files = read_model(write_model(tmp_path))
    wrong = _broken_spec(files, activation="gelu_tanh")
    result = compare_native(files, open_checkpoint(files), native_files=wrong, dtype="bf16")
    assert [finding.tap for finding in result.findings] == ["layers.0.act"]
    assert result.findings[0].mistake == "gelu_tanh instead of silu"
    assert not result.ok


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_other_one_is_not_blamed_on_octavo(tmp_path: Path, mistake: str) -> None:
    files = read_model(write_model(tmp_path))
    checkpoint = open_checkpoint(files)
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    other = broken_reference(mistake, files.spec, weights)
    result = compare_native(files, checkpoint, right=other)
    assert {finding.side for finding in result.findings} == {"broken"}
    assert result.findings[0].tap == MISTAKES[mistake][0]


def test_a_wrong_block_table_shows_in_attention(tmp_path: Path) -> None:
    """Keys read from another token's slot: what goes in is right, what attention gives is not."""
    files = read_model(write_model(tmp_path))
    checkpoint = open_checkpoint(files)
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    model = ReferenceModel(files.spec, weights)
    left = load_native(files, checkpoint, device="cpu", dtype="f32", max_tokens=64, chunk_size=16)
    feed = left.feed

    def feed_with_a_block_confused(token_ids: Any, **options: Any) -> Any:
        step = feed(token_ids, **options)
        session = left._session
        if session._lengths[0] == 32:  # from here on the second block is read in place of the first
            session._blocks[0, 0] = session._blocks[0, 1]
        return step

    left.feed = feed_with_a_block_confused  # type: ignore[method-assign]
    ids = tokens_for(files.spec, 48)
    options = DiffOptions(steps=0, decode_rows=0, chunk_size=16)
    result = Comparison(left, ReferenceImplementation(model), model, ids, options).run()
    assert result.first_bad.name == "layers.0.attn" and result.first_bad.position >= 32
    assert {finding.op for finding in result.findings} == {"attention"}
    assert "attention.cpp" in result.findings[0].files
