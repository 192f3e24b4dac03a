"""Directories of codes: their layout bit by bit, what is refused, and loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_helpers import CONFIG, SCHEMES, write_float_model, write_quantized_model
from weights_helpers import hf_shapes, random_weights, write_model, write_safetensors

from octavo.errors import InvalidArgumentError, UnsupportedModelError, WeightsError
from octavo.models.layer import weight_shapes
from octavo.models.spec import WeightFormat
from octavo.quantization.apply import dequantized, quantize_checkpoint
from octavo.quantization.levels import NONUNIFORM_LEVELS as LEVELS
from octavo.quantization.plan import Scheme, plan_formats
from octavo.quantize.writer import quantize_directory
from octavo.reference import quantization as definition
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.codes import pack_words, pack_zeros, unpack_zeros
from octavo.weights.model_files import read_model


def test_words_by_hand() -> None:
    # Codes -8, -7, ... of a row of eight are the hexadecimal digits 0, 1, ... from the right.
    four = np.array([[-8, -7, -6, -5, -4, -3, -2, 7], [7, 7, 0, 0, 0, 0, 0, -8]], np.int8)
    expected = np.array([[0xF6543210], [0x088888FF]], np.uint32).view(np.int32)
    assert np.array_equal(definition.pack_int32(four, 4), expected)
    assert np.array_equal(pack_words(definition.pack_int4(four + 8), "int4"), expected)
    eight = np.array([[-128, -127, 0, 127, 1]], np.int8)
    expected = np.array([[0xFF800100, 0x00000081]], np.uint32).view(np.int32)
    assert np.array_equal(definition.pack_int32(eight, 8), expected)
    padded = pack_words(eight, "int8")
    assert np.array_equal(padded.view(np.uint8)[0, :5], expected.view(np.uint8)[0, :5])
    # Zero points are packed downwards: output 0 in the lowest digit of the first row of words.
    zeros = np.array([[-8, 7], [-7, 0], [-6, 0]], np.float32)
    expected = np.array([[0x00000210], [0x0000088F]], np.uint32).view(np.int32).T
    assert np.array_equal(pack_zeros(zeros), expected)


@pytest.mark.parametrize("inputs", [32, 44, 96, 98])
def test_words_there_and_back(inputs: int) -> None:
    generator = np.random.default_rng(inputs)
    values = generator.integers(-8, 8, (19, inputs)).astype(np.int8)
    words = pack_words(definition.pack_int4(values + 8), "int4")
    assert np.array_equal(definition.unpack_int32(words, 4, inputs), values)
    codes = generator.integers(-128, 128, (19, inputs)).astype(np.int8)
    words = pack_words(codes, "int8")
    assert np.array_equal(definition.unpack_int32(words, 8, inputs), codes)
    zeros = values.astype(np.float32)
    assert np.array_equal(unpack_zeros(pack_zeros(zeros), 19), zeros)
    assert np.array_equal(
        pack_zeros(zeros), definition.pack_int32(np.ascontiguousarray(values.T), 4).T
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_not_quantized_is_kept_in_16_bits(dtype: str, tmp_path: Path) -> None:
    source = write_float_model(tmp_path / "float", dtype)
    quantize_directory(source, tmp_path / "int8", SCHEMES["int8"])
    content = (tmp_path / "int8" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["model.embed_tokens.weight"]["dtype"] == dtype.replace("F32", "BF16")
    assert header["model.layers.1.input_layernorm.weight"]["dtype"] == dtype


def raw(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory as another reader sees them; bf16 as uint16."""
    content = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    kinds = {"I32": np.int32, "I64": np.int64, "BF16": np.uint16, "F32": np.float32}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            data = np.frombuffer(content[begin:end], kinds[entry["dtype"]])
            tensors[name] = data.reshape(entry["shape"])
    return tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_directory_holds_the_weights(tmp_path: Path, scheme: str) -> None:
    source, target = write_quantized_model(tmp_path, scheme)
    original, tensors = open_checkpoint(read_model(source)), raw(target)
    down = original["layers.1.down.weight"].to_float32()
    name = "model.layers.1.mlp.down_proj.weight"
    bits = 8 if scheme == "int8" else 4
    assert tensors[name + "_shape"].tolist() == [96, 160]
    words = name if scheme == "int4-nonuniform" else name + "_packed"
    assert (name in tensors) == (words == name)
    codes = definition.unpack_int32(tensors[words], bits, 160).astype(np.float64)
    scales = (tensors[name + "_scale"].astype(np.uint32) << 16).view(np.float32)
    if "asymmetric" in scheme:
        zeros = definition.unpack_int32(
            np.ascontiguousarray(tensors[name + "_zero_point"].T), 4, 96
        ).T
        codes -= np.repeat(zeros, 160 // zeros.shape[1], axis=1)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    if scheme == "int4-nonuniform":
        (group,) = config["config_groups"].values()
        codes = np.array(group["weights"]["levels"])[codes.astype(int) + 8]
    values = codes * np.repeat(scales, 160 // scales.shape[1], axis=1)
    relative = np.linalg.norm(values - down) / np.linalg.norm(down)
    assert relative < (0.01 if bits == 8 else 0.13)
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype
    ours = scheme == "int4-nonuniform"
    assert config["quant_method"] == ("octavo" if ours else "compressed-tensors")
    assert config["format"] == ("octavo" if ours else "pack-quantized")
    assert config["ignore"] == ["lm_head"]
    assert not list(tmp_path.glob(".*"))


def test_the_configuration_of_groups_that_differ(tmp_path: Path) -> None:
    source = write_float_model(tmp_path / "float", intermediate_size=192)
    result = quantize_directory(source, tmp_path / "out", Scheme("int4", 64))
    assert result.formats["layers.0.down"].group_size == 64
    assert result.formats["layers.0.up"].group_size == 32 and len(result.notes) == 1
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    by_size = {
        group["weights"]["group_size"]: group["targets"]
        for group in config["config_groups"].values()
    }
    assert by_size[64] == [r"re:.*\.down_proj$"] and len(by_size[32]) == 6
    assert open_checkpoint(read_model(tmp_path / "out")).formats == result.formats
    assert result.num_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert 4.25 < result.bits_per_weight < 4.51


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loading_a_directory_is_quantizing_at_load(tmp_path: Path, scheme: str) -> None:
    source, target = write_quantized_model(tmp_path, scheme)
    files = read_model(source)
    at_load = quantize_checkpoint(open_checkpoint(files), files.spec, SCHEMES[scheme])
    stored = quantize_checkpoint(open_checkpoint(read_model(target)), files.spec, None)
    assert at_load.formats == stored.formats and at_load.dtype == stored.dtype == "bf16"
    assert at_load.num_parameters == stored.num_parameters
    eight = {base for base, format in at_load.formats.items() if format.dtype == "int8"}
    assert not {name for name in set(at_load) ^ set(stored) if name.split(".scale")[0] not in eight}
    for name in set(at_load) & set(stored):
        if name.removesuffix(".weight") in eight:
            continue  # still floats where the native core rounds them: compared below
        ours, theirs = at_load[name], stored[name]
        assert ours.shape == theirs.shape, name
        if name.endswith((".scale", ".zero")):
            assert np.array_equal(ours.to_float32(), theirs.to_float32()), name
        else:
            assert ours.dtype == theirs.dtype and np.array_equal(ours.data, theirs.data), name
    for name in weight_shapes(files.spec):
        assert np.array_equal(dequantized(at_load, name), dequantized(stored, name))


def test_some_matrices_may_take_int8(tmp_path: Path) -> None:
    source = write_float_model(tmp_path / "float")
    spec = read_model(source).spec
    for scheme in ("int4", "int4-nonuniform"):
        wanted = Scheme(scheme, int8=("*.down", "layers.1.[qkv]"))
        target = tmp_path / scheme
        formats = quantize_directory(source, target, wanted).formats
        assert {name for name, format in formats.items() if format.dtype == "int8"} == {
            *("layers.0.down", "layers.1.down", "layers.1.q", "layers.1.k", "layers.1.v")
        }
        assert open_checkpoint(read_model(target)).formats == formats
        config = json.loads((target / "config.json").read_text())["quantization_config"]
        targets = {
            group["weights"]["num_bits"]: group["targets"]
            for group in config["config_groups"].values()
        }
        assert "model.layers.1.self_attn.k_proj" in targets[8]
        assert "model.layers.0.self_attn.k_proj" in targets[4] and len(targets) == 2
    with pytest.raises(InvalidArgumentError, match="'down', which no matrix is called"):
        plan_formats(spec, Scheme("int4", int8=("down",)))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_scales_keep_their_precision(tmp_path: Path, dtype: str) -> None:
    """Scales run in the type in which they are stored."""
    _, target = write_quantized_model(tmp_path, "int4")
    tensors = raw(target)
    written: dict[str, tuple[str, np.ndarray]] = {}
    expected: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        kind = {"int32": "I32", "int64": "I64", "uint16": "BF16"}[values.dtype.name]
        if name.endswith("_scale"):
            numbers = (values.astype(np.uint32) << 16).view(np.float32)
            if dtype != "BF16":
                numbers = (numbers * 1.0014).astype("f2" if dtype == "F16" else "f4")
                kind, values = dtype, numbers
            expected[name] = numbers.astype(np.float32)
        written[name] = (kind, values)
    write_safetensors(target / "model.safetensors", written)
    checkpoint = open_checkpoint(read_model(target))
    assert checkpoint.formats["layers.1.up"].scale_dtype == dtype.lower()
    scale = checkpoint["layers.1.up.scale"].to_float32()
    assert np.array_equal(scale, expected["model.layers.1.mlp.up_proj.weight_scale"])


def test_the_embedding_may_be_kept(tmp_path: Path) -> None:
    _, target = write_quantized_model(tmp_path, "int4")
    files = read_model(target)
    checkpoint = open_checkpoint(files)
    assert quantize_checkpoint(checkpoint, files.spec, None, keep_embedding=True) is checkpoint
    rounded = quantize_checkpoint(checkpoint, files.spec, None)
    assert set(rounded.formats) - set(checkpoint.formats) == {"embed", "lm_head"}
    with pytest.raises(InvalidArgumentError, match="quantized already"):
        quantize_checkpoint(checkpoint, files.spec, Scheme("int8"))
    with pytest.raises(InvalidArgumentError, match="quantized already"):
        quantize_directory(target, tmp_path / "again", Scheme("int8"))


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
def test_int8_codes_one_a_byte(tmp_path: Path, layout: str) -> None:
    """As llm-compressor writes them, -128 included."""
    generator = np.random.default_rng(0)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    codes: dict[str, np.ndarray] = {}
    for name, shape in hf_shapes(CONFIG).items():
        if len(shape) == 1 or "embed" in name or "lm_head" in name:
            tensors[name] = ("F32", generator.standard_normal(shape).astype(np.float32))
        else:
            codes[name] = generator.integers(-128, 128, shape).astype(np.int8)
            tensors[name] = ("I8", codes[name])
            scale = generator.uniform(0.001, 0.01, (shape[0], 1)).astype(np.float32)
            tensors[name + "_scale"] = ("F32", scale)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    config = CONFIG | {"quantization_config": stored_config(8, format=layout)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(read_model(tmp_path))
    name = "model.layers.0.self_attn.k_proj.weight"
    assert np.array_equal(checkpoint["layers.0.k.weight"].data, codes[name])
    assert np.array_equal(checkpoint["layers.0.k.scale"].data, tensors[name + "_scale"][1])
    assert checkpoint.formats["layers.0.k"] == WeightFormat("int8")


def stored_config(bits: int = 4, **changes: Any) -> dict[str, Any]:
    """A quantization_config; changes of its fields, "weights.FIELD" those of its weights."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": 32} if bits == 4 else {"strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    for name, value in changes.items():
        if name.startswith("weights_"):
            weights[name.removeprefix("weights_")] = value
        elif name.startswith("group_"):
            group[name.removeprefix("group_")] = value
        else:
            config[name] = value
    return config


OWN = {"quant_method": "octavo", "format": "octavo"}
FLOAT8 = {"format": "float-quantized", "weights_type": "float"}


@pytest.mark.parametrize(
    ("bits", "changes", "message"),
    [
        (4, {"quant_method": "hqq"}, "quant_method is 'hqq'"),
        (4, {"quant_method": None}, "quant_method is None"),
        (4, {"format": "float-quantized"}, "format is 'float-quantized'"),
        (4, {"format": "int-quantized"}, "format is 'int-quantized'; supported: 'pack-quant"),
        (4, {"quantization_status": "calibration"}, "quantization_status is 'calibration'"),
        (4, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        (4, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (4, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config is"),
        (4, {"config_groups": {}}, "config_groups is {}"),
        (4, {"config_groups": {"W8A8": ["Linear"]}}, "config_groups: W8A8 is"),
        (4, {"ignore": "lm_head"}, "ignore is 'lm_head'"),
        (4, {"ignore": ["re:("]}, "regular expression"),
        (4, {"group_targets": None}, "targets is None"),
        (4, {"group_weights": None}, "weights is None"),
        (8, {"group_input_activations": {"num_bits": 8}}, "input_activations: dynamic is None"),
        (4, {"weights_num_bits": 3}, "num_bits is 3"),
        (4, {"weights_num_bits": 6}, "num_bits is 6; supported: 4 or 8"),
        (4, {"weights_type": "float"}, "type is 'float'"),
        (4, {"weights_actorder": "random"}, "actorder is 'random'"),
        (4, {"weights_dynamic": True}, "dynamic is True"),
        (4, {"weights_strategy": "block"}, "strategy is 'block'; supported: 'group', 'channel'"),
        (8, {"weights_strategy": "tensor", "weights_group_size": 8}, "group_size is 8"),
        (4, {"weights_levels": list(range(-8, 8))}, "levels is .*; supported: no levels"),
        (4, {"quant_method": "octavo"}, "format is 'pack-quantized'; supported: 'octavo'"),
        (4, {"format": "octavo"}, "format is 'octavo'; supported: 'pack-quantized' or"),
        (4, OWN | {"weights_levels": 4}, "levels is 4; supported: 16 whole"),
        (4, OWN | {"weights_levels": [*range(-8, 7), 7.5]}, "levels is"),
        (4, OWN | {"weights_levels": [*range(-8, 7), 6]}, "levels is"),
        (4, OWN | {"weights_levels": [-128, *range(-8, 7)]}, "levels is"),
        (8, OWN | {"weights_levels": list(LEVELS)}, "levels is .*symmetric 4"),
        (4, {"weights_group_size": 64}, "group_size is 64; supported: a number that divides"),
        (4, {"weights_group_size": 128}, "group_size is 128; .*divides the width"),
        (4, {"weights_group_size": 0}, "group_size is 0"),
        (8, FLOAT8 | {"format": "pack-quantized"}, "type is 'float'; .*'float-quantized'"),
        (8, FLOAT8 | {"weights_num_bits": 4}, "type is 'float'"),
        (8, FLOAT8 | {"weights_strategy": "token"}, "strategy is 'token'"),
        (8, FLOAT8 | {"weights_symmetric": False}, "symmetric is False"),
        (8, FLOAT8 | {"weights_strategy": "block"}, "block_structure is None"),
    ],
)
def test_refused_by_name(tmp_path: Path, bits: int, changes: Any, message: str) -> None:
    config = CONFIG | {"quantization_config": stored_config(bits, **changes)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"config.json: quantization_config.*{message}"):
        read_model(tmp_path)


def test_targets_and_exceptions() -> None:
    from octavo.models import llama
    from octavo.weights.quantization_config import read_quantization

    spec = llama.read_spec(CONFIG)

    def names(**changes: Any) -> set[str]:
        config = {"quantization_config": stored_config(4, **changes)}
        return set(read_quantization(config, spec, llama.FAMILY.tensors))

    everything = names()
    assert len(everything) == 14
    assert names(ignore=[]) == everything | {"lm_head"}
    assert names(ignore=["re:.*lm_head", "model.layers.1.mlp.up_proj"]) == everything - {
        "layers.1.up"
    }
    assert names(group_targets=["re:.*mlp.*", "model.layers.0.self_attn.q_proj"]) == {
        *("layers.0.gate", "layers.0.up", "layers.0.down", "layers.0.q"),
        *("layers.1.gate", "layers.1.up", "layers.1.down"),
    }


def test_files_that_do_not_fit_are_told_of_at_once(tmp_path: Path) -> None:
    _, target = write_quantized_model(tmp_path, "int4-asymmetric")
    config = json.loads((target / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["symmetric"] = True
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"q_proj\.weight_zero_point .* left over"):
        open_checkpoint(read_model(target))
    weights.update(symmetric=False, group_size=160)
    with pytest.raises(UnsupportedModelError, match="group_size is 160"):
        (target / "config.json").write_text(json.dumps(config))
        read_model(target)
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"q_proj\.weight is missing"):
        open_checkpoint(read_model(target))
    write_model(target, CONFIG | {"quantization_config": stored_config()})
    with pytest.raises(WeightsError, match=r"q_proj\.weight_packed is missing; .*\(96, 12\)"):
        open_checkpoint(read_model(target))


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    source = tmp_path / "float"
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_model(source, CONFIG, weights=weights)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj.* NaN"):
        quantize_directory(source, tmp_path / "out", Scheme("int4"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["float"]
    with pytest.raises(InvalidArgumentError, match="exists"):
        quantize_directory(source, source, Scheme("int8"))
    with pytest.raises(InvalidArgumentError, match="not a directory"):
        quantize_directory(source, tmp_path / "no" / "out", Scheme("int8"))
