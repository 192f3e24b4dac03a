"""Blocks of GGUF become octavo's codes: the same numbers, or numbers within a stated bound.

The package `gguf` is the oracle: its decoders share nothing with the code under test.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_blocks_helpers import SCALES, encode_blocks
from weights_helpers import gguf_config, memory_below, random_weights, write_gguf

from octavo import _native
from octavo.quantization.apply import dequantized, quantize_checkpoint
from octavo.quantization.stored import describe_stored
from octavo.reference.quantization import dequantize, unpack_int4
from octavo.weights import gguf_blocks, gguf_bytes, gguf_codes, gguf_nibbles
from octavo.weights.checkpoint import NonFiniteWeightsWarning, open_checkpoint
from octavo.weights.gguf import KINDS as KINDS_OF_GGUF
from octavo.weights.gguf import PLAIN_KINDS, GgufFile
from octavo.weights.gguf_blocks import convert_blocks
from octavo.weights.gguf_bytes import BYTE_FORMATS
from octavo.weights.gguf_codes import BLOCK_FORMATS
from octavo.weights.model_files import read_model

# Of the types that the package has no encoder for, the helpers have those of `SCALES`.
KINDS = [kind for kind in BLOCK_FORMATS if not kind.startswith(("IQ1", "IQ2", "IQ3"))]
EXACT = [kind for kind in KINDS if not BLOCK_FORMATS[kind].difference]
WITHIN = ["Q4_1", "Q4_K"]
# Types that are rounded to 8 bits in groups, with the most that a number may differ, as a part of
# the largest number of its group: half of a 127th of the greatest number that the group's codes can
# stand for, which it need not hold, and float16's rounding of the scale. Of Q6_K and Q3_K one
# number can be a whole step off, where two parts have scales of opposite signs.
ROUNDED = {"Q5_1": 0.0048, "Q5_K": 0.012, "Q2_K": 0.012, "Q6_K": 0.012, "Q3_K": 0.012}
ROUNDED |= {"TQ1_0": 0.0005, "TQ2_0": 0.0005}


def decoded(raw: np.ndarray, kind: str) -> np.ndarray:
    """The package's float32 numbers."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])


def as_codes(raw: np.ndarray, kind: str) -> np.ndarray:
    """The float32 numbers that octavo's codes stand for."""
    codes, scales, zeros = convert_blocks(raw, BLOCK_FORMATS[kind])
    format = BLOCK_FORMATS[kind].format
    assert (zeros is not None) == format.has_zeros
    assert scales.dtype == (np.float16 if format.scale_dtype == "f16" else np.float32)
    codes = unpack_int4(codes) if format.dtype == "int4" else codes
    return dequantize(codes, scales.astype(np.float32), format, zeros)


def steps_of(raw: np.ndarray, kind: str) -> np.ndarray:
    """The distance of neighbouring codes of each number's group, after the definition."""
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    steps = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q4_K":
        steps = steps * gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])[0]
    return np.repeat(steps.reshape(len(raw), -1), 32, axis=1)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("shape", [(1, 256), (7, 768), (129, 512)])
@pytest.mark.parametrize("kind", EXACT)
def test_the_numbers_are_those_of_the_file(kind: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(3).standard_normal(shape)
    raw = encode_blocks(values, kind, seed=shape[0])
    assert len(np.unique(decoded(raw, kind))) > shape[0] * shape[1] // 50
    assert same_bits(as_codes(raw, kind), decoded(raw, kind))


@pytest.mark.parametrize("shape", [(1, 256), (7, 768), (129, 512)])
@pytest.mark.parametrize("kind", WITHIN)
def test_the_numbers_are_within_a_32nd_of_a_step(kind: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(4).standard_normal(shape) + 0.3
    raw = encode_blocks(values, kind, seed=0)
    expected, steps = decoded(raw, kind), steps_of(raw, kind)
    differences = np.abs(as_codes(raw, kind) - expected)
    assert (differences <= steps / 32 * 1.0001).all()
    assert differences.max() > steps.min() / 64  # the bound is near
    assert np.abs(expected - values).max() < 0.6 * steps.max()  # and the blocks are good ones


@pytest.mark.parametrize("shape", [(1, 256), (7, 768), (129, 512)])
@pytest.mark.parametrize("kind", ROUNDED)
def test_the_numbers_are_rounded_to_8_bits_in_groups(kind: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(4).standard_normal(shape) + 0.3
    raw = encode_blocks(values, kind, seed=shape[0])
    expected = decoded(raw, kind)
    groups = (shape[0], -1, 32)
    largest = np.abs(expected).reshape(groups).max(axis=2)
    differences = np.abs(as_codes(raw, kind) - expected).reshape(groups).max(axis=2)
    assert (differences <= largest * ROUNDED[kind]).all()
    assert shape[0] == 1 or (differences >= largest * ROUNDED[kind] / 4).any()  # the bound is near
    if kind in ("Q6_K", "Q3_K"):  # the parts with the larger step: the file's, times 4 or 32
        codes = convert_blocks(raw, BLOCK_FORMATS[kind]).codes.reshape(-1, 2, 16)
        whole = (codes % (4 if kind == "Q6_K" else 32) == 0) | (codes == 127)
        assert whole.all(axis=2).any(axis=1).all()


def test_every_type_but_plain_numbers_has_codes() -> None:
    assert set(BLOCK_FORMATS) == set(KINDS_OF_GGUF) - set(PLAIN_KINDS)
    for kind, each in BLOCK_FORMATS.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert sizes == (each.inputs, each.block_bytes)


@pytest.mark.parametrize("kind", [kind for kind in BYTE_FORMATS if kind not in KINDS])
def test_types_that_the_package_decodes(kind: str) -> None:
    size = BYTE_FORMATS[kind].block_bytes
    raw = np.random.default_rng(8).integers(0, 120, (3, 2 * size), dtype=np.uint8)
    expected = decoded(raw, kind)
    largest = np.abs(expected).reshape(3, -1, 32).max(axis=2)
    differences = np.abs(as_codes(raw, kind) - expected).reshape(3, -1, 32).max(axis=2)
    usable = np.isfinite(largest) & (largest > 1e-2) & (largest < 1e6)
    assert usable.mean() > 0.5
    assert (differences[usable] <= largest[usable] / 254 * 1.1).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [kind for kind in ROUNDED if kind != "TQ1_0"])
def test_damaged_blocks_show_in_their_scales(kind: str, number: float) -> None:
    raw = encode_blocks(np.random.default_rng(9).standard_normal((1, 512)), kind, seed=0)
    first = {**SCALES, "Q5_1": (0, 2), "TQ2_0": (64, 66)}[kind][0]
    raw[0, first : first + 2] = np.array([number], np.float16).view(np.uint8)
    inputs = BLOCK_FORMATS[kind].inputs
    scales = convert_blocks(raw, BLOCK_FORMATS[kind]).scales
    assert not np.isfinite(scales[0, : inputs // 32]).all()
    assert np.isfinite(scales[0, inputs // 32 :]).all()


PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "halves in runs of another length": ("Q4_K", {"run": 16}),
    "the scales of another block": (
        "IQ4_XS",
        {"read_groups": lambda blocks: gguf_nibbles._read_iq4_xs(np.roll(blocks, 1, axis=0))},
    ),
    "the minimum before the scale": (
        "Q4_1",
        {"read_groups": lambda blocks: gguf_nibbles._read_q4_1(blocks[:, [2, 3, 0, 1]])},
    ),
    "scales without their upper bits": (
        "Q4_K",
        {"read_groups": lambda blocks: gguf_nibbles.read_q4_k(blocks & np.uint8(63))},
    ),
    "fifth bits of the neighbours": (
        "Q5_0",
        {"read": lambda blocks: gguf_bytes._read_q5_0(blocks[:, [0, 1, 3, 2, *range(4, 22)]])},
    ),
    "no minimum": (
        "Q5_1",
        {"read": lambda blocks: gguf_bytes._read_q5_1(blocks)._replace(offsets=None)},
    ),
    "a scale for the other 16": (
        "Q6_K",
        {"read": lambda blocks: with_scales_swapped(gguf_bytes._read_q6_k(blocks))},
    ),
    "third bits of the other half": (
        "Q3_K",
        {"read": lambda b: gguf_bytes._read_q3_k(np.concatenate((b[:, :32] >> 4, b[:, 32:]), 1))},
    ),
    "scales and minima swapped": (
        "Q2_K",
        {"read": lambda b: gguf_bytes._read_q2_k(np.concatenate((b[:, :16] >> 4, b[:, 16:]), 1))},
    ),
    "fifth bits in another order": (
        "Q5_K",
        {"read": lambda b: gguf_bytes._read_q5_k(np.concatenate((b[:, :16], b[:, :15:-1]), 1))},
    ),
    "codes without their sign": (
        "Q8_0",
        {"read": lambda blocks: gguf_bytes._read_q8_0(blocks & np.uint8(127))},
    ),
    "other levels": ("IQ4_NL", {"format": BLOCK_FORMATS["Q4_0"].format}),
}


def with_scales_swapped(numbers: gguf_bytes.Numbers) -> gguf_bytes.Numbers:
    swapped = numbers.steps.reshape(len(numbers.steps), -1, 2)[:, :, ::-1]
    return numbers._replace(steps=swapped.reshape(numbers.steps.shape))


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = PLANTED[error]
    wrong = replace(BLOCK_FORMATS[kind], native="", **changes)
    monkeypatch.setitem(globals(), "BLOCK_FORMATS", {**BLOCK_FORMATS, kind: wrong})
    raw = encode_blocks(np.random.default_rng(5).standard_normal((9, 512)), kind, seed=1)
    expected = decoded(raw, kind)
    allowed = steps_of(raw, kind) / 16 if kind in WITHIN else np.zeros_like(expected)
    if kind in ROUNDED:
        largest = np.abs(expected).reshape(9, -1, 32).max(axis=2)
        allowed = np.repeat(largest * 2 * ROUNDED[kind], 32, axis=1)
    assert np.mean(np.abs(as_codes(raw, kind) - expected) > allowed) > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encode_blocks(np.random.default_rng(6).standard_normal((13, 768)), kind, seed=2)
    source = BLOCK_FORMATS[kind]
    whole = convert_blocks(raw, source)
    monkeypatch.setattr(gguf_blocks, "_CHUNK", 1000)
    monkeypatch.setattr(gguf_blocks, "_SHARE", 1500)
    with ThreadPoolExecutor(3) as pool:
        for some in (None, pool):
            for ours, theirs in zip(convert_blocks(raw, source, some), whole, strict=True):
                assert ours is theirs or np.array_equal(ours, theirs)


NATIVE = [kind for kind, each in BLOCK_FORMATS.items() if each.native]


@pytest.mark.parametrize("kind", NATIVE)
def test_the_native_core_gives_the_bits_of_the_definition(kind: str) -> None:
    """Blocks as encoders make them, any bytes, and numbers that are none in the place of scales."""
    source = BLOCK_FORMATS[kind]
    rng = np.random.default_rng(12)
    whole = encode_blocks(rng.standard_normal((40, 1024)) + 0.1, kind, seed=3)
    blocks = [whole.reshape(-1, source.block_bytes)]
    for last in (256, 40, 4):  # small bytes: groups whose numbers all have one sign, or are equal
        some = rng.integers(0, last, (700, source.block_bytes), dtype=np.uint8)
        for first in range(*SCALES.get(kind, (0, 2)), 2):
            tiny = rng.choice([0, -0.0, 1e-7, 0.01, 3, 6e4, np.nan, np.inf, -np.inf], 700)
            halves = np.where(rng.random(700) < 0.5, tiny, rng.standard_normal(700) * 0.02)
            some[:, [first, first + 1]] = halves.astype("<f2")[:, None].view(np.uint8)
        blocks.append(some)
    every = np.concatenate(blocks)
    native = convert_blocks(every, source)
    with np.errstate(all="ignore"):
        expected = source.convert(every)
    for ours, theirs in zip(native, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert len(np.unique(theirs)) > 15
            assert np.array_equal(ours, theirs, equal_nan=theirs.dtype != np.int8)
    changed = every.copy()
    changed[:, 12] ^= 1  # a code, or what a code is multiplied by
    assert not np.array_equal(convert_blocks(changed, source).codes, native.codes)


def test_what_the_native_core_does_not_convert_is_refused() -> None:
    def convert(kind: str, *widths: int, zeros: int | None = None) -> None:
        """Two blocks of so many bytes, to arrays of so many."""
        arrays = (np.zeros((2, width), np.uint8) for width in widths)
        of_groups = None if zeros is None else np.zeros((2, zeros), np.float32)
        _native.convert_gguf_blocks(kind, *arrays, of_groups)

    convert("Q4_K", 144, 128, 32, zeros=8)
    with pytest.raises(ValueError, match='kind is "Q2_K"; expected Q4_0, Q8_0, Q4_K, Q5_K or Q6_K'):
        convert("Q2_K", 84, 256, 32)
    with pytest.raises(ValueError, match=r"blocks is \(2, 143\); expected \(2, 144\) of Q4_K"):
        convert("Q4_K", 143, 128, 32, zeros=8)
    with pytest.raises(ValueError, match=r"codes is \(2, 64\); expected \(2, 128\)"):
        convert("Q4_K", 144, 64, 32, zeros=8)
    with pytest.raises(ValueError, match=r"scales is \(2, 16\); expected \(2, 32\)"):
        convert("Q4_K", 144, 128, 16, zeros=8)
    with pytest.raises(ValueError, match=r"zeros is \(2, 7\); expected \(2, 8\)"):
        convert("Q4_K", 144, 128, 32, zeros=7)
    for kind, *widths, zeros in (("Q4_K", 144, 128, 32, None), ("Q8_0", 34, 32, 2, 1)):
        with pytest.raises(ValueError, match="zeros go with Q4_K"):
            convert(kind, *widths, zeros=zeros)


def q4_1_block(step: float, offset: float, codes: np.ndarray) -> np.ndarray:
    """One block as a row. codes: 32."""
    numbers = np.array([step, offset], np.float16).view(np.uint8)
    codes = codes.astype(np.uint8)
    return np.concatenate([numbers, codes[:16] | codes[16:] << 4])[None]


@pytest.mark.parametrize(
    ("step", "offset", "bound"),
    [
        (0.25, 0.0, 0.0),  # no offset
        (0.25, -2.0, 0.0),  # whole steps
        (0.25, -2.0625, 0.0),  # and a quarter of one
        (0.25, -3.75, 0.0),  # the last number is 0
        (0.25, 0.004, 0.02),  # nearly 0: within a 32nd
        (0.25, 1.0, 0.25 * 19 / 15 * 0.54),  # all above 0, and rounded again
        (0.25, -9.0, 0.25 * 36 / 15 * 0.54),  # all below 0
        (-0.25, 2.0, 0.0),  # a step below 0
        (-0.25, -1.0, 0.25 * 19 / 15 * 0.54),
        (0.0, 0.0, 0.0),  # all the same
        (0.0, 0.7, 0.0),
        (0.0, -123.5, 0.0),
        (6e-8, 60000.0, 60000 / 15 * 0.54),  # as far as float16 goes
    ],
)
def test_offsets_of_every_kind(step: float, offset: float, bound: float) -> None:
    codes = np.random.default_rng(7).permutation(32) % 16
    raw = q4_1_block(step, offset, codes)
    expected = decoded(raw, "Q4_1")
    assert np.abs(as_codes(raw, "Q4_1") - expected).max() <= bound * 1.0001
    zeros = convert_blocks(raw, BLOCK_FORMATS["Q4_1"]).zeros
    assert zeros is not None and zeros == np.rint(zeros) and abs(zeros) <= 120


@pytest.mark.parametrize("step", [np.nan, np.inf, -np.inf, 0.0, 0.5])
@pytest.mark.parametrize("offset", [np.nan, np.inf, -np.inf, 0.5])
def test_damaged_blocks_give_valid_zero_points(step: float, offset: float) -> None:
    """A NaN or an infinity shows in the scale, of which loading warns; codes cannot hold it."""
    raw = q4_1_block(step, offset, np.arange(32) % 16)
    _, scales, zeros = convert_blocks(raw, BLOCK_FORMATS["Q4_1"])
    assert zeros is not None and zeros == np.rint(zeros) and abs(zeros) <= 120
    assert np.isfinite(scales) == (np.isfinite(step) and np.isfinite(offset))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_as_codes(kind: str, tied: bool, tmp_path: Path) -> None:
    """Every matrix, with the rows of q and k in Hugging Face's order; embedding and head too."""
    path = tmp_path / "tiny.gguf"
    config = gguf_config(tie_word_embeddings=tied, num_key_value_heads=1, num_hidden_layers=3)
    write_gguf(path, config, weights=random_weights(config, 8), kind=kind)
    files, floats = read_model(path), read_model(path, "f32")
    checkpoint, exact = open_checkpoint(files), open_checkpoint(floats)
    matrices = {name for name, info in exact.infos.items() if len(info.shape) == 2}
    assert {name.removesuffix(".weight") for name in matrices} == set(checkpoint.formats)
    assert checkpoint.num_parameters == exact.num_parameters
    assert checkpoint.dtype == open_checkpoint(read_model(path, "auto")).dtype == "bf16"
    assert files.config == {**floats.config, "torch_dtype": "bfloat16"}
    for name in exact:
        values, expected = dequantized(checkpoint, name), exact[name].to_float32()
        if kind in EXACT or name not in matrices:
            assert same_bits(values, expected), name
        elif kind in WITHIN:
            steps = np.ptp(expected.reshape(len(expected), -1, 32), axis=2).max() / 15
            assert 0 < np.abs(values - expected).max() <= steps / 32 * 1.1, name
        else:
            largest = np.abs(expected).reshape(len(expected), -1, 32).max(axis=2)
            differences = np.abs(values - expected).reshape(len(expected), -1, 32).max(axis=2)
            assert (differences <= largest * ROUNDED[kind]).all(), name
    runs = list(checkpoint.runs("layers.1.q.weight"))
    assert [run.dtype for run in runs] == [BLOCK_FORMATS[kind].format.dtype]
    np.testing.assert_array_equal(runs[0].data, checkpoint["layers.1.q.weight"].data)


def test_codes_in_another_order_of_rows_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: scales stay in the file's order while codes move."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind="Q4_0")
    expected = open_checkpoint(read_model(path, "f32"))["layers.0.q.weight"].data
    checkpoint = open_checkpoint(read_model(path))
    assert same_bits(dequantized(checkpoint, "layers.0.q.weight"), expected)
    source = checkpoint.places["layers.0.q.scale"]
    monkeypatch.setitem(checkpoint.places, "layers.0.q.scale", replace(source, transform="plain"))
    assert not np.allclose(dequantized(checkpoint, "layers.0.q.weight"), expected)


def test_parts_hold_codes_as_one_file_does(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", kind="Q4_K")
    write_gguf(tmp_path / "tiny.gguf", kind="Q4_K", tensors_per_part=5)
    parts = sorted(tmp_path.glob("tiny-*"))
    assert len(parts) == 5
    whole = open_checkpoint(read_model(tmp_path / "whole.gguf"))
    split = open_checkpoint(read_model(parts[3]))
    assert dict(split.infos) == dict(whole.infos) and split.formats == whole.formats
    for name, tensor in whole.items():
        np.testing.assert_array_equal(split[name].data, tensor.data, err_msg=name)


@pytest.mark.parametrize(("kind", "code_bytes"), [("Q4_K", 0.5), ("Q8_0", 1), ("Q6_K", 1)])
def test_no_floats_are_made(
    kind: str, code_bytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor, where a weight is read in runs, all of its codes; its scales are kept for afterwards."""
    monkeypatch.setattr(gguf_codes, "usable_cores", lambda: 1)  # each has scratch memory
    monkeypatch.setattr(gguf_codes, "_RUN", 1 << 20)  # two runs are held at a time
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_config(vocab_size=30_000, num_hidden_layers=1), kind=kind)
    checkpoint = open_checkpoint(read_model(path))
    assert checkpoint["layers.0.up.weight"].shape[0] == 512  # what is imported late
    num_bytes = 30_000 * 256
    scales = 5 * num_bytes / 32
    with memory_below(code_bytes * num_bytes + 2 * scales + 5_000_000):
        codes = checkpoint["embed.weight"]
    assert codes.data.nbytes == code_bytes * num_bytes
    expected = codes.data, checkpoint["embed.scale"].data
    checkpoint = open_checkpoint(read_model(path))
    whole = np.empty_like(codes.data)
    with memory_below(scales + 7_000_000):
        row = 0
        for run in checkpoint.runs("embed.weight"):
            whole[row : row + len(run.data)] = run.data
            row += len(run.data)
        monkeypatch.setattr(gguf_codes, "convert_blocks", None)  # scales are known
        found = checkpoint["embed.scale"].data
    assert row == 30_000
    np.testing.assert_array_equal(whole, expected[0])
    np.testing.assert_array_equal(found, expected[1])


def test_a_scale_that_is_no_number_is_said(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind="Q4_1")
    raw = bytearray(path.read_bytes())
    place = GgufFile(path).tensors["blk.1.ffn_up.weight"].offset
    raw[place : place + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(raw)
    with pytest.warns(NonFiniteWeightsWarning, match=r"blk\.1\.ffn_up\.weight_scale"):
        list(open_checkpoint(read_model(path)).checked_runs())


def mixed_file(path: Path) -> None:
    """Q4_K, but for "down" in Q6_K and the embedding in Q8_0."""
    config = gguf_config(tie_word_embeddings=True)
    write_gguf(path, config, kind="Q4_K", kinds={"down_proj": "Q6_K", "embed_tokens": "Q8_0"})


def test_what_becomes_of_every_type_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mixed.gguf"
    mixed_file(path)
    files = read_model(path)
    checkpoint = open_checkpoint(files)
    # Embedding and head have codes already.
    assert quantize_checkpoint(checkpoint, files.spec, None) is checkpoint
    found = describe_stored(files.spec, checkpoint.stored, checkpoint.formats, "bf16")
    texts = {each.kind: (each.parts, each.running, each.effect) for each in found}
    sizes = {each.kind: (each.stored_bytes, each.bytes) for each in found}
    assert texts == {
        "Q4_K": (
            ("q", "k", "v", "o", "gate", "up"),
            "int4, groups of 32, asymmetric",
            "within a 32nd of a step",
        ),
        "Q6_K": (("down",), "int8, groups of 32", "rounded to 8 bits in groups of 32"),
        "Q8_0": (("embed",), "int8, groups of 32", "the same numbers"),
    }
    count = 2 * 512 * 256
    assert sizes["Q6_K"] == (count // 256 * 210, count // 32 * 34)
