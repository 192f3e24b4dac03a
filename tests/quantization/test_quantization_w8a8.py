"""W8A8 directories: int8 weights and activations of 8 bits, as llm-compressor writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_helpers import write_float_model
from runtime_helpers import logits_of as step_logits
from runtime_helpers import make_batch

from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError, UnsupportedModelError
from octavo.quantization.apply import quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.runtime.loader import load_runtime
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

TOKENS = [5, 17, 58, 3, 41, 9, 60]


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    source = write_float_model(tmp_path / "float")
    for name in ("int8", "w8a8"):
        quantize_directory(source, tmp_path / name, Scheme(name))
    return {"float": source, **{name: tmp_path / name for name in ("int8", "w8a8")}}


def logits(files: ModelFiles, checkpoint: Checkpoint, quantize: Any = None) -> np.ndarray:
    config = EngineConfig(quantize=quantize, max_model_len=32, max_num_seqs=1, num_kv_blocks=2)
    runtime = load_runtime(files, checkpoint, config).runtime
    return step_logits(runtime, make_batch([(TOKENS, 0, [1])], range(len(TOKENS))))


def logits_of(path: Path, quantize: Any = None) -> np.ndarray:
    files = read_model(path)
    return logits(files, open_checkpoint(files), quantize)


def test_a_directory_is_what_quantizing_at_load_gives(directories: dict[str, Path]) -> None:
    expected = logits_of(directories["float"], "w8a8")
    assert (logits_of(directories["w8a8"]) == expected).all()
    # int8 codes may be run so too; otherwise they keep their activations.
    assert (logits_of(directories["int8"], "w8a8") == expected).all()
    assert (logits_of(directories["int8"]) != expected).any()


def test_what_is_written(directories: dict[str, Path]) -> None:
    config = json.loads((directories["w8a8"] / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "int-quantized")
    assert group["input_activations"]["num_bits"] == 8
    assert group["input_activations"]["dynamic"] and group["weights"]["strategy"] == "channel"
    formats = open_checkpoint(read_model(directories["w8a8"])).formats
    assert {format.activation_bits for format in formats.values()} == {8}
    header = (directories["w8a8"] / "model.safetensors").read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert entries["model.layers.1.mlp.down_proj.weight"]["dtype"] == "I8"


def test_w8a8_of_four_bits_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    quantize_directory(directories["float"], tmp_path / "four", Scheme("int4"))
    files = read_model(tmp_path / "four")
    with pytest.raises(InvalidArgumentError, match="quantized already"):
        quantize_checkpoint(open_checkpoint(files), files.spec, Scheme("w8a8"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_bits", 4, "num_bits is 4"),
        ("type", "float", "type is 'float'"),
        ("symmetric", False, "symmetric is False"),
        ("dynamic", False, "dynamic is False; supported: true"),
        ("strategy", "tensor", "strategy is 'tensor'; supported: 'token'"),
    ],
)
def test_other_activations_are_refused_by_name(
    directories: dict[str, Path], field: str, value: Any, message: str
) -> None:
    path = directories["w8a8"] / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"input_activations: {message}"):
        read_model(directories["w8a8"])
