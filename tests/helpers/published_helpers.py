"""Small checkpoints in the formats that others publish, written bit by bit from their layouts.

Nothing here uses octavo's readers: each packer makes random codes, places them field by field as
the writer's source says, and computes the weights that they stand for number by number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from quantization_helpers import CONFIG
from weights_helpers import write_safetensors

from octavo.models.registry import find_family
from octavo.quantization.apply import dequantized
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.model_files import read_model
from octavo.weights.tensor import float32_to_bf16

Shape = tuple[int, int]
Stored = dict[str, tuple[str, np.ndarray]]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Packed:
    """A matrix: its tensors by what follows "MODULE.", and the weights, float32."""

    tensors: Stored
    weights: np.ndarray


def pack_fields(values: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Fields of 32-bit words along the last axis; field j of a word holds value order[j] of it."""
    in_word = 32 // bits
    order = range(in_word) if order is None else order
    words = np.zeros((values.shape[0], values.shape[1] // in_word), np.uint32)
    for place in range(in_word):
        words |= values[:, order[place] :: in_word].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def decode(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: Any) -> np.ndarray:
    """codes (outputs, inputs), zeros and scales (groups, outputs): (code - zero) * scale."""
    weights = np.empty(codes.shape, np.float32)
    for i, group in enumerate(groups):
        weights[:, i] = (codes[:, i] - zeros[group]).astype(np.float32) * scales[group]
    return weights


def random_scales(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Scales as numbers that `dtype` holds exactly, float32."""
    values = generator.uniform(0.002, 0.02, shape).astype(np.float32)
    if dtype == "BF16":
        return (float32_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values


def stored_as(values: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """Float32 numbers as a tensor of a file."""
    if dtype == "BF16":
        return dtype, float32_to_bf16(values)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def pack_awq(
    generator: np.random.Generator, shape: Shape, group: int, *, middle: bool = False
) -> Packed:
    """AWQ "gemm". middle: all zero points are 8."""
    outputs, inputs = shape
    size = inputs if group == -1 else group
    codes = generator.integers(0, 16, shape)
    zeros = generator.integers(0, 16, (inputs // size, outputs))
    if middle:
        zeros[:] = 8
    scales = random_scales(generator, zeros.shape, "F16")
    tensors = {
        "qweight": ("I32", pack_fields(codes.T, 4, AWQ_ORDER)),
        "qzeros": ("I32", pack_fields(zeros, 4, AWQ_ORDER)),
        "scales": stored_as(scales, "F16"),
    }
    return Packed(tensors, decode(codes, zeros, scales, np.arange(inputs) // size))


def pack_gptq(
    generator: np.random.Generator,
    shape: Shape,
    group: int,
    *,
    bits: int = 4,
    version: str = "gptq",
    order: str = "none",
    middle: bool = False,
    dtype: str = "F16",
) -> Packed:
    """GPTQ. order: of groups, "none", "act" (inputs scattered) or "blocks" (whole groups moved)."""
    outputs, inputs = shape
    size, most = (inputs if group == -1 else group), (1 << bits) - 1
    num_groups = -(-inputs // size)
    groups = np.arange(inputs) // size
    if order == "act":
        groups = generator.permutation(groups)
    elif order == "blocks":
        groups = generator.permutation(num_groups)[::-1].repeat(size)
    codes = generator.integers(0, most + 1, shape)
    # A first "gptq" file holds zero - 1 in each field, so zero points of 1 and more.
    zeros = generator.integers(1, most + 1, (num_groups, outputs))
    if middle:
        zeros[:] = (most + 1) // 2
    scales = random_scales(generator, zeros.shape, dtype)
    tensors = {
        "qweight": ("I32", np.ascontiguousarray(pack_fields(codes, bits).T)),
        "qzeros": ("I32", pack_fields(zeros - (version == "gptq"), bits)),
        "scales": stored_as(scales, dtype),
        "g_idx": ("I32", groups.astype(np.int32)),
    }
    return Packed(tensors, decode(codes, zeros, scales, groups))


def e4m3(byte: int) -> float:
    """The number of one byte, from the bits."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def pack_fp8(
    generator: np.random.Generator,
    shape: Shape,
    scales: str = "block",
    *,
    name: str = "weight_scale_inv",
    dtype: str = "F32",
    block: Shape = (128, 128),
    scale_shape: tuple[int, ...] | None = None,
    extra: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> Packed:
    """FP8 with one scale a "tensor", an output ("channel") or a "block". No byte is a NaN."""
    outputs, inputs = shape
    codes = generator.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0x3A
    rows, columns = {"tensor": shape, "channel": (1, inputs), "block": block}[scales]
    grid = (-(-outputs // rows), -(-inputs // columns))
    factors = random_scales(generator, grid, "F32" if dtype == "F8_E8M0" else dtype)
    if dtype == "F8_E8M0":
        exponents = generator.integers(117, 124, grid).astype(np.uint8)
        factors = (2.0 ** (exponents.astype(np.float64) - 127)).astype(np.float32)
    weights = np.array([e4m3(byte) for byte in range(256)], np.float32)[codes]
    for o in range(outputs):
        weights[o] *= factors[o // rows, np.arange(inputs) // columns]
    stored = (dtype, exponents) if dtype == "F8_E8M0" else stored_as(factors, dtype)
    if scale_shape is not None or scales == "tensor":
        stored = stored[0], stored[1].reshape((1,) if scale_shape is None else scale_shape)
    return Packed({"weight": ("F8_E4M3", codes), name: stored, **(extra or {})}, weights)


def pack_four_bit(
    generator: np.random.Generator,
    shape: Shape,
    *,
    kind: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    storage: str = "U8",
    numbers: np.ndarray | None = None,
) -> Packed:
    """bitsandbytes in 4 bits, with double quantization or without; storage: type of the codes."""
    count = shape[0] * shape[1]
    codes = generator.integers(0, 16, count)
    if numbers is None:
        numbers = np.sort(generator.uniform(-1, 1, 16)).astype(np.float32)
    num_blocks = -(-count // blocksize)
    absmax = generator.uniform(0.05, 0.3, num_blocks).astype(np.float32)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": list(shape)}
    tensors: Stored = {"weight.absmax": ("F32", absmax)}
    if nested:
        inner = generator.integers(0, 256, num_blocks).astype(np.uint8)
        table = np.sort(generator.uniform(-1, 1, 256)).astype(np.float32)
        outer = generator.uniform(0.05, 0.1, -(-num_blocks // 256)).astype(np.float32)
        offset = np.float32(0.15)
        for block in range(num_blocks):
            absmax[block] = table[inner[block]] * outer[block // 256] + offset
        state |= {
            "nested_blocksize": 256,
            "nested_offset": float(offset),
            "nested_dtype": "float32",
        }
        tensors = {
            "weight.absmax": ("U8", inner),
            "weight.nested_absmax": ("F32", outer),
            "weight.nested_quant_map": ("F32", table),
        }
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    weights = numbers[codes] * absmax[np.arange(count) // blocksize]
    if storage != "U8":
        packed = packed.view(np.uint16)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors |= {
        "weight": (storage, packed.reshape(-1, 1)),
        "weight.quant_map": ("F32", numbers),
        f"weight.quant_state.bitsandbytes__{kind}": ("U8", text),
    }
    return Packed(tensors, weights.reshape(shape))


def pack_eight_bit(generator: np.random.Generator, shape: Shape) -> Packed:
    """bitsandbytes LLM.int8()."""
    codes = generator.integers(-127, 128, shape).astype(np.int8)
    largest = generator.uniform(0.1, 0.4, shape[0]).astype(np.float32)
    weights = codes * (largest * np.float32(1 / 127))[:, None]
    layout = ("U8", np.zeros((), np.uint8))
    tensors = {"weight": ("I8", codes), "SCB": ("F32", largest), "weight_format": layout}
    return Packed(tensors, weights.astype(np.float32))


def pack_compressed(
    generator: np.random.Generator,
    shape: Shape,
    group: int = -1,
    *,
    bits: int = 4,
    layout: str = "pack-quantized",
    zeros: str = "none",
    per_tensor: bool = False,
    order: bool = False,
    dtype: str = "BF16",
) -> Packed:
    """compressed-tensors.

    zeros: "none", "packed", or "bytes" (before 0.10); order: a weight_g_idx.
    """
    outputs, inputs = shape
    size, half = (inputs if group == -1 else group), 1 << (bits - 1)
    num_groups = inputs // size
    groups = np.arange(inputs) // size
    if order:
        groups = generator.permutation(groups)
    codes = generator.integers(-half, half, shape)
    points = generator.integers(-half, half, (num_groups, outputs))
    if per_tensor or zeros == "none":
        points[:] = 0
    scales = random_scales(generator, (num_groups, outputs), dtype)
    stored_scales = scales.T.copy()
    if per_tensor:
        scales[:] = scales[0, 0]
        stored_scales = scales[0, :1]
    tensors = {
        "weight_packed": ("I32", pack_fields(codes + half, bits)),
        "weight_shape": ("I64", np.array(shape, np.int64)),
        "weight_scale": stored_as(stored_scales, dtype),
    }
    if layout == "int-quantized":
        codes_stored = ("I8", codes.astype(np.int8))
        tensors = {"weight": codes_stored, "weight_scale": tensors["weight_scale"]}
    if zeros == "packed":
        packed = np.ascontiguousarray(pack_fields(points + half, bits).T)
        tensors["weight_zero_point"] = ("I32", packed)
    elif zeros == "bytes":
        tensors["weight_zero_point"] = ("I8", points.T.astype(np.int8))
    if order:
        tensors["weight_g_idx"] = ("I32", groups.astype(np.int32))
    return Packed(tensors, decode(codes, points, scales, groups))


def stored_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every tensor of any family's model -> its shape, (outputs, inputs).

    Matrices that the family stores turned round (GPT-2) are so where they are packed.
    """
    family = find_family(config)
    sources = family.tensors.weight_map(family.read_spec(config)).values()
    return {
        each.tensor: each.stored_shape[:: -1 if each.transform == "transpose" else 1]
        for each in sources
    }


@dataclass
class Published:
    """A directory, and the float32 weights that it stands for, by Hugging Face's names.

    coded: the names of those that were packed.
    """

    path: Path
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    coded: set[str] = field(default_factory=set)


def write_published(
    path: Path,
    pack: Callable[[np.random.Generator, Shape], Packed],
    quantization: Mapping[str, Any] | None,
    *,
    plain: Sequence[str] = ("embed", "lm_head"),
    extra: Mapping[str, tuple[str, np.ndarray]] | None = None,
    config: Mapping[str, Any] = CONFIG,
    seed: int = 0,
) -> Published:
    """A model whose matrices `pack` packs, except for those with one of `plain` in their name."""
    generator = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    written = dict(config)
    if quantization is not None:
        written["quantization_config"] = dict(quantization)
    (path / "config.json").write_text(json.dumps(written))
    published, tensors = Published(path), {}
    for name, shape in stored_shapes(config).items():
        if len(shape) == 1 or any(part in name for part in plain):
            values = generator.standard_normal(shape) / math.sqrt(shape[-1]) + (len(shape) == 1)
            tensors[name] = stored_as(values.astype(np.float32), "F16")
            published.weights[name] = tensors[name][1].astype(np.float32)
            continue
        packed = pack(generator, (shape[0], shape[1]))
        module = name.removesuffix("weight")
        tensors |= {module + part: stored for part, stored in packed.tensors.items()}
        published.weights[name] = packed.weights
        published.coded.add(name)
    write_safetensors(path / "model.safetensors", {**tensors, **(extra or {})})
    return published


def check(published: Published, converted: bool) -> Checkpoint:
    """Every weight of the checkpoint is the expected one; returns the checkpoint.

    converted: the packed ones are the exact weights, rounded once to bfloat16; else codes, with the
    same bits in float32.
    """
    files = read_model(published.path)
    checkpoint = open_checkpoint(files)
    coded = set()
    for name, source in files.weight_map.items():
        theirs = source.tensor
        expected = published.weights[theirs]
        if theirs not in published.coded and source.transform != "plain":
            continue  # as in any checkpoint of the family
        if source.rows is not None:  # of a fused matrix
            expected = expected[source.rows[0] :][: source.shape[0]]
        values = dequantized(checkpoint, name)
        if theirs in published.coded:
            coded.add(name.removesuffix(".weight"))
            if converted:
                assert checkpoint.infos[name].dtype == "bf16"
                rounded = float32_to_bf16(expected)
                assert np.array_equal(checkpoint[name].data, rounded), name
                continue
        assert np.array_equal(values, expected), name
    foreign = {name for name in coded if converted or not files.quantized[name].is_own}
    assert coded and set(checkpoint.stored) == foreign
    assert set(checkpoint.formats) == (set() if converted else coded)
    return checkpoint
