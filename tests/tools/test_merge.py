"""`octavo merge`: every changed weight is W + scale * B A, all others are copied bit for bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import ALL, adapter_config, random_adapter, write_adapter
from published_helpers import pack_awq, pack_four_bit, pack_fp8, pack_gptq, write_published
from quantization_helpers import CONFIG, write_family_model
from weights_helpers import tiny_config, write_gguf, write_model, write_safetensors

from octavo.cli import main
from octavo.errors import InvalidArgumentError, UnsupportedModelError, WeightsError
from octavo.models.adapter import LowRank
from octavo.quantize import merge as merging
from octavo.quantize.merge import merge_directory
from octavo.weights.model_files import read_model
from octavo.weights.safetensors import SafetensorsFile, open_weight_files

EVERYTHING = (*ALL, "embed_tokens", "lm_head")


def stored(directory: Path) -> dict[str, np.ndarray]:
    file = open_weight_files(directory)
    return {name: file.read(name).to_float32() for name in file.infos}


def prepare(tmp_path: Path, names: Any = EVERYTHING, dtype: str = "F32", **changes: Any) -> Any:
    """A model and an adapter in tmp_path; the model's weights and the adapter's tensors."""
    config = tiny_config(**changes)
    write_model(tmp_path / "model", config, dtype=dtype, num_shards=2)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    tensors = random_adapter(config, names)
    write_adapter(tmp_path / "adapter", tensors, adapter_config(target_modules=list(names)))
    return stored(tmp_path / "model"), tensors


def added(tensors: dict[str, np.ndarray], name: str) -> np.ndarray | float:
    """What the adapter (r 3, alpha 6) adds to the weight of this name, in float64."""
    prefix = "base_model.model." + name.removesuffix(".weight")
    if prefix + ".lora_embedding_A" in tensors:
        a, b = (tensors[f"{prefix}.lora_embedding_{half}"].astype(np.float64) for half in "AB")
        return 2 * (b @ a).T
    if prefix + ".lora_A.weight" in tensors:
        a, b = (tensors[f"{prefix}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        return 2 * (b @ a)
    return 0.0


@pytest.mark.parametrize("run", [1 << 22, 100])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_weight(dtype: str, run: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(merging, "_RUN", run)
    weights, tensors = prepare(tmp_path, dtype=dtype)
    reports: list[tuple[str, int, int]] = []
    written = merge_directory(
        *(tmp_path / name for name in ("model", "adapter", "out")),
        progress=lambda *report: reports.append(report),
    )
    assert written.num_matrices == 16 and written.notes == ()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert reports[-1][1] == reports[-1][2] < written.num_bytes
    merged = stored(tmp_path / "out")
    kinds = {
        info.dtype for info in SafetensorsFile(tmp_path / "out/model.safetensors").infos.values()
    }
    assert kinds == {dtype.lower()} and merged.keys() == weights.keys()
    for name, weight in weights.items():
        change = added(tensors, name)
        if isinstance(change, float):
            np.testing.assert_array_equal(merged[name], weight, err_msg=name)
            continue
        total, epsilon = weight + change, {"F32": 2e-7, "F16": 6e-4, "BF16": 4.1e-3}[dtype]
        assert np.abs(change).max() > 0.05
        np.testing.assert_allclose(merged[name], total, rtol=epsilon, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head", "q_proj"), ("v_proj",)])
def test_a_tied_model(names: tuple[str, ...], tmp_path: Path) -> None:
    """Embedding and head are two weights as soon as the adapter changes one of them."""
    weights, tensors = prepare(tmp_path, names, tie_word_embeddings=True)
    assert "lm_head.weight" not in weights
    written = merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    merged, unties = stored(tmp_path / "out"), names != ("v_proj",)
    assert bool(written.notes) == unties
    assert read_model(tmp_path / "out").spec.tie_word_embeddings != unties
    assert ("lm_head.weight" in merged) == unties
    table = weights["model.embed_tokens.weight"]
    for name in ("model.embed_tokens.weight", "lm_head.weight") if unties else ():
        np.testing.assert_allclose(merged[name], table + added(tensors, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [("embed_tokens", "q_proj"), ("lm_head",), ("v_proj",)])
def test_names_without_the_prefix(names: tuple[str, ...], tmp_path: Path) -> None:
    """As of a model saved without its head: the same change, under the names that are there."""
    weights, tensors = prepare(tmp_path, names, tie_word_embeddings=True)
    bare = {name.removeprefix("model."): ("F32", weight) for name, weight in weights.items()}
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    write_safetensors(tmp_path / "model" / "model.safetensors", bare)
    written = merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    assert written.num_matrices == len(tensors) / 2
    merged, unties = stored(tmp_path / "out"), names != ("v_proj",)
    assert merged.keys() == bare.keys() | ({"lm_head.weight"} if unties else set())
    assert read_model(tmp_path / "out").spec.tie_word_embeddings != unties
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    for name, weight in weights.items():
        if name == "lm_head.weight" and not unties:
            continue
        found = merged[name if name in merged else name.removeprefix("model.")]
        expected = weight + added(tensors, name)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=name)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
PACK_FP8 = partial(pack_fp8, scales="tensor", scale_shape=())
CONVERTED: list[tuple[Any, dict[str, Any], str]] = [
    (partial(pack_gptq, group=32, order="act"), GPTQ, "codes"),
    (partial(pack_gptq, group=32, bits=8), {**GPTQ, "bits": 8, "desc_act": False}, "codes"),
    (partial(pack_awq, group=16), {"quant_method": "awq", "bits": 4, "group_size": 16}, "codes"),
    (PACK_FP8, FP8, "F8_E4M3"),
    (pack_four_bit, BNB, "U8"),
]


@pytest.mark.parametrize(("pack", "config", "held"), CONVERTED)
def test_matrices_that_are_converted_are_refused(
    pack: Any, config: dict[str, Any], held: str, tmp_path: Path
) -> None:
    """They run as bf16, but their files hold no numbers that a change could be added to."""
    write_published(tmp_path / "model", pack, config)
    paths = [tmp_path / name for name in ("model", "adapter", "out")]
    names = ["o_proj"]
    write_adapter(paths[1], random_adapter(CONFIG, names), adapter_config(target_modules=names))
    said = rf"layers\.0\.self_attn\.o_proj\.weight is stored as {held}; .* `octavo quantize`"
    with pytest.raises(InvalidArgumentError, match=said):
        merge_directory(*paths)
    assert not paths[2].exists()


def test_numbers_beside_converted_matrices_are_merged(tmp_path: Path) -> None:
    write_published(tmp_path / "model", PACK_FP8, FP8)
    tensors = random_adapter(CONFIG, ["lm_head"])
    write_adapter(tmp_path / "adapter", tensors, adapter_config(target_modules=["lm_head"]))
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    before, after = (open_weight_files(tmp_path / name) for name in ("model", "out"))
    for name in before.infos:
        if name != "lm_head.weight":
            assert np.array_equal(before.read_bytes(name), after.read_bytes(name)), name
            continue
        expected = before.read(name).to_float32() + added(tensors, name)
        np.testing.assert_allclose(after.read(name).to_float32(), expected, rtol=6e-4, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_fused_matrix(transposed: bool) -> None:
    """Rows of q, k and v in one matrix, or columns where it is stored the other way round."""
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((9, 5)).astype(np.float32)
    expected, changes = weight.astype(np.float64), []
    for first, last in ((0, 4), (6, 9)):
        a = generator.standard_normal((2, 5)).astype(np.float32)
        b = generator.standard_normal((last - first, 2)).astype(np.float32)
        expected[first:last] += 1.5 * (b @ a)
        changes.append(merging._Change(LowRank(a, b, 1.5), first, last, transposed))
    total = np.ascontiguousarray(weight.T if transposed else weight)
    for row in range(0, len(total), 2):
        for change in changes:
            merging._add(total[row : row + 2], row, change)
    np.testing.assert_allclose(total.T if transposed else total, expected, rtol=1e-5, atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    _, tensors = prepare(tmp_path, dtype="F16")
    paths = [tmp_path / name for name in ("model", "adapter", "out")]
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidArgumentError, match="exists; expected the name of a new"):
        merge_directory(*paths[:2], tmp_path / "there")
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(InvalidArgumentError, match=r"is a GGUF file; .*octavo pull"):
        merge_directory(tmp_path / "model.gguf", *paths[1:])
    tensors["base_model.model.lm_head.lora_B.weight"][:] = 6e4
    write_adapter(paths[1], tensors, adapter_config(target_modules=list(EVERYTHING)))
    with pytest.raises(WeightsError, match=r"lm_head\.weight: the merged weight holds .* in F16"):
        merge_directory(*paths)
    config = json.loads((paths[0] / "config.json").read_text())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        *("adapter", "model", "model.gguf", "there"),
    ]
    assert config == tiny_config()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, tie_word_embeddings=True)
    paths = [str(tmp_path / name) for name in ("model", "adapter", "out")]
    assert main(["merge", *paths]) == 0
    shown = capsys.readouterr().out
    assert "no longer tied" in shown and "16 matrices changed" in shown
    assert main(["merge", *paths]) == 2
    assert "exists" in capsys.readouterr().err


def prepare_experts(tmp_path: Path, family: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A model of experts and an adapter of the modules whose names end so; its tensors."""
    files = read_model(write_family_model(tmp_path / "model", family, dtype="F32"))
    places = files.weight_map.values()
    shapes = {each.module: each.shape for each in places if len(each.shape) == 2}
    tensors = random_adapter({}, names, shapes=shapes)
    write_adapter(tmp_path / "adapter", tensors, adapter_config(target_modules=list(names)))
    return tensors


@pytest.mark.parametrize(
    ("family", "names", "count"),
    [
        ("mixtral", ("w1", "w2", "w3", "gate", "q_proj"), 2 * (3 * 4 + 2)),
        ("mixtral", ("w2",), 2 * 4),
        ("qwen3_moe", ("up_proj", "down_proj"), 2 + 2 * 2 * 5),  # of a dense layer, too
    ],
)
def test_experts_and_routers_are_merged(
    family: str, names: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    tensors = prepare_experts(tmp_path, family, names)
    weights = stored(tmp_path / "model")
    written = merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    assert written.num_matrices == count == len(tensors) / 2
    for name, found in stored(tmp_path / "out").items():
        expected = (weights[name] + added(tensors, name)).astype(np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=name)


def test_experts_are_not_run_with_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the field, a matrix, and the command that helps."""
    prepare_experts(tmp_path, "mixtral", ("w1", "q_proj"))
    model, adapter = (str(tmp_path / name) for name in ("model", "adapter"))
    assert main(["diff", model, "--adapter", adapter, "--random", "9"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "target_modules names experts or routers (model.layers.0.block_sparse_moe" in said
    assert f"octavo merge {model} {adapter} OUT" in said
    one_is_missing = prepare_missing(tmp_path)
    with pytest.raises(WeightsError, match=rf"{one_is_missing} has no lora_B"):
        merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))


def prepare_missing(tmp_path: Path) -> str:
    """Take one tensor of an expert out of the adapter; returns its module."""
    file = SafetensorsFile(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = {name: file.read(name).to_float32().copy() for name in file.infos}
    module = "model.layers.1.block_sparse_moe.experts.2.w1"
    del tensors[f"base_model.model.{module}.lora_B.weight"]
    write_adapter(tmp_path / "adapter", tensors, adapter_config(target_modules=["w1", "q_proj"]))
    return module


def stacked(tmp_path: Path, seed: int = 4, **changes: Any) -> dict[str, np.ndarray]:
    """A Mixtral and an adapter of its stacked experts, of rank 3; its tensors.

    changes: of adapter_config.json.
    """
    write_family_model(tmp_path / "model", "mixtral", dtype="F32")  # 4 experts, 160 of 96
    generator, tensors = np.random.default_rng(seed), {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.experts"
        for wraps, outputs, inputs in (("", 96, 160), (".base_layer", 320, 96)):
            for half, shape in (("A", (12, inputs)), ("B", (outputs, 12))):
                values = generator.normal(0, 0.1, shape).astype(np.float32)
                tensors[f"{name}{wraps}.lora_{half}.weight"] = values
    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    config = adapter_config(**{**parameters, "target_modules": [], **changes})
    write_adapter(tmp_path / "adapter", tensors, config)
    return tensors


def test_stacked_experts_are_merged(tmp_path: Path) -> None:
    """A is expert by expert; the columns of B are rank by rank, each of them of all experts."""
    tensors = stacked(tmp_path)
    weights = stored(tmp_path / "model")
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    for name, found in stored(tmp_path / "out").items():
        expected = weights[name]
        if ".experts." in name:
            _, _, layer, _, _, expert, part, _ = name.split(".")
            wraps = "" if part == "w2" else ".base_layer"
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts{wraps}.lora_"
            a, b = (tensors[f"{prefix}{half}.weight"] for half in "AB")
            own = a[3 * int(expert) : 3 * int(expert) + 3]
            change = b[:, int(expert) :: 4] @ own * 2
            first = 160 if part == "w3" else 0
            expected = expected + change[first : first + len(expected)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["mlp.experts.w1"]}, "target_parameters is 'mlp.experts.w1'; suppo"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj'; supported: a list"),
        ({"target_parameters": ["down_proj"]}, "lora_A.weight is left over"),
        ({"target_parameters": None}, "is left over: target_modules does not name it"),
        ({"rank_pattern": {"down_proj": 5}}, r"expected \(20, 160\)"),
    ],
)
def test_stacked_experts_that_do_not_fit(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stacked(tmp_path, **changes)
    with pytest.raises((UnsupportedModelError, WeightsError), match=message):
        merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
