"""Which part of which weight a rank has: the parts of all ranks give the whole, in every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantization_helpers import (
    FAMILIES,
    SCHEMES,
    write_family_model,
    write_float_model,
)
from runtime_helpers import random_weights, tiny_spec
from weights_helpers import write_gguf

from octavo.errors import InvalidArgumentError
from octavo.models.family import WeightSource
from octavo.models.layer import weight_shapes
from octavo.models.shards import Shard, shard_spec, shards
from octavo.models.spec import ModelSpec, MoeSpec
from octavo.quantization.apply import dequantized, quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.reference.quantization import round_to_int8
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.model_files import read_model
from octavo.weights.shards import shard_checkpoint
from octavo.weights.tensor import Tensor, TensorInfo, TensorSource

SIZES = (2, 3, 4, 8)  # numbers of ranks that are tried
# 8 heads and 192 numbers, of which 2 and 3 ranks (heads: 2) have whole groups of 32.
DIVISIBLE: dict[str, Any] = {"num_attention_heads": 8, "intermediate_size": 192, "vocab_size": 68}


class Arrays(TensorSource):
    """Float32 arrays by octavo's names."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.infos = {
            name: TensorInfo("f32", values.shape, values.nbytes) for name, values in arrays.items()
        }

    def read(self, name: str) -> Tensor:
        return Tensor(self._arrays[name], "f32")


def part_of(checkpoint: Checkpoint, spec: ModelSpec, rank: int, size: int) -> Checkpoint:
    part = shard_spec(spec, rank, size)
    found = shard_checkpoint(checkpoint, shards(spec, part, rank, size))
    weights = [name for name in found if not name.endswith((".scale", ".zero"))]
    assert sorted(weights) == sorted(weight_shapes(part))
    for name, shape in weight_shapes(part).items():
        assert found.infos[name].shape == shape
    return found


def expected(
    spec: ModelSpec, weights: Mapping[str, np.ndarray], rank: int, size: int
) -> dict[str, np.ndarray]:
    """A rank's weights, by what they are for: which heads and which numbers are the rank's."""

    def rows(values: np.ndarray, which: list[int], each: int) -> np.ndarray:
        return np.concatenate([values[i * each : (i + 1) * each] for i in which])

    found = dict(weights)
    for index, layer in enumerate(spec.layers):
        heads = [h for h in range(layer.num_heads) if h * size // layer.num_heads == rank]
        group = layer.num_heads // layer.num_kv_heads
        kv_heads = sorted({head // group for head in heads})
        width = range(layer.intermediate_size)
        middle = [i for i in width if i * size // layer.intermediate_size == rank]
        for name, values in weights.items():
            if not name.startswith(f"layers.{index}."):
                continue
            part, kind = name.split(".")[-2:]
            if part == "q":
                found[name] = rows(values, heads, layer.head_dim)
            elif part in ("k", "v"):
                found[name] = rows(values, kv_heads, layer.head_dim)
            elif part in ("gate", "up"):
                found[name] = rows(values, middle, 1)
            elif part == "o" and kind == "weight":
                found[name] = rows(values.T, heads, layer.head_dim).T
            elif part == "down" and kind == "weight":
                found[name] = rows(values.T, middle, 1).T
    if spec.vocab_size % size == 0:
        head = weights["embed.weight" if spec.tie_word_embeddings else "lm_head.weight"]
        tokens = [i for i in range(spec.vocab_size) if i * size // spec.vocab_size == rank]
        found["lm_head.weight"] = rows(head, tokens, 1)
    return found


def differences(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> list[str]:
    assert sorted(found) == sorted(wanted)
    return [
        name
        for name, values in wanted.items()
        if found[name].shape != values.shape or not np.array_equal(found[name], values)
    ]


@st.composite
def divided_models(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    """A model and a number of ranks that it can be divided among."""
    size = draw(st.sampled_from(SIZES))
    kv_heads = draw(
        st.sampled_from([n for n in (1, 2, 3, 4, 6, 8) if n % size == 0 or size % n == 0])
    )
    heads = kv_heads * draw(st.integers(1, 3)) * (1 if kv_heads % size == 0 else size)
    experts = draw(st.sampled_from([None, MoeSpec(3, 2)]))
    biases = st.booleans() if experts is None else st.just(False)
    layer = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 3)),
        "intermediate_size": size * draw(st.integers(1, 5)),
        "gated": experts is not None or draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "o_bias": draw(st.booleans()),
        "mlp_bias": draw(biases),
        "moe": experts,
        "qk_norm": draw(st.sampled_from(["none", "head"])),
    }
    spec = tiny_spec(draw(st.integers(3, 9)), draw(st.integers(1, 2)), **layer)
    vocab = draw(st.integers(2, 40))
    return replace(spec, vocab_size=vocab, tie_word_embeddings=draw(st.booleans())), size


@given(divided_models())
def test_each_rank_has_the_weights_of_its_heads_and_its_numbers(
    case: tuple[ModelSpec, int],
) -> None:
    spec, size = case
    weights = random_weights(spec)
    checkpoint = Checkpoint(Arrays(weights))
    for rank in range(size):
        part = part_of(checkpoint, spec, rank, size)
        found = {name: tensor.to_float32() for name, tensor in part.items()}
        assert not differences(found, expected(spec, weights, rank, size))
        assert part.total_bytes == sum(values.nbytes for values in found.values())


@pytest.mark.parametrize("mistake", ["next rank", "other axis", "two KV heads swapped"])
def test_a_wrong_part_is_noticed(mistake: str) -> None:
    spec = tiny_spec(20, head_dim=10, num_heads=4, num_kv_heads=2)
    weights, size = random_weights(spec), 2
    cuts = shards(spec, shard_spec(spec, 0, size), 0, size)
    if mistake == "next rank":
        name = "layers.1.down.weight"
        cuts[name] = shards(spec, shard_spec(spec, 1, size), 1, size)[name]
    elif mistake == "other axis":  # the matrix is square there
        name = "layers.0.q.weight"
        cuts[name] = cuts[name]._replace(axis=1)
    else:
        name = "layers.0.v.weight"
        cuts[name] = cuts[name]._replace(start=10, stop=20)
    found = shard_checkpoint(Checkpoint(Arrays(weights)), cuts)
    arrays = {key: tensor.to_float32() for key, tensor in found.items()}
    assert differences(arrays, expected(spec, weights, 0, size)) == [name]


def check_parts(checkpoint: Checkpoint, spec: ModelSpec, size: int = 2) -> None:
    """The ranks' weights are those that the whole model computes with, in the same formats."""
    weights = {
        name: dequantized(checkpoint, name)
        for name in checkpoint
        if not name.endswith((".scale", ".zero"))
    }
    assert all(np.isfinite(values).all() and np.ptp(values) > 0 for values in weights.values())
    for rank in range(size):
        part = part_of(checkpoint, spec, rank, size)
        for name, format in checkpoint.formats.items():
            assert part.formats[name] == format
        for name, info in part.infos.items():
            tensor = part[name]
            assert (tensor.dtype, tensor.data.nbytes) == (info.dtype, info.num_bytes), name
            assert tensor.data.flags.c_contiguous
        found = {
            name: dequantized(part, name) for name in weight_shapes(shard_spec(spec, rank, size))
        }
        assert not differences(found, expected(spec, weights, rank, size))


def opened(path: Path, quantize: str | None = None) -> tuple[Checkpoint, ModelSpec]:
    files = read_model(path)
    scheme = None if quantize is None else Scheme(quantize, method="rtn")  # type: ignore[arg-type]
    return quantize_checkpoint(open_checkpoint(files), files.spec, scheme), files.spec


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8", "w8a8", "int4"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_parts_of_floats_and_of_what_is_rounded_at_load(
    tmp_path: Path, dtype: str, quantize: str | None, is_tied: bool
) -> None:
    changes = {**DIVISIBLE, "tie_word_embeddings": is_tied}
    path = write_float_model(tmp_path / "model", dtype, **changes)
    check_parts(*opened(path, quantize))


def test_rounding_a_part_by_itself_is_noticed(tmp_path: Path) -> None:
    """The scale of an output is that of all its inputs, of which a rank has a part."""
    checkpoint, spec = opened(write_float_model(tmp_path / "model", **DIVISIBLE), "int8")
    whole, name = dequantized(checkpoint, "layers.0.down.weight"), "layers.0.down.weight"
    part = part_of(checkpoint, spec, 1, 2)
    columns = checkpoint[name].to_float32()[:, 96:]
    codes, scales = round_to_int8(columns)
    assert np.array_equal(dequantized(part, name), whole[:, 96:])
    assert not np.array_equal(codes * scales, whole[:, 96:])


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "int4-128"])
def test_parts_of_codes(tmp_path: Path, scheme: str) -> None:
    source = write_float_model(tmp_path / "float", **DIVISIBLE)
    quantize_directory(source, tmp_path / "codes", SCHEMES[scheme])
    check_parts(*opened(tmp_path / "codes"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "F16"])
def test_parts_of_a_gguf(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "model.gguf", kind=kind)
    check_parts(*opened(tmp_path / "model.gguf"))


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_fused_turned_and_stacked_tensors(
    tmp_path: Path, family: str, quantize: str | None
) -> None:
    check_parts(*opened(write_family_model(tmp_path / family, family), quantize))


def test_a_shared_kv_head_is_that_of_the_ranks_query_heads() -> None:
    spec = tiny_spec(num_heads=8, num_kv_heads=2, intermediate_size=8)
    parts = [
        shards(spec, shard_spec(spec, rank, 4), rank, 4)["layers.0.k.weight"] for rank in range(4)
    ]
    assert [(part.start, part.stop) for part in parts] == [(0, 10), (0, 10), (10, 20), (10, 20)]


REFUSED = [
    (tiny_spec(num_heads=6, num_kv_heads=6), 4, "6 attention heads", "use 2 or 1"),
    (
        tiny_spec(num_heads=12, num_kv_heads=3, intermediate_size=12),
        4,
        "3 key and value heads",
        "use 3, 6, 12 or 1",
    ),
    (tiny_spec(intermediate_size=45), 2, "45 numbers", "use 1"),
    (tiny_spec(qk_norm="row"), 2, "normalizes the queries of all heads together", "use 1"),
]


@pytest.mark.parametrize(
    ("spec", "size", "what", "advice"), REFUSED, ids=lambda each: str(each)[:9]
)
def test_a_model_that_cannot_be_divided_is_refused(
    spec: ModelSpec, size: int, what: str, advice: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        shard_spec(spec, 0, size)
    text = str(caught.value)
    assert text.startswith(f"tensor_parallel_size is {size}, but the model ")
    assert what in text and text.endswith(f": {advice}")


def test_numbers_of_ranks_that_are_advised_work() -> None:
    spec = tiny_spec(num_heads=12, num_kv_heads=3, intermediate_size=24)
    for size in range(2, 65):
        try:
            shard_spec(spec, size - 1, size)
            is_refused = False
        except InvalidArgumentError as error:
            assert "use 3, 6, 12 or 1" in str(error)
            is_refused = True
        assert is_refused == (size not in (3, 6, 12))


def test_a_group_of_inputs_is_not_cut_in_two(tmp_path: Path) -> None:
    path = write_float_model(tmp_path / "model")  # 96 inputs of o: 48 for a rank, groups of 32
    checkpoint, spec = opened(path, "int4")
    with pytest.raises(InvalidArgumentError) as caught:
        part_of(checkpoint, spec, 0, 2)
    for words in (
        "the inputs of layers.0.o are in groups of 32",
        "48",
        "lower tensor_parallel_size",
    ):
        assert words in str(caught.value)


class FewRows(Arrays):
    """Rows come five at a time; those that are read are noted, and nothing is read whole."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.read_from: set[int] = set()

    def rows_at_once(self, name: str) -> int:
        return 5

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        self.read_from |= set(range(first, last))
        return Tensor(self._arrays[name][first:last], "f32")


@pytest.mark.parametrize("transform", ["plain", "unpermute", "plus_one"])
def test_a_part_of_the_rows_is_read_in_runs_and_nothing_else(transform: Any) -> None:
    values = np.random.default_rng(4).standard_normal((40, 3)).astype(np.float32)
    wanted = WeightSource("t", (32, 3), (8, 40), transform, head_dim=4)  # behind 8 other rows
    whole = Checkpoint(FewRows({"t": values}), {"w": wanted})["w"].data
    source = FewRows({"t": values})
    cut = {"w": Shard("w", 0, 12, 24)}
    part = shard_checkpoint(Checkpoint(source, {"w": wanted}), cut)
    runs = [run.data for run in part.runs("w")]
    assert len(runs) == 3 and not np.array_equal(whole[12:24], whole[11:23])
    np.testing.assert_array_equal(np.concatenate(runs), whole[12:24])
    assert source.read_from == set(range(20, 32))
