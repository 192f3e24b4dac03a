"""Checkpoints as others publish them: every weight is the one that the writer meant.

Matrices that run as codes are compared bit by bit in float32; converted ones with the exact weight,
rounded once to bfloat16.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_helpers import (
    Packed,
    check,
    pack_awq,
    pack_eight_bit,
    pack_four_bit,
    pack_fp8,
    pack_gptq,
    write_published,
)
from quantization_helpers import CONFIG
from weights_helpers import memory_below, write_safetensors

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.spec import WeightFormat
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.float8 import Float8Matrix
from octavo.weights.model_files import read_model
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.stored import CONVERTED, StoredSource

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def formats(checkpoint: Checkpoint) -> set[WeightFormat]:
    return set(checkpoint.formats.values())


@pytest.mark.parametrize("group", [32, -1])
def test_awq_runs_as_the_codes_of_the_file(tmp_path: Path, group: int) -> None:
    config = AWQ | {"group_size": group}
    checkpoint = check(write_published(tmp_path, partial(pack_awq, group=group), config), False)
    sizes = {32} if group == 32 else {96, 160}
    assert formats(checkpoint) == {
        WeightFormat("int4", size, has_zeros=True, scale_dtype="f16") for size in sizes
    }


def test_awq_without_zero_points_runs_symmetric(tmp_path: Path) -> None:
    pack = partial(pack_awq, group=32, middle=True)
    checkpoint = check(write_published(tmp_path, pack, AWQ), False)
    assert formats(checkpoint) == {WeightFormat("int4", 32, scale_dtype="f16")}


def test_awq_groups_without_a_kernel_are_converted(tmp_path: Path) -> None:
    pack = partial(pack_awq, group=16)
    check(write_published(tmp_path, pack, AWQ | {"group_size": 16}), True)


def test_an_older_awq_file_beside_the_configuration(tmp_path: Path) -> None:
    published = write_published(tmp_path, partial(pack_awq, group=32), None)
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(older))
    check(published, False)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_of_4_bits_runs_as_the_codes_of_the_file(
    tmp_path: Path, version: str, group: int
) -> None:
    config = GPTQ | {"group_size": group, "checkpoint_format": version}
    pack = partial(pack_gptq, group=group, version=version)
    checkpoint = check(write_published(tmp_path, pack, config), False)
    assert all(format.has_zeros for format in formats(checkpoint))


def test_gptq_zero_points_of_0_have_borrowed_from_their_neighbours(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 in every field of a word at once."""

    def pack(generator: np.random.Generator, shape: tuple[int, int]) -> Packed:
        packed = pack_gptq(generator, shape, 32, version="gptq_v2")
        zeros = packed.tensors["qzeros"][1].view(np.uint32)
        zeros &= np.uint32(0xFF0FF0FF)  # some of them 0
        places = np.arange(8) * 4
        unpacked = (zeros[:, :, None] >> places & 15).reshape(len(zeros), -1)
        codes = packed.tensors["qweight"][1].view(np.uint32)
        fields = (codes[:, None, :] >> places[:, None] & 15).reshape(-1, shape[0]).astype(np.int32)
        scales = packed.tensors["scales"][1].astype(np.float32)
        packed.weights[:] = (
            (fields - unpacked.repeat(32, axis=0).astype(np.int32)) * scales.repeat(32, axis=0)
        ).T
        zeros -= np.uint32(0x11111111)
        return packed

    check(write_published(tmp_path, pack, GPTQ), False)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_symmetric_gptq_has_no_zero_points(tmp_path: Path, dtype: str) -> None:
    pack = partial(pack_gptq, group=32, middle=True, dtype=dtype)
    checkpoint = check(write_published(tmp_path, pack, GPTQ | {"sym": True}), False)
    scale_dtype = "bf16" if dtype == "BF16" else "f16"
    assert formats(checkpoint) == {WeightFormat("int4", 32, scale_dtype=scale_dtype)}


def test_act_order_is_converted(tmp_path: Path) -> None:
    pack = partial(pack_gptq, group=32, order="act")
    checkpoint = check(write_published(tmp_path, pack, GPTQ | {"desc_act": True}), True)
    held = checkpoint.stored["layers.1.up"]
    assert (held.kind, held.format) == ("GPTQ, 4 bits, groups of 32, act-order", None)
    # Words, zero points of 4 bits and float16 scales of three groups, and g_idx.
    assert held.num_bytes == 96 * 160 // 2 + 3 * 160 // 2 + 3 * 160 * 2 + 96 * 4


@pytest.mark.parametrize("order", ["none", "blocks"])
def test_act_order_whose_groups_stay_together_runs_as_codes(tmp_path: Path, order: str) -> None:
    pack = partial(pack_gptq, group=32, order=order)
    check(write_published(tmp_path, pack, GPTQ | {"desc_act": True}), False)


def test_gptq_of_8_bits(tmp_path: Path) -> None:
    """Without zero points and act-order they are octavo's int8; anything else is converted."""
    eight = GPTQ | {"bits": 8, "group_size": -1, "sym": True}
    pack = partial(pack_gptq, group=-1, bits=8, middle=True)
    checkpoint = check(write_published(tmp_path / "row", pack, eight), False)
    assert formats(checkpoint) == {WeightFormat("int8")}
    pack = partial(pack_gptq, group=32, bits=8, middle=True)
    checkpoint = check(
        write_published(tmp_path / "groups", pack, eight | {"group_size": 32}), False
    )
    assert formats(checkpoint) == {WeightFormat("int8", 32, scale_dtype="f16")}
    pack = partial(pack_gptq, group=-1, bits=8)
    check(write_published(tmp_path / "zeros", pack, eight | {"sym": False}), True)
    for version in ("gptq", "gptq_v2"):
        pack = partial(pack_gptq, group=32, bits=8, version=version, order="act")
        config = eight | {"group_size": 32, "format": version, "desc_act": True}
        check(write_published(tmp_path / version, pack, config), True)


def test_gptq_of_a_head_and_of_some_modules_only(tmp_path: Path) -> None:
    pack = partial(pack_gptq, group=32)
    config = CONFIG | {"vocab_size": 72}
    published = write_published(
        tmp_path / "head", pack, GPTQ | {"lm_head": True}, plain=["embed"], config=config
    )
    assert "lm_head" in check(published, False).formats
    dynamic = {"-:.*down_proj": {}, "+:.*layers.0.*": {"bits": 4}}
    plain = ("embed", "lm_head", "down_proj")
    check(write_published(tmp_path / "some", pack, GPTQ | {"dynamic": dynamic}, plain=plain), False)
    listed = [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.down_proj"]]
    config = GPTQ | {"modules_in_block_to_quantize": listed}
    plain = ("embed", "lm_head", "v_proj", "o_proj", "gate_proj", "up_proj")
    check(write_published(tmp_path / "listed", pack, config, plain=plain), False)
    # Left out without a word, as the routers of experts are.
    plain = ("embed", "lm_head", "layers.1.self_attn.v_proj")
    check(write_published(tmp_path / "silent", pack, GPTQ, plain=plain), False)


def test_biases_of_early_autogptq(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.bias"
    bias = np.zeros(160, np.float16)
    published = write_published(
        tmp_path, partial(pack_gptq, group=32), None, extra={name: ("F16", bias)}
    )
    older = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(older))
    check(published, False)
    bias[3] = 0.25
    write_published(tmp_path, partial(pack_gptq, group=32), None, extra={name: ("F16", bias)})
    with pytest.raises(WeightsError, match=r"up_proj\.bias .* left over"):
        open_checkpoint(read_model(tmp_path))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
def test_fp8_in_blocks(tmp_path: Path, dtype: str) -> None:
    check(write_published(tmp_path, partial(pack_fp8, dtype=dtype), FP8), True)


def test_fp8_in_blocks_of_another_size(tmp_path: Path) -> None:
    pack = partial(pack_fp8, block=(20, 48))
    check(write_published(tmp_path, pack, FP8 | {"weight_block_size": [20, 48]}), True)


@pytest.mark.parametrize("scale_shape", [(), (1,)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_with_one_scale(tmp_path: Path, name: str, scale_shape: tuple[int, ...]) -> None:
    beside = "activation_scale" if name == "weight_scale_inv" else "input_scale"
    pack = partial(
        pack_fp8,
        scales="tensor",
        name=name,
        scale_shape=scale_shape,
        extra={beside: ("F32", np.full(scale_shape, 0.5, np.float32))},
    )
    config = FP8 | {"activation_scheme": "static", "weight_block_size": None}
    check(write_published(tmp_path, pack, config), True)


def test_fp8_of_fbgemm(tmp_path: Path) -> None:
    skipped = ["lm_head", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp"]
    pack = partial(pack_fp8, scales="channel", name="weight_scale")
    config = FBGEMM | {"modules_to_not_convert": skipped}
    plain = ("embed", "lm_head", "layers.1.self_attn.q_proj", "layers.1.mlp")
    check(write_published(tmp_path, pack, config, plain=plain), True)


def test_not_numbers_of_fp8_stay_so(tmp_path: Path) -> None:
    def pack(generator: np.random.Generator, shape: tuple[int, int]) -> Packed:
        packed = pack_fp8(generator, shape)
        packed.tensors["weight"][1][3, :2] = 0x7F, 0xFF
        return packed

    published = write_published(tmp_path, pack, FP8)
    values = open_checkpoint(read_model(published.path))["layers.0.q.weight"].to_float32()
    assert np.isnan(values[3, :2]).all() and np.isnan(values).sum() == 2


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_4_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    pack = partial(pack_four_bit, kind=kind, nested=nested)
    check(write_published(tmp_path, pack, BNB | {"bnb_4bit_quant_type": kind}), True)


def test_bitsandbytes_blocks_that_run_on_from_row_to_row(tmp_path: Path) -> None:
    """96 and 160 are no multiples of 256, and codes may lie in a tensor of bfloat16."""
    pack = partial(pack_four_bit, blocksize=256, storage="BF16")
    check(write_published(tmp_path, pack, BNB), True)


def test_bitsandbytes_of_8_bits(tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    checkpoint = check(write_published(tmp_path, pack_eight_bit, config), False)
    assert formats(checkpoint) == {WeightFormat("int8")}


@pytest.mark.parametrize(
    ("config", "pack"),
    [
        (
            AWQ | {"modules_to_not_convert": ["layers.1", "o_proj", "mlp.gate"]},
            partial(pack_awq, group=32),
        ),
        (FP8 | {"ignored_layers": ["lm_head", "layers.1.", "o_proj"]}, pack_fp8),
        (BNB | {"llm_int8_skip_modules": ["lm_head", "layers.1", "o_proj"]}, pack_four_bit),
    ],
)
def test_modules_that_were_left_out(tmp_path: Path, config: Any, pack: Any) -> None:
    plain = ("embed", "lm_head", "layers.1", "o_proj")
    published = write_published(tmp_path, pack, config, plain=plain)
    files = read_model(tmp_path)
    assert set(files.quantized) == {f"layers.0.{part}" for part in ("q", "k", "v", *MLP)}
    check(published, config is not None and config["quant_method"] != "awq")
    # The list is right even where the file contradicts it.
    write_published(tmp_path, pack, config)
    with pytest.raises(WeightsError):
        open_checkpoint(read_model(tmp_path))


MLP = ("gate", "up", "down")
STATE = np.frombuffer(b'{"quant_type": "nf4", "blocksize": 64, "shape": [96, 97]}', np.uint8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method is 'aqlm'; supported: 'awq', .* or unquantized"),
        ({"quant_method": ["awq"]}, r"quant_method is \['awq'\]"),
        ({}, "quant_method is None"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; supported: 'gemm'"),
        (AWQ | {"bits": 3}, "bits is 3; supported: 4"),
        (AWQ | {"group_size": 64}, "group_size is 64; .*down_proj|q_proj"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        (GPTQ | {"bits": 3}, "bits is 3; supported: 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"dynamic": {"-:(": {}}}, "dynamic is .*regular expression"),
        (GPTQ | {"dynamic": {".*": 3}}, "dynamic is 3"),
        (GPTQ | {"modules_in_block_to_quantize": [1]}, "modules_in_block_to_quantize is"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size is"),
        (BNB | {"load_in_4bit": False}, "load_in_4bit is False"),
        (BNB | {"load_in_8bit": True}, "load_in_4bit is True"),
        (BNB | {"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type is 'nf3'"),
    ],
)
def test_refused_by_name(tmp_path: Path, config: Any, message: str) -> None:
    written = CONFIG | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedModelError, match=f"quantization_config: {message}"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "pack", "name", "values", "message"),
    [
        (
            *(GPTQ | {"desc_act": True}, partial(pack_gptq, group=32, order="act"), "g_idx"),
            *(("I32", np.full(96, 3, np.int32)), "holds a group 3; expected groups 0 to 2"),
        ),
        (
            *(BNB, pack_four_bit, "weight.quant_state.bitsandbytes__nf4"),
            *(("U8", np.frombuffer(b"{", np.uint8)), "holds no JSON"),
        ),
        (
            *(BNB, pack_four_bit, "weight.quant_state.bitsandbytes__nf4"),
            *(("U8", STATE), r"shape \[96, 97\]; expected \[96, 96\]"),
        ),
        (
            *(BNB, pack_four_bit, "weight.absmax"),
            *(("F32", np.ones(7, np.float32)), "holds 7 numbers; expected 144"),
        ),
    ],
)
def test_contents_that_contradict_the_format(
    tmp_path: Path, config: Any, pack: Any, name: str, values: Any, message: str
) -> None:
    def broken(generator: np.random.Generator, shape: tuple[int, int]) -> Packed:
        packed: Packed = pack(generator, shape)
        if shape == (96, 96):
            packed.tensors[name] = values
        return packed

    published = write_published(tmp_path, broken, config)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(read_model(published.path))


@pytest.mark.parametrize(
    ("config", "pack"),
    [
        (AWQ, partial(pack_awq, group=32)),
        (GPTQ, partial(pack_gptq, group=32)),
        (GPTQ | {"desc_act": True}, partial(pack_gptq, group=32, order="act")),
        (GPTQ | {"bits": 8}, partial(pack_gptq, group=32, bits=8)),
        (FP8 | {"weight_block_size": [20, 48]}, partial(pack_fp8, block=(20, 48))),
        (FBGEMM, partial(pack_fp8, scales="channel", name="weight_scale")),
        (BNB, partial(pack_four_bit, blocksize=256)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack_eight_bit),
    ],
)
def test_some_rows_are_those_of_the_whole(tmp_path: Path, config: Any, pack: Any) -> None:
    """As matrices are read that a checkpoint holds as one; the rows begin at odd places."""
    files = read_model(write_published(tmp_path, pack, config).path)
    weights = SafetensorsFile(tmp_path / "model.safetensors")
    matrix = files.quantized["layers.1.down"].settled(weights)
    source = StoredSource(weights, [matrix])
    for name in matrix.infos():
        whole = source.read(name)
        assert whole.shape[0] == 96
        for first, last in ((0, 1), (5, 78), (8, 16), (95, 96)):
            rows = source.read_rows(name, first, last)
            assert rows.dtype == whole.dtype
            assert np.array_equal(rows.data, whole.data[first:last]), (name, first)


def test_conversion_needs_little_memory(tmp_path: Path) -> None:
    """A matrix at a time: the result in bf16, and scratch for a block of rows."""
    outputs, inputs = 2048, 1024
    codes = np.random.default_rng(0).integers(0, 120, (outputs, inputs)).astype(np.uint8)
    scale = np.ones((outputs // 128, inputs // 128), np.float32)
    scale[1] = 3
    stored = {"m.weight": ("F8_E4M3", codes), "m.weight_scale_inv": ("F32", scale)}
    write_safetensors(tmp_path / "model.safetensors", stored)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    matrix = Float8Matrix("m", (outputs, inputs), CONVERTED, block=(128, 128))
    source = StoredSource(file, [matrix])
    with memory_below(2 * outputs * inputs + 4_000_000):
        whole = source.read("m.weight")
    assert np.array_equal(source.read_rows("m.weight", 130, 300).data, whole.data[130:300])
