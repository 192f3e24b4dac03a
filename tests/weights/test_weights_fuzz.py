"""Damaged files for each loader: a typed error or a readable file, never anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fuzz_weights import COUNT, count_outcomes, mutations
from weights_helpers import (
    gguf_config,
    memory_below,
    random_weights,
    tiny_config,
    write_gguf,
    write_model,
)

from octavo.text.tokenizer import Tokenizer
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.convert import convert_gguf
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.safetensors import SafetensorsFile

SMALL_GGUF = gguf_config(
    **{"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1},
)


def load_all(files: ModelFiles) -> None:
    for _, _, tensor in open_checkpoint(files).checked_runs():
        assert tensor.data.size


def read_everything(path: Path) -> None:
    file = SafetensorsFile(path)
    for name, info in file.infos.items():
        if info.dtype in ("f32", "f16", "bf16"):
            assert file.read(name).to_float32().shape == info.shape


def test_mutated_safetensors(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(num_hidden_layers=1), dtype="BF16")
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    with memory_below(20 * len(original) + 10_000_000):
        outcomes = count_outcomes(read_everything, path, mutations(original, header, seed=1))
    assert outcomes["refused"] > 0.6 * COUNT and outcomes["read"] > 0.02 * COUNT, outcomes


def test_mutated_safetensors_as_a_model(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(num_hidden_layers=1), dtype="F16")
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")

    def load(_: Path) -> None:
        load_all(read_model(tmp_path))

    outcomes = count_outcomes(load, path, mutations(original, header, seed=2))
    assert outcomes["refused"] > 0.6 * COUNT, outcomes


def test_mutated_shard_indexes(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(num_hidden_layers=1), num_shards=3)
    path = tmp_path / "model.safetensors.index.json"
    original = path.read_bytes()

    def load(_: Path) -> None:
        open_checkpoint(read_model(tmp_path))

    outcomes = count_outcomes(load, path, mutations(original, len(original), seed=3))
    assert outcomes["refused"] > 0.6 * COUNT, outcomes


def test_mutated_gguf(tmp_path: Path) -> None:
    """Headers, metadata, tokenizer and quantized data: the whole conversion runs on each file."""
    path = tmp_path / "model.gguf"
    write_gguf(path, SMALL_GGUF, kind="Q4_1")
    original = path.read_bytes()
    header = original.index(b"blk.0.ffn_down") + 400
    (tmp_path / "out").mkdir()

    def load(file: Path) -> None:
        convert_gguf(file, tmp_path / "out")

    with memory_below(100_000_000):
        outcomes = count_outcomes(load, path, mutations(original, header, seed=4))
    assert outcomes["refused"] > 0.3 * COUNT and outcomes["read"] > 0.1 * COUNT, outcomes


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS"])
def test_mutated_gguf_as_codes(kind: str, tmp_path: Path) -> None:
    """Used as it lies: every matrix becomes codes, and zero points are such as the core takes."""
    path = tmp_path / "model.gguf"
    config = gguf_config(num_hidden_layers=1, intermediate_size=256)
    write_gguf(path, config, kind=kind)
    original = path.read_bytes()
    header = original.index(b"blk.0.ffn_down") + 400

    def load(file: Path) -> None:
        checkpoint = open_checkpoint(read_model(file))
        for name, _, tensor in checkpoint.checked_runs():
            assert tensor.data.size
            if name.endswith(".zero"):
                assert (np.abs(tensor.data) <= 120).all()

    with memory_below(100_000_000):
        outcomes = count_outcomes(load, path, mutations(original, header, seed=10))
    assert outcomes["refused"] > 0.3 * COUNT and outcomes["read"] > 0.1 * COUNT, outcomes


def test_every_truncation_of_a_gguf_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, SMALL_GGUF)
    original = path.read_bytes()
    (tmp_path / "out").mkdir()
    cuts = range(0, len(original), 101)

    def load(file: Path) -> None:
        convert_gguf(file, tmp_path / "out")

    outcomes = count_outcomes(load, path, (original[:cut] for cut in cuts))
    assert outcomes == {"read": 0, "refused": len(cuts)}


def test_mutated_shards_without_an_index(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_model(tmp_path, config, weights=weights, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    path = tmp_path / "model-00001-of-00002.safetensors"  # it holds the embedding
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")

    def load(_: Path) -> None:
        load_all(read_model(tmp_path))

    outcomes = count_outcomes(load, path, mutations(original, header, seed=5))
    assert outcomes["refused"] > 0.6 * COUNT, outcomes


@pytest.mark.parametrize("part", [1, 2])
def test_mutated_parts_of_a_gguf(part: int, tmp_path: Path) -> None:
    """Used as they lie: the configuration, the tokenizer, and every weight of both parts."""
    write_gguf(tmp_path / "tiny.gguf", SMALL_GGUF, kind="Q4_1", tensors_per_part=6)
    assert len(list(tmp_path.iterdir())) == 2
    path = tmp_path / f"tiny-0000{part}-of-00002.gguf"
    original = path.read_bytes()
    last = b"output_norm.weight" if part == 2 else b"blk.0.attn_q.weight"
    header = original.rindex(last) + 60

    def load(_: Path) -> None:
        files = read_model(tmp_path / "tiny-00001-of-00002.gguf")
        Tokenizer(files.folder)
        load_all(files)

    with memory_below(100_000_000):
        outcomes = count_outcomes(load, path, mutations(original, header, seed=6 + part))
    assert outcomes["refused"] > 0.3 * COUNT and outcomes["read"] > 0.02 * COUNT, outcomes
