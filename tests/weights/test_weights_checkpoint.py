"""A model's weights under octavo's names: complete, or refused with all problems at once."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weights_helpers import (
    encode,
    hf_shapes,
    random_weights,
    tiny_config,
    write_model,
)

from octavo.errors import InvalidArgumentError, WeightsError
from octavo.models import llama
from octavo.models.layer import weight_shapes
from octavo.weights.checkpoint import (
    NonFiniteWeightsWarning,
    has_non_finite,
    open_checkpoint,
)
from octavo.weights.dummy import TILE
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.tensor import Tensor, float32_to_bf16


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_comes_back(num_shards: int, dtype: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=tied)
    stored = write_model(tmp_path, config, dtype=dtype, num_shards=num_shards)
    files = read_model(tmp_path)
    checkpoint = open_checkpoint(files)
    assert list(checkpoint) == list(weight_shapes(files.spec))
    assert checkpoint.dtype == dtype.lower()
    assert checkpoint.num_parameters == sum(values.size for values in stored.values())
    width = 4 if dtype == "F32" else 2
    assert checkpoint.total_bytes == width * checkpoint.num_parameters
    assert checkpoint.bytes_by_dtype() == {dtype.lower(): checkpoint.total_bytes}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        items = {name: tensor for name, _, tensor in checkpoint.checked_runs()}
    for name, tensor in items.items():
        np.testing.assert_array_equal(tensor.to_float32(), stored[files.weight_map[name].tensor])


def test_mixed_formats_and_the_dominant_one(tmp_path: Path) -> None:
    config = tiny_config()
    norms = {name: "F32" for name in hf_shapes(config) if "norm" in name}
    write_model(tmp_path, config, dtype="BF16", dtypes=norms)
    checkpoint = open_checkpoint(read_model(tmp_path))
    assert checkpoint.dtype == "bf16"
    assert checkpoint["final_norm.weight"].dtype == "f32"
    assert list(checkpoint.bytes_by_dtype()) == ["bf16", "f32"]


def problems_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(read_model(directory))
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].T.copy()
    weights["model.layers.2.mlp.up_proj.weight"] = np.ones((20, 24), np.float32)
    weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(48, np.float32)
    dtypes = {"model.layers.1.mlp.down_proj.weight": "I8"}
    write_model(tmp_path, config, weights=weights, dtypes=dtypes)
    problems = problems_of(tmp_path)
    assert len(problems) == 6
    for expected in (
        "model.layers.0.mlp.up_proj.weight is missing; expected shape (20, 24)",
        "model.norm.weight is missing; expected shape (24,)",
        f"{name} has shape (24, 16); expected (16, 24)",
        "model.layers.2.mlp.up_proj.weight (shape (20, 24)) is left over",
        "model.layers.0.self_attn.q_proj.bias (shape (48,)) is left over",
        "model.layers.1.mlp.down_proj.weight is stored as I8; supported: F32, F16, BF16",
    ):
        assert any(problem.startswith(expected) for problem in problems), expected


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 38},
        {"intermediate_size": 21},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 3},
        {"head_dim": 6},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(**changes), weights=random_weights(tiny_config()))
    assert problems_of(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    weights = random_weights(tiny_config(tie_word_embeddings=True))
    write_model(tmp_path, tiny_config(), weights=weights)
    assert problems_of(tmp_path) == ("lm_head.weight is missing; expected shape (37, 24)",)


def test_a_tied_head_may_be_there_twice(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write_model(tmp_path, config, weights=weights, num_shards=2)
    files = read_model(tmp_path)
    assert files.spec.tie_word_embeddings and files.config["tie_word_embeddings"]
    assert "lm_head.weight" not in open_checkpoint(files)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_head_that_differs_is_not_tied(num_shards: int, prefix: str, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["lm_head.weight"][36, 23] += 0.5
    stored = {name.replace("model.", prefix, 1): weight for name, weight in weights.items()}
    write_model(tmp_path, config, weights=stored, num_shards=num_shards)
    with pytest.warns(UserWarning, match="differs from model.embed_tokens.weight"):
        files = read_model(tmp_path)
    assert not files.spec.tie_word_embeddings and not files.config["tie_word_embeddings"]
    checkpoint = open_checkpoint(files)
    for ours, theirs in (
        ("lm_head.weight", "lm_head.weight"),
        ("embed.weight", "model.embed_tokens.weight"),
    ):
        np.testing.assert_array_equal(checkpoint[ours].data, weights[theirs])


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_of_a_tied_pair_either_may_be_stored(kept: str, num_shards: int, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    table = weights["model.embed_tokens.weight"]
    weights[kept] = weights.pop("model.embed_tokens.weight")
    write_model(tmp_path, config, weights=weights, num_shards=num_shards)
    checkpoint = open_checkpoint(read_model(tmp_path))
    assert "lm_head.weight" not in checkpoint
    np.testing.assert_array_equal(checkpoint["embed.weight"].data, table)
    del weights[kept]
    write_model(tmp_path, config, weights=weights, num_shards=num_shards)
    assert problems_of(tmp_path) == (
        "model.embed_tokens.weight is missing; expected shape (37, 24)",
    )


def test_a_head_alone_is_no_embedding_of_an_untied_model(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    del weights["model.embed_tokens.weight"]
    write_model(tmp_path, tiny_config(), weights=weights)
    assert problems_of(tmp_path)[0].startswith("model.embed_tokens.weight is missing")


@pytest.mark.parametrize(
    ("change", "cause"),
    [("shape", "has shape"), ("type", "is stored as I8"), ("file", "truncated")],
)
def test_a_damaged_head_is_told_of_when_weights_are_opened(
    change: str, cause: str, tmp_path: Path
) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][
        : 36 if change == "shape" else 37
    ]
    kinds = dict.fromkeys(weights, "I8") if change == "type" else {}
    write_model(tmp_path, config, weights=weights, dtypes=kinds)
    if change == "file":
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = read_model(tmp_path)
    with pytest.raises(WeightsError, match=cause):
        open_checkpoint(files)
    assert len(open_checkpoint(files, "dummy")) >= 20


def test_shards_without_an_index(tmp_path: Path) -> None:
    stored = write_model(tmp_path, num_shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    # Names that are no shards of this model, whatever they hold, are not looked at.
    for other in (
        "consolidated.safetensors",
        "model-1-of-3.safetensors",
        "model-00001-of-00003.bin",
    ):
        (tmp_path / other).write_bytes(b"?")
    files = read_model(tmp_path)
    checkpoint = open_checkpoint(files)
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(tensor.data, stored[files.weight_map[name].tensor])


def test_shards_of_another_name(tmp_path: Path) -> None:
    stored = write_model(tmp_path, num_shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    for shard in tmp_path.glob("model-*"):
        shard.rename(tmp_path / shard.name.replace("model-", "my-model.v2-of-"))
    files = read_model(tmp_path)
    for name, tensor in open_checkpoint(files).items():
        np.testing.assert_array_equal(tensor.data, stored[files.weight_map[name].tensor])
    (tmp_path / "other-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"shards named my-model\.v2-of and other"):
        open_checkpoint(files)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("missing", r"holds 2 of 3 shards; missing: model-00002-of-00003\.safetensors"),
        ("another set", r"shards of 3 and of 5; without model\.safetensors\.index\.json"),
        ("beyond", r"left over: model-00004-of-00003\.safetensors"),
        ("twice", r"do not fit each other"),
    ],
)
def test_shards_that_are_no_whole_set(change: str, cause: str, tmp_path: Path) -> None:
    write_model(tmp_path, num_shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    second = tmp_path / "model-00002-of-00003.safetensors"
    if change == "missing":
        second.unlink()
    elif change == "another set":
        (tmp_path / "model-00001-of-00005.safetensors").write_bytes(b"")
    elif change == "beyond":
        (tmp_path / "model-00004-of-00003.safetensors").write_bytes(b"")
    else:
        (tmp_path / "model-00003-of-00003.safetensors").write_bytes(second.read_bytes())
    with pytest.raises(WeightsError, match=cause):
        open_checkpoint(read_model(tmp_path))


def test_a_single_file_comes_before_shards(tmp_path: Path) -> None:
    """As in transformers, where a directory has both."""
    write_model(tmp_path, num_shards=2, seed=1)
    stored = write_model(tmp_path, seed=2)
    np.testing.assert_array_equal(
        open_checkpoint(read_model(tmp_path))["final_norm.weight"].data, stored["model.norm.weight"]
    )


def test_a_snapshot_of_links(tmp_path: Path) -> None:
    """The Hub's cache: names that link to files named by their hash."""
    stored = write_model(tmp_path / "real", num_shards=3)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, entry in enumerate(sorted((tmp_path / "real").iterdir())):
        entry.rename(tmp_path / "blobs" / str(number))
        (snapshot / entry.name).symlink_to(Path("../../blobs") / str(number))
    assert len(open_checkpoint(read_model(snapshot))) == len(stored)


def test_rope_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    buffer = np.ones(4, np.float32)
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = buffer
    weights["model.rotary_emb.inv_freq"] = buffer
    write_model(tmp_path, config, weights=weights)
    assert len(open_checkpoint(read_model(tmp_path))) == len(hf_shapes(config))
    weights["model.norm.inv_freq"] = buffer
    write_model(tmp_path, config, weights=weights)
    assert len(problems_of(tmp_path)) == 1


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "opened"))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    sprung = tmp_path / "sprung"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*never opens.*convert"):
        open_checkpoint(read_model(tmp_path))
    # A pickle under the name of a safetensors file is only bytes that make no header.
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        open_checkpoint(read_model(tmp_path))
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("consolidated.safetensors", "consolidated.safetensors: fetch the model in its Hugging"),
        ("model.Q4_0.gguf", "GGUF file: name that"),
        ("readme.txt", "Fetch the model again"),
    ],
)
def test_a_directory_without_weights_says_what_to_do(
    name: str, advice: str, tmp_path: Path
) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(WeightsError, match=advice):
        open_checkpoint(read_model(tmp_path))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_warned_of_by_name(dtype: str, value: float, tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    damaged = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    weights[damaged[0]][7, 3] = value
    weights[damaged[1]][23] = value
    write_model(tmp_path, config, weights=weights, dtype=dtype)
    checkpoint = open_checkpoint(read_model(tmp_path))
    found = [name for name in checkpoint if has_non_finite(checkpoint[name])]
    assert found == ["layers.0.up.weight", "final_norm.weight"]
    with pytest.warns(NonFiniteWeightsWarning) as caught:
        assert len(list(checkpoint.checked_runs())) == len(checkpoint)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in damaged)


@pytest.mark.parametrize("count", [8, 9])
def test_up_to_eight_damaged_weights_are_named(count: int, tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    for values in list(weights.values())[:count]:
        values.flat[-1] = np.nan
    write_model(tmp_path, config, weights=weights)
    checkpoint = open_checkpoint(read_model(tmp_path))
    with pytest.warns(NonFiniteWeightsWarning, match=f"^{count} of ") as caught:
        assert len(list(checkpoint.checked_runs())) == len(checkpoint)
    named = str(caught[0].message).partition("(")[2].partition(")")[0]
    assert named.count("weight") == 8 and named.endswith("...") == (count > 8)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_largest_finite_values_are_not_warned_of(dtype: str) -> None:
    largest = {"F32": 3.4028234e38, "F16": 65504.0, "BF16": 3.3895314e38}[dtype]
    values = np.array([0.0, -0.0, largest, -largest, 1e-40], np.float32)
    assert not has_non_finite(Tensor(encode(values, dtype), dtype.lower()))  # type: ignore[arg-type]
    assert not has_non_finite(Tensor(np.zeros((0, 3), np.float32), "f32"))


def test_a_nan_far_behind_is_found() -> None:
    values = np.zeros((3, 1_000_001), np.uint16)
    values[2, 999_999] = 0xFFC0
    assert has_non_finite(Tensor(values, "bf16"))


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_rounding_to_bf16_is_to_nearest_even(values: list[float]) -> None:
    array = np.array(values, np.float32)
    rounded = Tensor(float32_to_bf16(array), "bf16").to_float32()
    assert np.array_equal(np.isnan(rounded), np.isnan(array))
    for value, result in zip(array, rounded, strict=True):
        if np.isfinite(value) and np.isfinite(result):
            step = math.ldexp(1.0, max(math.frexp(float(value))[1] - 8, -133))
            # Python's round goes to even too, and is exact here.
            assert float(result) == round(float(value) / step) * step


def dummy_files(**changes: Any) -> ModelFiles:
    config = tiny_config(**changes)
    spec = llama.read_spec(config)
    return ModelFiles(Path("nowhere"), config, spec, llama.FAMILY, (), {})


def test_dummy_weights_follow_from_the_seed_alone() -> None:
    files = dummy_files(attention_bias=True, hidden_size=640, vocab_size=2011)
    one, again, other = (open_checkpoint(files, "dummy", seed) for seed in (5, 5, 6))
    assert list(one) == list(weight_shapes(files.spec))
    assert one.dtype == "bf16"
    for name, tensor in one.items():
        assert tensor.shape == weight_shapes(files.spec)[name]
        np.testing.assert_array_equal(tensor.data, again[name].data)
        if tensor.data.ndim == 2:
            assert not np.array_equal(tensor.data, other[name].data)
            values = tensor.to_float32()
            assert abs(values.std() * math.sqrt(values.shape[1]) - 1) < 0.05
            assert abs(values.mean()) < 0.01
        else:
            assert set(tensor.to_float32().tolist()) == {float(name.endswith(".weight"))}
    # Layers differ from one another, and a tensor longer than the tile is filled to its end.
    assert not np.array_equal(one["layers.0.q.weight"].data, one["layers.1.q.weight"].data)
    assert one["embed.weight"].data.size > TILE


def test_dummy_weights_are_the_same_on_every_machine() -> None:
    """Bits written down once: they rest on Philox and on IEEE arithmetic only."""
    checkpoint = open_checkpoint(dummy_files(), "dummy", 7)
    assert checkpoint["layers.1.down.weight"].data[3, :4].tolist() == DUMMY_BITS


DUMMY_BITS = [48783, 48579, 16038, 16011]


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="-1"):
        open_checkpoint(dummy_files(), "dummy", -1)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A sparse file of 3 GB opens at once: nothing is allocated or read before it is asked for."""
    config = tiny_config(vocab_size=4_000_000, hidden_size=192, tie_word_embeddings=True)
    header, offset = {}, 0
    for name, shape in hf_shapes(config).items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    checkpoint = open_checkpoint(read_model(tmp_path))
    assert checkpoint.total_bytes == offset > 3_000_000_000
