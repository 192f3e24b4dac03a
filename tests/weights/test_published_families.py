"""Published formats in families whose checkpoints differ: experts, fused and turned matrices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_helpers import (
    Packed,
    check,
    pack_awq,
    pack_compressed,
    pack_four_bit,
    pack_fp8,
    pack_gptq,
    write_published,
)
from quantization_helpers import CONFIG

from octavo.models.spec import WeightFormat
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

MIXTRAL = CONFIG | {
    **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "sliding_window": None},
}
PHI3 = CONFIG | {
    **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None},
    **{"original_max_position_embeddings": 128, "pad_token_id": 0},
}
GPT2 = {
    **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 67},
    **{"n_embd": 96, "n_head": 6, "n_layer": 2, "n_positions": 64, "eos_token_id": 2},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 32, "symmetric": False},
        }
    },
    "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
}
PLAIN = ("embed", "lm_head", "moe.gate")


@pytest.mark.parametrize(
    ("config", "pack", "converted"),
    [
        (
            {"quant_method": "awq", "group_size": 32, "modules_to_not_convert": ["gate"]},
            *(partial(pack_awq, group=32), False),
        ),
        (GPTQ, partial(pack_gptq, group=32), False),  # the router left out without a word
        (GPTQ | {"desc_act": True}, partial(pack_gptq, group=32, order="act"), True),
        (COMPRESSED, partial(pack_compressed, group=32, zeros="packed"), False),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, pack_fp8, True),
        (BNB, pack_four_bit, True),
    ],
)
def test_experts(tmp_path: Path, config: Any, pack: Any, converted: bool) -> None:
    published = write_published(tmp_path, pack, config, plain=PLAIN, config=MIXTRAL)
    assert len(published.coded) == 2 * (4 + 3 * 4)
    check(published, converted)


def test_experts_of_a_layer_have_one_format(tmp_path: Path) -> None:
    """Though some of them have all their zero points in the middle."""

    def pack(generator: np.random.Generator, shape: tuple[int, int]) -> Packed:
        return pack_gptq(generator, shape, 32, middle=bool(generator.integers(0, 2)))

    checkpoint = check(
        write_published(tmp_path, pack, GPTQ, plain=PLAIN, config=MIXTRAL, seed=1), False
    )
    zeros = {name: format.has_zeros for name, format in checkpoint.formats.items()}
    assert not all(zeros.values())
    assert all(flag for name, flag in zeros.items() if "experts" in name)


@pytest.mark.parametrize(
    ("config", "pack", "converted"),
    [
        ({"quant_method": "awq", "group_size": 32}, partial(pack_awq, group=32), False),
        (GPTQ, partial(pack_gptq, group=32), False),
        (
            {"quant_method": "fp8", "weight_block_size": None},
            *(partial(pack_fp8, scales="tensor", name="weight_scale"), True),
        ),
        (BNB, partial(pack_four_bit, nested=True), True),
    ],
)
def test_fused_matrices(tmp_path: Path, config: Any, pack: Any, converted: bool) -> None:
    """Phi-3's qkv_proj and gate_up_proj: parts of the rows of one matrix."""
    published = write_published(tmp_path, pack, config, config=PHI3)
    assert "model.layers.1.self_attn.qkv_proj.weight" in published.coded
    check(published, converted)
    held = open_checkpoint(read_model(tmp_path)).stored
    fused, whole = held["layers.0.gate"], held["layers.0.down"]
    # Half of twice as much, but for tables and orders that are the same for any height.
    assert 0.9 < fused.num_bytes / whole.num_bytes < 1.1


@pytest.mark.parametrize(
    ("config", "pack", "converted"),
    [(GPTQ, partial(pack_gptq, group=32), False), (BNB, pack_four_bit, True)],
)
def test_turned_matrices(tmp_path: Path, config: Any, pack: Any, converted: bool) -> None:
    """GPT-2's matrices are (inputs, outputs) as numbers; packed they are as any others."""
    plain = ("wte", "wpe", "ln_", "bias")
    checkpoint = check(write_published(tmp_path, pack, config, plain=plain, config=GPT2), converted)
    assert checkpoint.infos["layers.1.up.weight"].shape == (4 * 96, 96)
    if not converted:
        assert checkpoint.formats["layers.0.k"] == WeightFormat("int4", 32, True, scale_dtype="f16")
