"""Every way in which a checkpoint may hold a weight, read from safetensors, GGUF and codes.

The checkpoints are made here by concatenations and plain loops, which share nothing with the code
under test, and are read again by families that are wrong in one place: that must be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from quantization_helpers import write_quantized_model
from runtime_helpers import random_weights, tiny_spec
from weights_helpers import (
    add_tensor,
    check_fused_rows,
    encode,
    memory_below,
    permute_rows,
    write_safetensors,
)

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models import llama
from octavo.models.family import Family, TensorNames, Transform, WeightSource, group_by_tensor
from octavo.models.spec import MoeSpec, NormSpec
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.quantization_config import StoredMatrix, read_quantization
from octavo.weights.reader import whole_tensor
from octavo.weights.safetensors import SafetensorsFile

SPEC = tiny_spec(qkv_bias=True, o_bias=True, mlp_bias=True, norm=NormSpec("layer", bias=True))
WEIGHTS = random_weights(SPEC, seed=3)
NAMES = {
    "wte": "embed",
    "h.{layer}.ln_1": "attn_norm",
    "h.{layer}.attn.q": "q",
    "h.{layer}.attn.kv": "k v",
    "h.{layer}.attn.c_proj": "o",
    "h.{layer}.ln_2": "mlp_norm",
    "h.{layer}.gate_up": "gate up",
    "h.{layer}.down": "down",
    "ln_f": "final_norm",
    "head": "lm_head",
}
TRANSFORMS: dict[str, Transform] = {
    "attn_norm": "plus_one",
    "q": "unpermute",
    "gate": "transpose",
    "up": "transpose",
    "down": "transpose",
}
# A family that is wrong in one place, by what is wrong.
PLANTED: dict[str, tuple[Mapping[str, str], Mapping[str, Transform]]] = {
    "rows of k and v changed": (NAMES | {"h.{layer}.attn.kv": "v k"}, TRANSFORMS),
    "columns of gate and up changed": (NAMES | {"h.{layer}.gate_up": "up gate"}, TRANSFORMS),
    "1 not added": (NAMES, TRANSFORMS | {"attn_norm": "plain"}),
    "1 added once more": (NAMES, TRANSFORMS | {"mlp_norm": "plus_one"}),
    "no transposition": (NAMES, TRANSFORMS | {"down": "plain"}),
    "no permutation": (NAMES, TRANSFORMS | {"q": "plain"}),
    "a permutation too many": (NAMES, TRANSFORMS | {"k": "unpermute"}),
    "a name that is not there": (NAMES | {"h.{layer}.attn.c_proj": "o", "x": "down"}, TRANSFORMS),
}


def stored_tensors() -> dict[str, np.ndarray]:
    """What a checkpoint of this family holds."""
    tensors = {
        theirs + kind: WEIGHTS[ours + kind]
        for ours, theirs in (("embed.", "wte."), ("final_norm.", "ln_f."))
        for kind in ("weight", "bias")
        if ours + kind in WEIGHTS
    }
    for layer in range(2):
        for kind in ("weight", "bias"):
            own = {
                name.split(".")[2]: value
                for name, value in WEIGHTS.items()
                if name.startswith(f"layers.{layer}.") and name.endswith(kind)
            }
            matrix = kind == "weight"
            both = np.concatenate([own["gate"], own["up"]])
            modules = {
                "ln_1": own["attn_norm"] - 1 if matrix else own["attn_norm"],
                "attn.q": permute_rows(own["q"], 6),
                "attn.kv": np.concatenate([own["k"], own["v"]]),
                "attn.c_proj": own["o"],
                "ln_2": own["mlp_norm"],
                "gate_up": both.T if matrix else both,
                "down": own["down"].T if matrix else own["down"],
            }
            tensors |= {f"h.{layer}.{name}.{kind}": value for name, value in modules.items()}
    return tensors


def write_directory(folder: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    encoded = {name: (dtype, encode(value, dtype)) for name, value in tensors.items()}
    write_safetensors(folder / "model.safetensors", encoded)


def open_as(
    folder: Path,
    names: Mapping[str, str] = NAMES,
    transforms: Mapping[str, Transform] = TRANSFORMS,
) -> Checkpoint:
    """The checkpoint of a directory as a family with these names has it."""
    family = Family("Test", "test", lambda _: SPEC, TensorNames(names, transforms))
    return open_checkpoint(ModelFiles(folder, {}, SPEC, family, (), {}))


def wrong_weights(checkpoint: Checkpoint, tolerance: float = 0.0) -> set[str]:
    """Those that are not octavo's; adding and subtracting 1 costs a rounding each."""
    wrong = set()
    for name, expected in WEIGHTS.items():
        found = checkpoint[name]
        assert found.shape == checkpoint.infos[name].shape == expected.shape
        assert (found.dtype, found.data.flags.c_contiguous) == (checkpoint.infos[name].dtype, True)
        slack = max(tolerance, 2e-7 if name.endswith("attn_norm.weight") else 0.0)
        if not np.allclose(found.to_float32(), expected, rtol=tolerance, atol=slack):
            wrong.add(name)
    return wrong


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3)])
def test_every_transform_from_safetensors(dtype: str, tolerance: float, tmp_path: Path) -> None:
    write_directory(tmp_path, stored_tensors(), dtype)
    checkpoint = open_as(tmp_path)
    assert wrong_weights(checkpoint, tolerance) == set()
    plus_one = checkpoint.infos["layers.0.attn_norm.weight"]
    assert (plus_one.dtype, plus_one.num_bytes) == ("f32", 4 * 36)  # 1 + w keeps all its bits
    width = 4 if dtype == "F32" else 2
    assert checkpoint.infos["layers.1.v.weight"].num_bytes == width * 20 * 36
    assert checkpoint.num_parameters == sum(value.size for value in WEIGHTS.values())


@pytest.mark.parametrize("planted", PLANTED)
def test_a_family_that_is_wrong_is_seen(planted: str, tmp_path: Path) -> None:
    write_directory(tmp_path, stored_tensors())
    try:
        assert wrong_weights(open_as(tmp_path, *PLANTED[planted]))
    except WeightsError as error:
        assert planted in ("no transposition", "a name that is not there")
        assert "down" in str(error) or "x.weight" in str(error)


def write_gguf_of(path: Path, tensors: Mapping[str, np.ndarray], kind: str) -> None:
    """Matrices in a format of GGUF, vectors as F32."""
    writer = gguf.GGUFWriter(path, "test")
    for name, value in tensors.items():
        add_tensor(writer, name, value, kind if value.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F32", 0.0), ("BF16", 8e-3), ("Q8_0", 2e-2), ("Q5_0", 0.2)]
)
def test_every_transform_from_gguf(
    kind: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of whole blocks: the width of every stored matrix is filled up to 96 with zeros.
    wide = {
        name: np.pad(value, ((0, 0), (0, 96 - value.shape[1]))) if value.ndim == 2 else value
        for name, value in stored_tensors().items()
    }
    write_gguf_of(tmp_path / "model.gguf", wide, kind)
    sources = TensorNames(NAMES, TRANSFORMS).weight_map(SPEC)
    for dtype in ("auto", "f32"):
        source = GgufParts(tmp_path / "model.gguf", dtype)  # type: ignore[arg-type]
        whole = None
        for rows in (7, 1 << 22):
            monkeypatch.setattr("octavo.weights.gguf._ROWS_AT_ONCE", 96 * rows)
            padded = Checkpoint(
                source,
                {
                    name: replace(wanted, shape=padded_shape(wanted))
                    for name, wanted in sources.items()
                },
            )
            found = {name: padded[name] for name in padded}
            for name, expected in WEIGHTS.items():
                cut = found[name].to_float32()[tuple(slice(size) for size in expected.shape)]
                atol = max(tolerance * np.abs(expected).max(), 2e-7)
                np.testing.assert_allclose(cut, expected, rtol=tolerance, atol=atol, err_msg=name)
            data = {name: tensor.data.tobytes() for name, tensor in found.items()}
            assert whole in (None, data)  # runs of seven rows, or of all of them
            whole = data


def padded_shape(wanted: WeightSource) -> tuple[int, ...]:
    if len(wanted.shape) == 1:
        return wanted.shape
    return wanted.shape if wanted.transform == "transpose" else (wanted.shape[0], 96)


def test_a_big_fused_table_is_read_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.weights.gguf._ROWS_AT_ONCE", 1 << 16)
    table = np.random.default_rng(5).standard_normal((6000, 1024)).astype(np.float32)
    write_gguf_of(tmp_path / "model.gguf", {"kv": table}, "Q8_0")
    source = GgufParts(tmp_path / "model.gguf", "bf16")
    wanted = WeightSource("kv", (5000, 1024), rows=(1000, 6000))
    row = 0
    with memory_below(5e6):  # the rows have 20 MB as float32
        for run in Checkpoint(source, {"k": wanted}).runs("k"):
            expected = source.read_rows("kv", 1000 + row, 1000 + row + len(run.data))
            assert np.array_equal(run.data, expected.data)
            row += len(run.data)
    assert row == 5000


def test_each_expert_has_its_own_tensors(tmp_path: Path) -> None:
    """Fused or apart; never more than one expert's is read at a time."""
    spec = tiny_spec(num_layers=1, moe=MoeSpec(3, 2), intermediate_size=20)
    weights = random_weights(spec, seed=6)
    moe = "h.{layer}.moe"
    names = NAMES | {
        f"{moe}.router": "router",
        f"{moe}.{{expert}}.both": "experts.{expert}.gate experts.{expert}.up",
        f"{moe}.{{expert}}.down": "experts.{expert}.down",
    }
    sources = TensorNames(names, {"experts.{expert}.down": "transpose"}).weight_map(spec)
    tensors = {}
    for expert in range(3):
        own = [weights[f"layers.0.experts.{expert}.{part}.weight"] for part in ("gate", "up")]
        tensors[f"h.0.moe.{expert}.both.weight"] = np.concatenate(own)
        down = weights[f"layers.0.experts.{expert}.down.weight"]
        tensors[f"h.0.moe.{expert}.down.weight"] = np.ascontiguousarray(down.T)
    write_directory(tmp_path, tensors, "F32")
    wanted = {name: source for name, source in sources.items() if ".experts." in name}
    assert {source.tensor for source in wanted.values()} == set(tensors)
    checkpoint = Checkpoint(SafetensorsFile(tmp_path / "model.safetensors"), wanted)
    assert len(checkpoint) == 9
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(tensor.data, weights[name], err_msg=name)


@pytest.mark.parametrize("scheme", ["int8", "int4-asymmetric"])
def test_codes_of_a_fused_matrix(scheme: str, tmp_path: Path) -> None:
    _, target = write_quantized_model(tmp_path, scheme)
    files = read_model(target)
    apart = open_checkpoint(files)
    path = target / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {
        name: (info.dtype.upper(), file.read_array(name)) for name, info in file.infos.items()
    }
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn."
        for ending in ("weight_packed", "weight_scale", "weight_zero_point"):
            if f"{stem}q_proj.{ending}" in tensors:
                three = [tensors.pop(f"{stem}{part}_proj.{ending}") for part in "qkv"]
                joined = np.concatenate([values for _, values in three])
                tensors[f"{stem}qkv_proj.{ending}"] = (three[0][0], joined)
        shapes = [tensors.pop(f"{stem}{part}_proj.weight_shape")[1] for part in "qkv"]
        fused = np.array([sum(shape[0] for shape in shapes), shapes[0][1]], "<i8")
        tensors[f"{stem}qkv_proj.weight_shape"] = ("I64", fused)
    path.unlink()  # which `apart` goes on to read
    write_safetensors(path, tensors)
    names = {
        theirs: ours
        for theirs, ours in llama.FAMILY.tensors.modules.items()
        if ours not in ("q", "k", "v")
    }

    def opened(parts: str) -> Checkpoint:
        fused = {"model.layers.{layer}.self_attn.qkv_proj": parts}
        family = replace(llama.FAMILY, tensors=TensorNames(names | fused))
        stored = quantized_as(files, family)
        return open_checkpoint(replace(files, family=family, quantized=stored))

    together = opened("q k v")
    assert together.infos == apart.infos and together.formats == apart.formats
    for name, tensor in apart.items():
        assert np.array_equal(together[name].data, tensor.data), name
    wrong = opened("q v k")
    for ending in ("weight", "scale"):
        name = f"layers.1.k.{ending}"
        assert not np.array_equal(wrong[name].data, apart[name].data)


def quantized_as(files: ModelFiles, family: Family) -> dict[str, StoredMatrix]:
    return read_quantization(files.config, files.spec, family.tensors)


def test_codes_that_would_have_to_be_transformed_are_refused(tmp_path: Path) -> None:
    files = read_model(write_quantized_model(tmp_path, "int4")[1])
    names = TensorNames(llama.FAMILY.tensors.modules, {"down": "transpose"})
    with pytest.raises(UnsupportedModelError, match=r"config_groups is 'model\.layers\.0\.mlp"):
        quantized_as(files, replace(llama.FAMILY, tensors=names))


def test_what_does_not_fit_is_told_once_by_the_checkpoints_names(tmp_path: Path) -> None:
    tensors = stored_tensors()
    del tensors["h.0.attn.kv.bias"]
    tensors["h.0.gate_up.weight"] = tensors["h.0.gate_up.weight"].T.copy()
    tensors["h.1.attn.kv.weight"] = tensors["h.1.attn.kv.weight"][:-1]
    tensors["h.1.attn.k.weight"] = tensors["h.1.attn.kv.weight"]
    write_directory(tmp_path, tensors)
    with pytest.raises(WeightsError) as caught:
        open_as(tmp_path)
    assert caught.value.problems == (
        "h.0.attn.kv.bias is missing; expected shape (40,)",
        "h.0.gate_up.weight has shape (88, 36); expected (36, 88)",
        "h.1.attn.kv.weight has shape (39, 36); expected (40, 36)",
        "h.1.attn.k.weight (shape (39, 36)) is left over: the configuration has no place for it",
    )


def test_a_tensor_is_made_of_its_weights_again(tmp_path: Path) -> None:
    """Fused, transposed, and stored as a difference from 1; whole as they were."""
    tensors = stored_tensors()
    write_directory(tmp_path, tensors)
    checkpoint, weight_map = open_as(tmp_path), TensorNames(NAMES, TRANSFORMS).weight_map(SPEC)
    kinds = {weight_map[name].transform for name in weight_map}
    assert {"plain", "plus_one", "transpose"} <= kinds
    groups = group_by_tensor(weight_map)
    assert groups.keys() == tensors.keys() and max(map(len, groups.values())) > 1
    for tensor, names in groups.items():
        if weight_map[names[0]].transform == "unpermute":
            continue  # of GGUF files, which octavo does not write
        parts = [(weight_map[name], checkpoint[name].to_float32()) for name in names]
        np.testing.assert_allclose(whole_tensor(parts), tensors[tensor], atol=2e-7, err_msg=tensor)


def test_every_row_of_a_fused_tensor_is_a_weights() -> None:
    check_fused_rows(TensorNames(NAMES, TRANSFORMS), SPEC)
