"""Reading safetensors: values, shards, and files that are damaged or hostile."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights_helpers import encode, write_safetensors

from octavo.errors import WeightsError
from octavo.weights.safetensors import ELEMENT_BITS, SafetensorsFile, ShardedSafetensors
from octavo.weights.tensor import Tensor, float32_to_bf16

VALUES = np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32)


def two_tensors() -> dict[str, tuple[str, np.ndarray]]:
    return {"a": ("F32", VALUES), "b": ("BF16", encode(VALUES[:3, 0], "BF16"))}


@pytest.mark.parametrize("pad", range(8))
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_at_every_alignment(dtype: str, pad: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    encoded = encode(VALUES, dtype)
    write_safetensors(path, {"odd": ("U8", np.ones(3, np.uint8)), "w": (dtype, encoded)}, pad=pad)
    tensor = SafetensorsFile(path).read("w")
    assert tensor.shape == (5, 7)
    assert tensor.dtype == dtype.lower()
    assert tensor.data.flags.aligned and tensor.data.flags.c_contiguous
    np.testing.assert_array_equal(tensor.data, encoded)


def test_the_same_values_as_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    arrays = {"w": VALUES, "h": VALUES.astype(np.float16), "scalar": np.array(2.5, np.float32)}
    save_file(arrays, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.infos) == set(arrays)
    for name, expected in arrays.items():
        np.testing.assert_array_equal(file.read(name).data, expected)
        assert file.infos[name].num_bytes == expected.nbytes


def test_data_is_mapped_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for pad in range(4):  # one of them aligns the data, as every writer of today does
        write_safetensors(path, {"w": ("F32", VALUES)}, pad=pad)
        if len(path.read_bytes()) % 4 == 0:
            break
    file = SafetensorsFile(path)
    array = file.read("w").data
    assert not array.flags.writeable
    assert type(array) is np.ndarray
    assert np.shares_memory(array, file.read("w").data)


def test_empty_tensors_and_an_empty_file_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"none": ("F32", np.zeros((0, 4), np.float32)), "w": ("F32", VALUES)})
    assert SafetensorsFile(path).read("none").shape == (0, 4)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert SafetensorsFile(path).infos == {}


def test_other_types_are_described_but_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"q": ("I8", np.arange(6, dtype=np.int8))})
    file = SafetensorsFile(path)
    assert file.infos["q"].dtype == "I8"
    with pytest.raises(WeightsError, match="q is stored as I8; supported: F32, F16, BF16"):
        file.read("q")


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
TWICE += b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "short": (b"\x01\x00\x00", "truncated"),
    "absurd_length": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "long_length": ((10**9).to_bytes(8, "little") + b"{}", "at most"),
    "truncated_header": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "no_json": (with_header(b"pickle!"), "not valid JSON"),
    "not_utf8": (with_header(b'{"\xff": 1}'), "not valid JSON"),
    "deep_json": (with_header(b"[" * 100_000), "not valid JSON"),
    "list": (with_header([1]), "not a JSON object"),
    "twice": (with_header(TWICE, b"x"), "appears twice"),
    "metadata": (with_header({"__metadata__": {"format": 1}}), "__metadata__"),
    "entry_is_text": (with_header({"a": "F32"}), "not an object"),
    "no_shape": (with_header({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "not an object"),
    "unknown_dtype": (with_header(entry(dtype="F33"), b"x" * 8), "F33"),
    "dtype_is_list": (with_header(entry(dtype=["F32"]), b"x" * 8), "not a safetensors type"),
    "negative_shape": (with_header(entry(shape=[-2]), b"x" * 8), "not a list of sizes"),
    "float_shape": (with_header(entry(shape=[2.0]), b"x" * 8), "not a list of sizes"),
    "true_in_shape": (with_header(entry(shape=[True]), b"x" * 8), "not a list of sizes"),
    "huge_shape": (with_header(entry(shape=[2**62] * 60), b"x" * 8), "bytes, not 8"),
    "one_offset": (with_header(entry(data_offsets=[8]), b"x" * 8), "pair of offsets"),
    "backwards": (with_header(entry(data_offsets=[8, 0]), b"x" * 8), "end before they begin"),
    "wrong_size": (with_header(entry(shape=[3]), b"x" * 8), "takes 12 bytes"),
    "truncated_data": (with_header(entry(), b"x" * 7), "holds 7 bytes .* describes 8.*truncated"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    "data_left_over": (with_header(entry(), b"x" * 9), "describes 8"),
    "overlap": (
        with_header(entry() | {"b": entry()["a"] | {"data_offsets": [4, 12]}}, b"x" * 12),
        "overlaps",
    ),
    "gap": (
        with_header(entry() | {"b": entry()["a"] | {"data_offsets": [12, 20]}}, b"x" * 20),
        "gap",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_cause(case: str, tmp_path: Path) -> None:
    content, cause = DAMAGED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=cause) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, two_tensors())
    content = path.read_bytes()
    SafetensorsFile(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            SafetensorsFile(path)


def write_shards(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    write_safetensors(directory / "one.safetensors", {"a": two_tensors()["a"]})
    write_safetensors(directory / "two.safetensors", {"b": two_tensors()["b"]})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    change(index)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_shards_are_one_source(tmp_path: Path) -> None:
    source = ShardedSafetensors(write_shards(tmp_path, lambda index: None))
    assert set(source.infos) == {"a", "b"}
    np.testing.assert_array_equal(source.read("a").data, VALUES)
    rounded = Tensor(float32_to_bf16(VALUES[:3, 0]), "bf16").to_float32()
    np.testing.assert_array_equal(source.read("b").to_float32(), rounded)


@pytest.mark.parametrize(
    ("places", "cause"),
    [
        ({"a": "one.safetensors", "c": "two.safetensors"}, "c should be in two.safetensors"),
        ({"a": "three.safetensors", "b": "four.safetensors"}, "four.safetensors is missing"),
        ({"a": "../one.safetensors"}, "same directory"),
        ({"a": "/etc/passwd.safetensors"}, "same directory"),
        ({"a": "sub/one.safetensors"}, "same directory"),
        ({"a": "sub\\one.safetensors"}, "same directory"),
        ({"a": "one.bin"}, "same directory"),
        ({"a": 3}, "same directory"),
        ({"a": "x" * 5000 + ".safetensors"}, "same directory"),
        ({}, "no weight_map"),
        ([1], "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(places: Any, cause: str, tmp_path: Path) -> None:
    path = write_shards(tmp_path, lambda index: index.update(weight_map=places))
    with pytest.raises(WeightsError, match=cause):
        ShardedSafetensors(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = write_shards(tmp_path, lambda index: None)
    write_safetensors(tmp_path / "two.safetensors", two_tensors())
    with pytest.raises(WeightsError, match="a is in two.safetensors and in another file"):
        ShardedSafetensors(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{" * 100_000])
def test_a_malformed_index_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"index\.json"):
        ShardedSafetensors(path)


def test_the_names_of_types_tell_their_bits() -> None:
    for name, bits in ELEMENT_BITS.items():
        assert name == "BOOL" or bits == int(re.findall("[0-9]+", name)[0])


def test_of_many_problems_ten_are_shown_and_all_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    wrong = {f"t{i}": {"dtype": "F33", "shape": [1], "data_offsets": [0, 1]} for i in range(12)}
    path.write_bytes(with_header(wrong, b"x"))
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(path)
    assert len(caught.value.problems) == 12
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1].endswith("and 2 more")
