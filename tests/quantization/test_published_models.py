"""Published checkpoints end to end: native against the reference, and what the user is told."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ops_helpers import one_isa_of_each
from published_helpers import (
    Packed,
    Published,
    pack_awq,
    pack_eight_bit,
    pack_four_bit,
    pack_fp8,
    pack_gptq,
    write_published,
)
from quantization_helpers import CONFIG
from weights_helpers import write_model

from octavo import _native
from octavo.cli.app import run
from octavo.config import EngineConfig, Environment
from octavo.diff.comparison import DiffOptions
from octavo.diff.native import NativeImplementation
from octavo.diff.setup import DiffRequest, compare
from octavo.errors import InvalidArgumentError
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.runtime.loader import load_runtime
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
CODES: dict[str, Any] = {
    "awq": (partial(pack_awq, group=32), {"quant_method": "awq", "group_size": 32}),
    "gptq": (partial(pack_gptq, group=32), GPTQ),
    "gptq-row": (partial(pack_gptq, group=-1, middle=True), GPTQ | {"group_size": -1}),
    "int8": (pack_eight_bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
CONVERTED: dict[str, Any] = {
    "act-order": (partial(pack_gptq, group=32, order="act"), GPTQ | {"desc_act": True}),
    "fp8": (pack_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "nf4": (
        partial(pack_four_bit, nested=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}
BOTH = CODES | CONVERTED
PROMPT = [3, 30, 7, 7, 21, 66, 1]
ENVIRONMENT = Environment(home=Path("/nowhere"), num_threads=1, isa="auto")


def quiet(*_: Any) -> None:
    """Progress that nobody looks at."""


def logits_of(path: Path, **options: Any) -> np.ndarray:
    files = read_model(path)
    config = EngineConfig(max_model_len=64, max_num_seqs=1, num_threads=1, **options)
    loaded = load_runtime(files, open_checkpoint(files), config, environment=ENVIRONMENT)
    return NativeImplementation(loaded).feed(np.array(PROMPT, np.int32)).logits


def write(path: Path, name: str) -> Published:
    pack, config = BOTH[name]
    return write_published(path, pack, config)


@pytest.mark.parametrize("isa", one_isa_of_each())
@pytest.mark.parametrize("name", BOTH)
def test_diff_finds_nothing(
    tmp_path: Path, name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_ISA", isa)
    write(tmp_path, name)
    request = DiffRequest(str(tmp_path), random=23, num_threads=1, options=DiffOptions(steps=3))
    result = compare(request, ENVIRONMENT, quiet)
    assert result.ok, (result.first_bad, result.findings)


@pytest.mark.parametrize("name", BOTH)
def test_the_model_is_the_one_that_the_weights_say(tmp_path: Path, name: str) -> None:
    """Logits near those of the same weights as a float model; on every device."""
    published = write(tmp_path / name, name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    del config["quantization_config"]
    write_model(tmp_path / "float", config, weights=published.weights, dtype="F32")
    expected = logits_of(tmp_path / "float", dtype="f32")
    for device in _native.available_devices():
        logits = logits_of(tmp_path / name, device=device, keep_embedding=True)
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        assert error < 0.02, device  # activations of 16 bits, weights of bf16
        assert len(PROMPT) == len(logits)


@pytest.mark.parametrize("name", ["gptq", "act-order"])
def test_experts_run(tmp_path: Path, name: str) -> None:
    """Some of them symmetric, some not; the core multiplies the experts of a layer together."""
    changes = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    mixtral = CONFIG | changes | {"num_local_experts": 4, "num_experts_per_tok": 2}
    pack, config = BOTH[name]

    def some(generator: np.random.Generator, shape: tuple[int, int]) -> Packed:
        return pack(generator, shape, middle=bool(generator.integers(0, 2)))

    plain = ("embed", "lm_head", "moe.gate")
    write_published(tmp_path, some, config, plain=plain, config=mixtral)
    request = DiffRequest(str(tmp_path), random=23, num_threads=1, options=DiffOptions(steps=3))
    result = compare(request, ENVIRONMENT, quiet)
    assert result.ok, (result.first_bad, result.findings)


def notes_of(path: Path, **options: Any) -> str:
    config = EngineConfig(max_model_len=64, max_num_seqs=1, num_threads=1, **options)
    files = read_model(path)
    loaded = load_runtime(files, open_checkpoint(files), config, environment=ENVIRONMENT)
    return "".join(loaded.notes)


@pytest.mark.parametrize("name", CONVERTED)
def test_what_a_conversion_costs_is_said(tmp_path: Path, name: str) -> None:
    text = notes_of(write(tmp_path, name).path, dtype="bf16")
    assert KINDS[name] + " (q, k, v, o, gate, up, down) as bf16, rounded to bf16: " in text
    assert "MiB in the file, 0 MiB in memory, with --quantize int8 0 MiB" in text
    assert "rounded to bf16" in notes_of(tmp_path, dtype="f32")


@pytest.mark.parametrize("name", CODES)
def test_codes_that_cost_nothing_are_no_news(tmp_path: Path, name: str) -> None:
    assert notes_of(write(tmp_path, name).path) == ""


KINDS = {
    "awq": "AWQ, 4 bits, groups of 32",
    "gptq": "GPTQ, 4 bits, groups of 32",
    "gptq-row": "GPTQ, 4 bits, a scale an output",
    "int8": "bitsandbytes LLM.int8()",
    "act-order": "GPTQ, 4 bits, groups of 32, act-order",
    "fp8": "FP8, blocks of 128 x 128",
    "nf4": "bitsandbytes NF4",
}


@pytest.mark.parametrize("name", BOTH)
def test_info_says_what_is_stored_and_what_becomes_of_it(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path, name)
    assert run(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    # Whole rows of 96 and of 160 are two formats of octavo's.
    line, *others = (line for line in text.splitlines() if line.startswith("Stored as"))
    parts = "q, k, v, o, gate, up" + ("" if name == "gptq-row" else ", down")
    assert f"{KINDS[name]} ({parts}) as " in line and len(others) == (name == "gptq-row")
    assert ("as bf16, rounded to bf16" in line) == (name in CONVERTED)
    assert ("the same numbers" in line) == (name in CODES)
    assert KINDS[name] in next(each for each in text.splitlines() if "Weight files" in each)


def test_a_converted_checkpoint_can_be_quantized(tmp_path: Path) -> None:
    """Of FP8, int4 is made as of any other numbers; codes are never rounded again."""
    write(tmp_path / "fp8", "fp8")
    result = quantize_directory(tmp_path / "fp8", tmp_path / "int4", Scheme("int4", method="rtn"))
    files = read_model(tmp_path / "int4")
    assert open_checkpoint(files).formats == result.formats
    assert files.config["quantization_config"]["quant_method"] == "compressed-tensors"
    write(tmp_path / "awq", "awq")
    with pytest.raises(InvalidArgumentError, match="is quantized already"):
        quantize_directory(tmp_path / "awq", tmp_path / "again", Scheme("int8"))
