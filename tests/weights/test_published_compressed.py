"""Directories of compressed-tensors as llm-compressor wrote them over the years."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_helpers import Packed, check, pack_compressed, pack_fp8, write_published
from quantization_helpers import CONFIG

from octavo.errors import WeightsError
from octavo.models.spec import WeightFormat
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model


def scheme(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """A quantization_config with one group; weights: fields of its weights."""
    described = {"num_bits": 4, "type": "int", "symmetric": True, **weights}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": described,
        "input_activations": activations if described["type"] == "float" else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("zeros", ["packed", "bytes"])
@pytest.mark.parametrize("group", [32, -1])
def test_zero_points_packed_or_not(tmp_path: Path, zeros: str, group: int) -> None:
    strategy = {"strategy": "channel"} if group == -1 else {"group_size": group}
    pack = partial(pack_compressed, group=group, zeros=zeros)
    check(write_published(tmp_path, pack, scheme(symmetric=False, **strategy)), False)


def test_one_scale_a_tensor(tmp_path: Path) -> None:
    """Which is what a scheme without strategy and group size means."""
    pack = partial(pack_compressed, per_tensor=True)
    checkpoint = check(write_published(tmp_path / "4", pack, scheme()), False)
    assert checkpoint.formats["layers.0.down"] == WeightFormat("int4", 160)
    pack = partial(pack, bits=8, layout="int-quantized")
    checkpoint = check(
        write_published(tmp_path / "8", pack, scheme("int-quantized", num_bits=8)), False
    )
    assert set(checkpoint.formats.values()) == {WeightFormat("int8")}


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_8_bits_in_groups_run_as_codes(tmp_path: Path, layout: str) -> None:
    pack = partial(pack_compressed, group=32, bits=8, layout=layout)
    config = scheme(layout, num_bits=8, group_size=32)
    checkpoint = check(write_published(tmp_path, pack, config), False)
    assert {(each.dtype, each.group_size) for each in checkpoint.formats.values()} == {("int8", 32)}


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("zeros", ["bytes", "packed"])
def test_8_bits_with_zero_points_are_converted(tmp_path: Path, layout: str, zeros: str) -> None:
    if layout == "int-quantized" and zeros == "packed":
        zeros = "bytes"  # there they are never packed
    pack = partial(pack_compressed, group=32, bits=8, layout=layout, zeros=zeros)
    config = scheme(layout, num_bits=8, group_size=32, symmetric=False)
    check(write_published(tmp_path / "groups", pack, config), True)
    pack = partial(pack_compressed, bits=8, layout=layout, zeros=zeros)
    config = scheme(layout, num_bits=8, strategy="channel", symmetric=False)
    check(write_published(tmp_path / "channel", pack, config), True)


def test_small_groups_are_converted(tmp_path: Path) -> None:
    pack = partial(pack_compressed, group=16)
    check(write_published(tmp_path, pack, scheme(group_size=16)), True)


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_act_order_is_converted(tmp_path: Path, actorder: Any) -> None:
    pack = partial(pack_compressed, group=32, order=True)
    check(write_published(tmp_path, pack, scheme(group_size=32, actorder=actorder)), True)


@pytest.mark.parametrize("nested", [False, True])
def test_the_field_of_early_versions(tmp_path: Path, nested: bool) -> None:
    """compression_config, quant_method sparseml, status frozen; once an object deeper."""
    published = write_published(tmp_path, partial(pack_compressed, group=32), None)
    older = scheme(group_size=32) | {"quant_method": "sparseml", "quantization_status": "frozen"}
    sparsity = {"format": "dense"}
    written = {"sparsity_config": sparsity, "quantization_config": older} if nested else older
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"compression_config": written}))
    check(published, False)
    assert read_model(tmp_path).config["quantization_config"]["config_groups"]


@pytest.mark.parametrize("format", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("tensor", {}),
        ("channel", {"strategy": "channel"}),
        ("block", {"strategy": "block", "block_structure": [128, 128]}),
        ("block", {"strategy": "block", "block_structure": "128x128"}),
    ],
)
def test_fp8(tmp_path: Path, format: str, kind: str, fields: Any) -> None:
    scale = ("BF16", np.full(1, 0x3F00, np.uint16))
    pack = partial(
        pack_fp8, scales=kind, name="weight_scale", dtype="BF16", extra={"input_scale": scale}
    )
    config = scheme(format, num_bits=8, type="float", **fields)
    check(write_published(tmp_path, pack, config), True)


DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("others", "down"),
    [
        (["Linear"], ["re:.*down_proj$"]),
        (["Linear"], DOWN),
        (["re:.*"], DOWN),
        (["re:.*proj$", "Linear"], ["re:.*down_proj$"]),  # patterns go by the alphabet
    ],
)
def test_of_groups_that_overlap_the_nearest_target_counts(
    tmp_path: Path, others: list[str], down: list[str], turned: bool
) -> None:
    def pack(generator: np.random.Generator, shape: tuple[int, int]) -> Packed:
        bits = {"bits": 8} if shape == (96, 160) else {"group": 32}  # down_proj alone has it
        return pack_compressed(generator, shape, **bits)

    config, eight = scheme(group_size=32), scheme(num_bits=8, strategy="channel")
    groups = [
        {**each["config_groups"]["group_0"], "targets": targets}
        for each, targets in ((config, others), (eight, down))
    ]
    named = {f"group_{index}": group for index, group in enumerate(groups[:: -1 if turned else 1])}
    checkpoint = check(write_published(tmp_path, pack, {**config, "config_groups": named}), False)
    assert checkpoint.formats["layers.1.down"] == WeightFormat("int8")
    assert checkpoint.formats["layers.1.up"] == WeightFormat("int4", 32)


def test_ignored_modules_are_plain_numbers(tmp_path: Path) -> None:
    config = scheme(group_size=32) | {"ignore": ["lm_head", "re:.*layers.1.*", "Embedding"]}
    pack = partial(pack_compressed, group=32)
    check(write_published(tmp_path, pack, config, plain=["embed", "lm_head", "layers.1"]), False)
    write_published(tmp_path, pack, config)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        open_checkpoint(read_model(tmp_path))
