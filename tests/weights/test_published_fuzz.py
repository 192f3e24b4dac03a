"""Damaged headers and damaged configurations of each published format.

Each gives a model that can be read, or one of octavo's errors; nothing else, and little memory.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fuzz_weights import COUNT, count_outcomes, mutations
from published_helpers import (
    pack_awq,
    pack_compressed,
    pack_eight_bit,
    pack_four_bit,
    pack_fp8,
    pack_gptq,
    write_published,
)
from weights_helpers import memory_below, tiny_config

from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

SMALL = tiny_config(
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1},
)
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}
ZEROS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}


def compressed(format: str, weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, Any] = {
    "awq": (
        partial(pack_awq, group=32),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    ),
    "gptq": (
        partial(pack_gptq, group=16, order="act"),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
        | {"checkpoint_format": "gptq", "dynamic": {"-:.*lm_head": {}, "+:.*down": {"bits": 4}}},
    ),
    "fp8": (
        partial(pack_fp8, block=(16, 32)),
        {
            "quant_method": "fp8",
            "weight_block_size": [16, 32],
            "modules_to_not_convert": ["lm_head"],
        },
    ),
    "fbgemm": (
        partial(pack_fp8, scales="channel", name="weight_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ),
    "nf4": (
        partial(pack_four_bit, nested=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "int8": (pack_eight_bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "float-quantized": (
        partial(pack_fp8, name="weight_scale", block=(16, 32)),
        compressed("float-quantized", WEIGHTS),
    ),
    "pack-quantized": (
        partial(pack_compressed, group=32, zeros="packed"),
        compressed("pack-quantized", ZEROS),
    ),
}


def load(path: Path) -> None:
    """Every weight of the model whose directory holds `path`."""
    for _, _, tensor in open_checkpoint(read_model(path.parent)).checked_runs():
        assert tensor.data.size


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_headers(tmp_path: Path, name: str) -> None:
    """Damage of the header mostly, and of the data: scales, orders, states."""
    pack, config = FORMATS[name]
    write_published(tmp_path, pack, config, config=SMALL)
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    outcomes = count_outcomes(load, path, mutations(original, header, seed=1))
    assert outcomes["refused"] > 0.6 * COUNT and outcomes["read"] > 0.01 * COUNT, outcomes


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_configurations(tmp_path: Path, name: str) -> None:
    """Damage of the quantization_config alone: the rest has tests of its own."""
    pack, config = FORMATS[name]
    write_published(tmp_path, pack, config, config=SMALL)
    path = tmp_path / "config.json"
    rest = json.dumps(SMALL)[:-1].encode() + b', "quantization_config": '
    original = json.dumps(config).encode()
    damaged = (rest + text + b"}" for text in mutations(original, len(original), seed=2))
    outcomes = count_outcomes(load, path, damaged)
    assert outcomes["refused"] > 0.4 * COUNT and outcomes["read"] > 0.005 * COUNT, outcomes


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        3,
        2**31,
        2**70,
        1.5,
        1e308,
        "",
        "x",
        "-1",
        "re:(",
        "re:.*",
        "gptq",
    ),
    *([], [[]], [None], ["re:("], [3, 4], [[1], "q_proj"], {}, {"a": 1}, {"": {}}, {".*": []}),
    *("pack-quantized", "float", "int", "block", "group", "tensor", "128x", "1x1", [2**40, 1]),
)
FIELDS = (
    *("bits", "w_bit", "group_size", "q_group_size", "format", "version", "checkpoint_format"),
    *("desc_act", "sym", "lm_head", "dynamic", "modules_in_block_to_quantize", "static_groups"),
    *("zero_point", "backend", "pack_dtype", "weight_block_size", "fmt", "activation_scheme"),
    *("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "load_in_4bit"),
    *("load_in_8bit", "bnb_4bit_quant_type", "quant_method", "config_groups", "ignore"),
    *("quantization_status", "kv_cache_scheme", "sparsity_config"),
)


@pytest.mark.parametrize("name", FORMATS)
def test_configurations_with_other_values(tmp_path: Path, name: str) -> None:
    """Whole JSON, with any value in any field: of the object, of its groups, of their weights."""
    pack, config = FORMATS[name]
    write_published(tmp_path, pack, config, config=SMALL)
    generator = random.Random(4)

    def changed() -> bytes:
        made: Any = json.loads(json.dumps(config))
        for _ in range(generator.choice((1, 1, 2, 4))):
            places = [made]
            for group in (
                made.get("config_groups", {}).values()
                if isinstance(made.get("config_groups"), dict)
                else ()
            ):
                if isinstance(group, dict):
                    places.append(group)
                    places += [part for part in group.values() if isinstance(part, dict)]
            place = generator.choice(places)
            own = generator.random() < 0.7 and place
            field = generator.choice(list(place) if own else FIELDS)
            place[field] = generator.choice(VALUES)
        return json.dumps(SMALL | {"quantization_config": made}).encode()

    path = tmp_path / "config.json"
    outcomes = count_outcomes(load, path, (changed() for _ in range(COUNT)))
    assert outcomes["refused"] > 0.2 * COUNT and outcomes["read"] > 0.05 * COUNT, outcomes


@pytest.mark.parametrize("name", ["gptq", "nf4", "pack-quantized"])
def test_mutated_contents(tmp_path: Path, name: str) -> None:
    """The header stays whole; orders, quant_states and shapes in the data are any bytes."""
    pack, config = FORMATS[name]
    write_published(tmp_path, pack, config, config=SMALL)
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    contents = mutations(original[start:], len(original) - start, seed=3)
    whole = (original[:start] + (data + original)[: len(original) - start] for data in contents)
    with memory_below(20 * len(original) + 10_000_000):
        outcomes = count_outcomes(load, path, whole)
    assert sum(outcomes.values()) == COUNT and outcomes["read"] > 0.16 * COUNT, outcomes
