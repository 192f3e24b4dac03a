"""Published checkpoints: octavo's weights beside those of the libraries that write them."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from published_helpers import (
    pack_awq,
    pack_compressed,
    pack_fp8,
    pack_gptq,
    write_published,
)
from quantization_helpers import CONFIG, write_float_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from octavo.models.fields import Fields
from octavo.quantization.apply import dequantized
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.codes import CompressedMatrix
from octavo.weights.compressed_tensors import read_compressed_tensors
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.tensor import float32_to_bf16

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, not of octavo
# Widths that blocks of 128 divide: transformers derives a block's size from the grid of scales.
WIDE = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def opened(path: Path) -> tuple[ModelFiles, Checkpoint]:
    files = read_model(path)
    return files, open_checkpoint(files)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor as uint16."""
    array: np.ndarray = tensor.detach().contiguous().view(torch.uint16).numpy()
    return array


@pytest.mark.parametrize("kind", ["block", "tensor"])
def test_transformers_converts_fp8_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    config = FP8 if kind == "block" else FP8 | {"weight_block_size": None}
    pack = partial(pack_fp8, scales=kind, scale_shape=None if kind == "block" else ())
    write_published(tmp_path, pack, config, config=WIDE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = model.state_dict()
    files, checkpoint = opened(tmp_path)
    assert len(checkpoint.stored) == 14
    for name in checkpoint.stored:
        weight = theirs[files.weight_map[name + ".weight"].tensor]
        assert np.array_equal(checkpoint[name + ".weight"].data, bits(weight)), name


@pytest.mark.parametrize(
    "targets",
    [
        *[("Linear", "re:.*down_proj$"), ("re:.*down_proj$", "Linear"), ("Linear", "Linear")],
        *[("re:.*", "model.layers.0.mlp.down_proj"), ("model.layers.0.mlp.down_proj", "Linear")],
        *[("re:.*mlp.*", "re:.*down_proj$"), ("re:.*down_proj$", "re:.*mlp.*")],
    ],
)
def test_compressed_tensors_chooses_the_same_of_groups_that_overlap(targets: Any) -> None:
    pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed (it needs Python 3.11)"
    )
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {
        f"group_{bits}": {"targets": [target], "weights": {"num_bits": bits, **weights}}
        for bits, target in zip((4, 8), targets, strict=True)
    }
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": []}
    config |= {"quantization_status": "compressed", "config_groups": groups}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 67}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    name = "model.layers.0.mlp.down_proj"
    theirs = model.get_submodule(name).quantization_scheme
    ours = read_compressed_tensors(Fields(config, "config.json"))(name, (64, 128))
    assert isinstance(ours, CompressedMatrix) and ours.bits == theirs.weights.num_bits


SCHEMES: dict[str, Any] = {
    "fp8-tensor": ({"strategy": "tensor"}, partial(pack_fp8, scales="tensor")),
    "fp8-channel": ({"strategy": "channel"}, partial(pack_fp8, scales="channel")),
    "fp8-block": (
        {"strategy": "block", "block_structure": [128, 128]},
        partial(pack_fp8, scales="block"),
    ),
    "int8-groups": (
        {"type": "int", "group_size": 32, "strategy": "group"},
        partial(pack_compressed, group=32, bits=8),
    ),
    "int8-zeros": (
        {"type": "int", "strategy": "channel", "symmetric": False},
        partial(pack_compressed, bits=8, zeros="packed"),
    ),
    "int4-tensor": (
        {"type": "int", "num_bits": 4, "strategy": "tensor"},
        partial(pack_compressed, per_tensor=True),
    ),
    "int4-channel-zeros": (
        {"type": "int", "num_bits": 4, "strategy": "channel", "symmetric": False},
        partial(pack_compressed, zeros="packed"),
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_decodes_the_same(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed (it needs Python 3.11)"
    )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    fields, pack = SCHEMES[scheme]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, **fields}
    format = "float-quantized" if weights["type"] == "float" else "pack-quantized"
    if format == "float-quantized":
        pack = partial(pack, name="weight_scale", dtype="BF16")
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    write_published(tmp_path, pack, config, config=WIDE)
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors = load_file(tmp_path / "model.safetensors")
    files, checkpoint = opened(tmp_path)
    for name, matrix in files.quantized.items():
        module = matrix.module + "."
        state = {
            key.removeprefix(module): value
            for key, value in tensors.items()
            if key.startswith(module)
        }
        # In float32: the library multiplies in the type of the scales, octavo in float32.
        state["weight_scale"] = state["weight_scale"].float()
        theirs = compressor.decompress(state, group)["weight"].float().numpy()
        if name not in checkpoint.formats:
            assert np.array_equal(checkpoint[name + ".weight"].data, float32_to_bf16(theirs)), name
        else:
            assert np.array_equal(dequantized(checkpoint, name + ".weight"), theirs), name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_4_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    """What transformers writes, decoded by the library to bfloat16: the same bits.

    Its CPU kernel (0.50.2) begins a block with each row, which is wrong where 64 does not divide
    the width. So the widths are multiples of 64 here; blocks that run on are tested elsewhere.
    FP4 has a code for -0. The library's table, which it writes into the file as quant_map, says +0
    for it, and octavo takes the file's word. The kernel for processors without AVX-512 makes -0.
    """
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: make test-hf installs it"
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    source = write_float_model(tmp_path / "float", **WIDE)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "out")
    files, checkpoint = opened(tmp_path / "out")
    assert len(checkpoint.stored) == 14
    modules = dict(model.named_modules())
    for name, matrix in files.quantized.items():
        weight = modules[matrix.module].weight
        theirs = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert theirs.dtype == torch.bfloat16
        # Both zeros as +0, which adding 0 makes of -0 and leaves all else as it is.
        assert np.array_equal(checkpoint[name + ".weight"].data, bits(theirs + 0.0)), name
    assert files.config["quantization_config"]["bnb_4bit_quant_type"] == kind


def test_bitsandbytes_of_8_bits(tmp_path: Path) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: make test-hf installs it"
    )
    source = write_float_model(tmp_path / "float")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "out")
    files, checkpoint = opened(tmp_path / "out")
    modules = dict(model.named_modules())
    assert len(checkpoint.formats) == 14
    for name, matrix in files.quantized.items():
        module = modules[matrix.module]
        largest = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        theirs = functional.int8_vectorwise_dequant(module.weight.data, largest).float().numpy()
        # Their product is (code * largest) * (1 / 127), octavo's code * (largest * (1 / 127)).
        np.testing.assert_allclose(dequantized(checkpoint, name + ".weight"), theirs, rtol=3e-7)


def file_of(package: str, file: str, advice: str) -> ModuleType:
    """One file of an installed package, which itself no longer imports beside new transformers."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs {package}: {advice}")
    path = Path(found.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", [32, -1])
def test_autoawq_decodes_the_same(tmp_path: Path, group: int) -> None:
    packing = file_of("awq", "utils/packing_utils.py", "pip install --no-deps autoawq==0.2.9")
    from safetensors.torch import load_file

    config = {"quant_method": "awq", "group_size": group}
    write_published(tmp_path, partial(pack_awq, group=group), config)
    tensors = load_file(tmp_path / "model.safetensors")
    files, checkpoint = opened(tmp_path)
    for name, matrix in files.quantized.items():
        parts = [tensors[f"{matrix.module}.{part}"] for part in ("qweight", "qzeros", "scales")]
        size = matrix.shape[1] if group == -1 else group
        theirs = packing.dequantize_gemm(*parts[:2], parts[2].float(), 4, size).T.numpy()
        assert np.array_equal(dequantized(checkpoint, name + ".weight"), theirs), name


@pytest.mark.parametrize("order", ["none", "act"])
@pytest.mark.parametrize("bits_of", [4, 8])
def test_autogptq_decodes_the_same(tmp_path: Path, bits_of: int, order: str) -> None:
    """By a product with the identity: its linear layer decodes within."""
    layers = file_of(
        "auto_gptq", "nn_modules/qlinear/qlinear_cuda.py", "pip install --no-deps auto-gptq==0.7.1"
    )
    from safetensors.torch import load_file

    config = {"quant_method": "gptq", "bits": bits_of, "group_size": 32, "sym": False}
    config |= {"desc_act": order == "act"}
    pack = partial(pack_gptq, group=32, bits=bits_of, order=order)
    write_published(tmp_path, pack, config)
    tensors = load_file(tmp_path / "model.safetensors")
    files, checkpoint = opened(tmp_path)
    assert len(checkpoint.formats) == (0 if bits_of == 8 or order == "act" else 14)
    for name, matrix in files.quantized.items():
        outputs, inputs = matrix.shape
        layer = layers.QuantLinear(bits_of, 32, inputs, outputs, bias=False)
        for part in ("qweight", "qzeros", "g_idx"):
            setattr(layer, part, tensors[f"{matrix.module}.{part}"])
        layer.scales = tensors[f"{matrix.module}.scales"].float()
        theirs = layer(torch.eye(inputs)).T.numpy()
        if name not in checkpoint.formats:
            assert np.array_equal(checkpoint[name + ".weight"].data, float32_to_bf16(theirs)), name
        else:
            assert np.array_equal(dequantized(checkpoint, name + ".weight"), theirs), name


def test_octavo_reads_the_configuration_that_transformers_writes(tmp_path: Path) -> None:
    """GPTQConfig and AwqConfig as dictionaries, all their fields included."""
    from transformers import AwqConfig, GPTQConfig

    gptq = GPTQConfig(bits=4, group_size=32, sym=False).to_dict()
    write_published(tmp_path / "gptq", partial(pack_gptq, group=32), json_safe(gptq))
    assert len(opened(tmp_path / "gptq")[1].formats) == 14
    awq = AwqConfig(bits=4, group_size=32).to_dict()
    write_published(tmp_path / "awq", partial(pack_awq, group=32), json_safe(awq))
    assert len(opened(tmp_path / "awq")[1].formats) == 14


def json_safe(values: dict[str, Any]) -> dict[str, Any]:
    """As a file has it: enumerations as their values."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found
