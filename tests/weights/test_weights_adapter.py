"""LoRA adapters as PEFT writes them: what is read, and what is refused by which name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import ALL, adapter_config, random_adapter, write_adapter
from fuzz_weights import COUNT, count_outcomes, mutations
from weights_helpers import tiny_config, write_model

from octavo.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from octavo.models.adapter import Adapter
from octavo.models.family import TensorNames
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

CONFIG = tiny_config()
PARTS = ("q", "k", "v", "o", "gate", "up", "down")
PREFIX = "base_model.model.model.layers."


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    write_model(tmp_path / "model", CONFIG)
    return read_model(tmp_path / "model")


def read(files: ModelFiles, tensors: dict[str, np.ndarray], **changes: Any) -> Adapter:
    directory = files.path.parent / "adapter"  # type: ignore[union-attr]
    write_adapter(directory, tensors, adapter_config(**changes))
    return read_adapter(directory, files)


@pytest.mark.parametrize(
    "target", [list(ALL), "all-linear", r".*_proj", r".*\.(self_attn|mlp)\..+"]
)
def test_every_matrix_is_read(target: Any, files: ModelFiles) -> None:
    tensors = random_adapter(CONFIG)
    adapter = read(files, tensors, target_modules=target)
    assert set(adapter.matrices) == {f"layers.{i}.{part}" for i in (0, 1) for part in PARTS}
    for (module, part), layer in zip(
        (("self_attn.k_proj", "k"), ("mlp.down_proj", "down"), ("self_attn.o_proj", "o")),
        (1, 0, 1),
        strict=True,
    ):
        matrix = adapter.matrices[f"layers.{layer}.{part}"]
        for half, values in (("A", matrix.a), ("B", matrix.b)):
            name = f"{PREFIX}{layer}.{module}.lora_{half}.weight"
            np.testing.assert_array_equal(values, tensors[name])
        assert matrix.scale == 2 and matrix.rank == adapter.rank == 3
    assert adapter.num_parameters == sum(values.size for values in tensors.values())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_names_with_and_without_prefix_and_adapter(dtype: str, files: ModelFiles) -> None:
    tensors = random_adapter(CONFIG, ("q_proj", "embed_tokens"))
    other = {
        name.removeprefix("base_model.model.")
        .replace(".weight", ".default.weight")
        .replace("embedding_A", "embedding_A.default")
        .replace("embedding_B", "embedding_B.default"): values
        for name, values in tensors.items()
    }
    assert len(other.keys() & tensors.keys()) == 0
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    one = read(files, tensors, **targets)
    write_adapter(files.path.parent / "x", other, adapter_config(**targets), dtype)  # type: ignore[union-attr]
    two = read_adapter(files.path.parent / "x", files)  # type: ignore[union-attr]
    assert one.matrices.keys() == two.matrices.keys() == {"embed", "layers.0.q", "layers.1.q"}
    for name, matrix in one.matrices.items():
        tolerance = {"F32": 0, "F16": 1e-3, "BF16": 8e-3}[dtype]
        np.testing.assert_allclose(two.matrices[name].a, matrix.a, rtol=tolerance, atol=tolerance)
    assert one.matrices["embed"].a.shape == (3, 37) and one.matrices["embed"].b.shape == (24, 3)


def test_rank_and_scale_of_each_module(files: ModelFiles) -> None:
    """The first pattern that matches counts, as in PEFT; a pattern ends where the name ends."""
    one, two = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    tensors = random_adapter(CONFIG, ("q_proj", "v_proj"), ranks={one: 5, two: 1})
    changes: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, r"1\.self_attn\.v.*": 1, "q_pro": 9},
        "alpha_pattern": {"v_proj": 7, "1.self_attn.v_proj": 100},
    }
    adapter = read(files, tensors, **changes)
    scales = {name: (part.rank, part.scale) for name, part in adapter.matrices.items()}
    expected = {"0.q": (5, 6 / 5), "0.v": (3, 7 / 3), "1.q": (3, 2.0), "1.v": (1, 7.0)}
    assert scales == {f"layers.{name}": value for name, value in expected.items()}
    rooted = read(files, tensors, **changes, use_rslora=True)
    assert rooted.matrices["layers.0.v"].scale == 7 / math.sqrt(3)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"layers_to_transform": [1]}, {1}),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, {0}),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}, {0, 1}),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, {1}),
        ({"exclude_modules": r".*\.1\..*"}, {0}),
    ],
)
def test_layers_and_exclusions(changes: Any, layers: set[int], files: ModelFiles) -> None:
    tensors = {
        name: values
        for name, values in random_adapter(CONFIG, ("q_proj",)).items()
        if int(name.split(".")[4]) in layers
    }
    adapter = read(files, tensors, target_modules=["q_proj"], **changes)
    assert set(adapter.matrices) == {f"layers.{layer}.q" for layer in layers}


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head(tied: bool, tmp_path: Path) -> None:
    """A head has an adapter of its own, tied or not; a copy of the embedding must be the same."""
    config = tiny_config(tie_word_embeddings=tied)
    weights = write_model(tmp_path / "model", {**config, "tie_word_embeddings": False})
    if tied:
        del weights["lm_head.weight"]
        write_model(tmp_path / "model", config, weights=weights)
    files = read_model(tmp_path / "model")
    tensors = random_adapter(config, ("embed_tokens", "lm_head"))
    copy = weights["model.embed_tokens.weight"]
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = copy
    targets = adapter_config(target_modules=["embed_tokens", "lm_head"])
    path = write_adapter(tmp_path / "adapter", tensors, targets)
    adapter = read_adapter(path, files, open_checkpoint(files))
    assert set(adapter.matrices) == {"embed", "lm_head"}
    assert adapter.matrices["lm_head"].a.shape == (3, 24)
    with pytest.raises(WeightsError, match=r"embed_tokens\.base_layer\.weight is not a tensor"):
        read_adapter(path, files)
    copy[3, 5] += 0.5
    write_adapter(path, tensors, targets)
    with pytest.raises(WeightsError, match=r"embed_tokens\.base_layer\.weight is not a tensor"):
        read_adapter(path, files, open_checkpoint(files))


def test_fused_matrix_shares_one_a(files: ModelFiles) -> None:
    """As in Phi-3: one A for q, k and v, whose rows of B lie one after the other."""
    modules = {
        name.replace("q_proj", "qkv_proj"): "q k v" if part == "q" else part
        for name, part in files.family.tensors.modules.items()
        if part not in ("k", "v")
    }
    fused = replace(files, family=replace(files.family, tensors=TensorNames(modules)))
    generator = np.random.default_rng(4)
    module = f"{PREFIX}0.self_attn.qkv_proj"
    b = generator.standard_normal((48 + 16 + 16, 3)).astype(np.float32)
    tensors = {f"{module}.lora_A.weight": np.ones((3, 24), np.float32)}
    tensors[f"{module}.lora_B.weight"] = b
    adapter = read(fused, tensors, target_modules=["qkv_proj"], layers_to_transform=0)
    q, k, v = (adapter.matrices[f"layers.0.{part}"] for part in "qkv")
    assert q.a is k.a is v.a and adapter.num_parameters == 3 * 24 + 80 * 3
    for part, first, last in ((q, 0, 48), (k, 48, 64), (v, 64, 80)):
        np.testing.assert_array_equal(part.b, b[first:last])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    ({"use_dora": True}, "use_dora is True.*merge the adapter"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
    ({"target_parameters": ["experts.gate_up"]}, "target_parameters is"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is"),
    ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens is"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": "6"}, "lora_alpha is '6'"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    ({"rank_pattern": [3]}, "rank_pattern is"),
    ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
    ({"alpha_pattern": {"q_(": 3}}, "no regular expression"),
    ({"target_modules": None}, "target_modules is None"),
    ({"target_modules": r"(.*a)+b"}, "none inside another"),
    ({"target_modules": r"(a|a)*b"}, "none inside another"),
    ({"target_modules": r"((.+)x)*b"}, "none inside another"),
    ({"target_modules": r"a?a?a?a?a?a?a?aaaaaaa"}, "none inside another"),
    ({"layers_to_transform": ["1"]}, "layers_to_transform is"),
    ({"layers_to_transform": [1], "layers_pattern": {"x": 1}}, "layers_pattern is"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_by_name(changes: dict[str, Any], message: str, files: ModelFiles) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(files, random_adapter(CONFIG), **changes)


def test_patterns_of_real_adapters_are_taken(files: ModelFiles) -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:k_proj|v_proj|q_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    adapter = read(files, random_adapter(CONFIG, ("q_proj", "v_proj")), target_modules=pattern)
    assert len(adapter.matrices) == 4


def test_unknown_fields_are_told(files: ModelFiles) -> None:
    with pytest.warns(UserWarning, match="does not know the fields something_new"):
        read(files, random_adapter(CONFIG), something_new=True, another=None)


def test_tensors_that_do_not_fit_are_listed(files: ModelFiles) -> None:
    tensors = random_adapter(CONFIG, ("q_proj", "v_proj"))
    one, two = f"{PREFIX}0.self_attn.q_proj", f"{PREFIX}1.self_attn.v_proj"
    tensors[f"{one}.lora_A.weight"] = np.ones((4, 24), np.float32)
    tensors[f"{one}.lora_B.weight"][7, 1] = np.nan
    del tensors[f"{two}.lora_B.weight"]
    tensors[f"{two}.lora_A.default.weight"] = tensors[f"{two}.lora_A.weight"]
    tensors[f"{PREFIX}2.self_attn.q_proj.lora_A.weight"] = np.ones((3, 24), np.float32)
    tensors[f"{PREFIX}0.mlp.up_proj.lora_A.weight"] = np.ones((3, 24), np.float32)
    tensors[f"{one}.lora_magnitude_vector"] = np.ones(3, np.float32)
    with pytest.raises(WeightsError) as caught:
        read(files, tensors, target_modules=["q_proj", "v_proj"])
    problems = "\n".join(caught.value.problems)
    for part in (
        "0.self_attn.q_proj.lora_A.weight has shape (4, 24); expected (3, 24)",
        "0.self_attn.q_proj.lora_B.weight holds a NaN",
        "1.self_attn.v_proj has no lora_B; expected shape (16, 3)",
        "1.self_attn.v_proj.lora_A.default.weight is there twice",
        "the model has no matrix model.layers.2.self_attn.q_proj",
        "0.mlp.up_proj.lora_A.weight is left over",
        "lora_magnitude_vector is not a tensor of LoRA",
    ):
        assert part in problems
    assert len(caught.value.problems) == 7


def test_missing_files(files: ModelFiles, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a directory; expected an adapter"):
        read_adapter(tmp_path / "none", files)
    with pytest.raises(UnsupportedModelError, match="holds no adapter_config"):
        read_adapter(tmp_path, files)
    write_adapter(tmp_path, {})
    with pytest.raises(WeightsError, match="has no lora_A"):
        read_adapter(tmp_path, files)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"convert adapter_model\.bin"):
        read_adapter(tmp_path, files)
    write_adapter(tmp_path, random_adapter(CONFIG), adapter_config(target_modules=["x_proj"]))
    with pytest.raises(WeightsError, match="target_modules are in none"):
        read_adapter(tmp_path, files)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_mutated_adapters(file: str, files: ModelFiles, tmp_path: Path) -> None:
    config = adapter_config(
        target_modules=r".*\.(q_proj|v_proj)",
        rank_pattern={r"0\.self_attn\.q_proj": 2},
        alpha_pattern={"v_proj": 5},
        layers_to_transform=[0, 1],
    )
    tensors = random_adapter(
        CONFIG, ("q_proj", "v_proj"), ranks={"model.layers.0.self_attn.q_proj": 2}
    )
    directory = write_adapter(tmp_path / "adapter", tensors, config, "BF16")
    path = directory / file
    original = path.read_bytes()
    header = len(original) if file.endswith("json") else original.rindex(b"]}}") + 3

    def load(_: Path) -> None:
        for matrix in read_adapter(directory, files).matrices.values():
            assert matrix.a.size and math.isfinite(matrix.scale)

    outcomes = count_outcomes(load, path, mutations(original, header, seed=9))
    assert outcomes["refused"] > 0.6 * COUNT and outcomes["read"] > 0.02 * COUNT, outcomes
