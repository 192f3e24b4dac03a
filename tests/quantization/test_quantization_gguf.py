"""GGUF models of every type in the native core, against the reference with the file's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from gguf_blocks_helpers import SCALES
from gguf_families_helpers import CASES, write
from ops_helpers import grouped_activations, one_isa_of_each
from weights_helpers import gguf_config, random_weights, write_gguf

from octavo import _native
from octavo.cli import main
from octavo.config import EngineConfig, Environment
from octavo.diff.native import NativeImplementation
from octavo.errors import InsufficientMemoryError, InvalidArgumentError
from octavo.llm import LLM
from octavo.models.layer import weight_shapes
from octavo.models.rope import at_length
from octavo.models.spec import WeightFormat
from octavo.quantization.apply import dequantized
from octavo.quantization.plan import weight_bytes
from octavo.reference.llama import ReferenceModel
from octavo.runtime.loader import LoadedRuntime, load_runtime
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf_codes import BLOCK_FORMATS
from octavo.weights.model_files import read_model

PROMPT = np.array([3, 30, 7, 7, 21, 66, 1, 5, 12], np.int32)
ENVIRONMENT = Environment(home=Path("/nowhere"), num_threads=1, isa="auto")
CONFIG = gguf_config(intermediate_size=768, num_key_value_heads=1)
KINDS = sorted({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SCALES})


def load(path: Path, **options: Any) -> LoadedRuntime:
    """With one KV group, since one sequence keeps all of its blocks, and ropes for its length."""
    files = read_model(path)
    layers = tuple(replace(layer, kv_group=0) for layer in files.spec.layers)
    spec = at_length(replace(files.spec, layers=layers), len(PROMPT))
    files = replace(files, spec=spec)
    config = EngineConfig(max_model_len=64, max_num_seqs=1, num_threads=1, **options)
    return load_runtime(files, open_checkpoint(files), config, environment=ENVIRONMENT)


def logits_of(loaded: LoadedRuntime) -> np.ndarray:
    return NativeImplementation(loaded).feed(PROMPT).logits


def definition(
    path: Path, formats: Mapping[str, WeightFormat], rounds: str = "whole", as_codes: bool = False
) -> np.ndarray:
    """The reference's logits from the file's numbers.

    formats: of the matrices before which x is rounded. as_codes: from octavo's codes instead.
    """
    files = read_model(path, "codes" if as_codes else "f32")
    spec = at_length(files.spec, len(PROMPT))
    checkpoint = open_checkpoint(files)
    weights = {name: dequantized(checkpoint, name) for name in weight_shapes(files.spec)}
    model = ReferenceModel(spec, weights, formats=formats, grouped_activations=rounds)
    return model.forward(PROMPT)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, as a part of the logits' spread."""
    assert theirs.std() > 0.01
    return float(np.abs(ours - theirs).max() / theirs.std())


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL of `ours` from `theirs`, nats."""
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (theirs, ours))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


# A number of x that is rounded the other way: to whole numbers of 16 bits, or to bf16.
TOLERANCE = {"whole": 1e-3, "bf16": 2e-2}


@pytest.mark.parametrize("isa", one_isa_of_each())
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_numbers_in_the_file(kind: str, isa: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, CONFIG, weights=random_weights(CONFIG, 5), kind=kind)
    loaded, rounds = load(path, isa=isa, dtype="f32"), grouped_activations(isa)
    ours, formats = logits_of(loaded), loaded.options.formats
    assert set(formats.values()) == {BLOCK_FORMATS[kind].format}  # embedding and head, too
    assert difference(ours, definition(path, formats, rounds, as_codes=True)) < TOLERANCE[rounds]
    theirs = definition(path, formats, rounds)
    if not BLOCK_FORMATS[kind].difference:
        assert difference(ours, theirs) < TOLERANCE[rounds]
    else:  # as bf16 weights would be further from them than these codes
        assert divergence(ours, theirs) < 5e-4


# The 46 layers of "27b" matter to the configuration only; errors would add up over them.
@pytest.mark.parametrize("case", [case for case in CASES if "27b" not in case])
def test_every_family_runs_as_codes(case: str, tmp_path: Path) -> None:
    """In whole numbers, against the reference with the numbers that the file stands for."""
    path = tmp_path / "model.gguf"
    write(path, case, "Q4_0", std=0.15)
    isa = next(isa for isa in _native.available_isas() if grouped_activations(isa) == "whole")
    loaded = load(path, isa=isa, dtype="f32")
    formats = loaded.options.formats
    assert {format.dtype for format in formats.values()} == {"int4"}
    assert difference(logits_of(loaded), definition(path, formats)) < TOLERANCE["whole"]


def test_rows_that_keep_the_order_of_the_file_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: the codes of q and k are not put into Hugging Face's order."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, CONFIG, weights=random_weights(CONFIG, 5), kind="Q4_0")
    expected = definition(path, open_checkpoint(read_model(path)).formats, as_codes=True)
    monkeypatch.setattr("octavo.weights.reader.unpermute_rows", lambda values, head_dim: values)
    assert difference(logits_of(load(path, dtype="f32")), expected) > 0.1


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_codes_on_cuda(kind: str, tmp_path: Path) -> None:
    """There x is not rounded in float32."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, CONFIG, weights=random_weights(CONFIG, 5), kind=kind)
    ours = logits_of(load(path, device=DEVICE, dtype="f32"))
    assert difference(ours, definition(path, {}, as_codes=True)) < 1e-4
    if not BLOCK_FORMATS[kind].difference:
        assert difference(ours, definition(path, {})) < 1e-4


@needs_cuda
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_experts_in_groups_on_cuda(kind: str, tmp_path: Path) -> None:
    """By the kernels for 16-bit activations, of few rows of an expert and of many."""
    path = tmp_path / "moe.gguf"
    write(path, "mixtral", kind, std=0.15)
    expected = definition(path, {})
    for repeats in (1, 5):
        loaded = load(path, device=DEVICE, dtype="f16", kv_dtype="f32")
        ours = NativeImplementation(loaded).feed(np.tile(PROMPT, repeats)).logits
        assert difference(ours[: len(PROMPT)], expected) < 2e-2


PEAK = """
import sys
from pathlib import Path
from octavo.llm import LLM

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

llm = LLM(sys.argv[1], max_model_len=64, max_num_seqs=1, num_threads=1)
print(1024 * kilobytes("VmHWM"), 1024 * kilobytes("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_loading_takes_little_more_memory_than_the_codes(kind: str, tmp_path: Path) -> None:
    """Embedding and head, the widest matrices, are 60 MB of codes: one as numbers would show."""
    path = tmp_path / "wide.gguf"
    config = gguf_config(vocab_size=56_000, hidden_size=512, num_hidden_layers=1, head_dim=64)
    write_gguf(path, config | {"num_key_value_heads": 8, "num_attention_heads": 8}, kind=kind)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    peak, held = map(int, done.stdout.split())
    spec = read_model(path).spec
    weights = weight_bytes(spec, open_checkpoint(read_model(path)).formats, "bf16")
    assert weights < held
    assert peak - held < 0.15 * weights


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Q4_K, but for "down" in Q6_K and the embedding in Q8_0."""
    path = tmp_path / "mixed.gguf"
    kinds = {"down_proj": "Q6_K", "embed_tokens": "Q8_0", "lm_head": "Q4_0"}
    write_gguf(path, CONFIG, kind="Q4_K", kinds=kinds)
    return path


def test_loading_says_what_it_changes_and_costs(mixed: Path, tmp_path: Path) -> None:
    (line,) = LLM(mixed, max_model_len=64).notes
    assert line == (
        "mixed.gguf: Q4_K (q, k, v, o, gate, up) as int4, groups of 32, asymmetric, within a 32nd "
        "of a step: 1 MiB in the file, 1 MiB in memory; Q6_K (down) as int8, groups of 32, rounded "
        "to 8 bits in groups of 32: 0 MiB in the file, 0 MiB in memory"
    )
    write_gguf(tmp_path / "plain.gguf", CONFIG, kind="Q4_0")
    assert LLM(tmp_path / "plain.gguf", max_model_len=64).notes == ()


@pytest.fixture
def partly(tmp_path: Path) -> Path:
    """Q6_K, but for "down" and the embedding in F16."""
    path = tmp_path / "partly.gguf"
    write_gguf(path, CONFIG, kind="Q6_K", kinds={"down_proj": "F16", "embed_tokens": "F16"})
    return path


def test_int8_for_what_has_no_codes(partly: Path) -> None:
    formats = load(partly, quantize="int8").options.formats
    assert formats["layers.1.down"] == formats["embed"] == WeightFormat("int8")
    assert formats["layers.1.up"] == formats["lm_head"] == BLOCK_FORMATS["Q6_K"].format
    kept = load(partly, keep_embedding=True)
    assert "embed" not in kept.options.formats and "layers.1.down" not in kept.options.formats
    assert kept.options.dtype == "bf16"


def test_codes_are_not_rounded_again(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, CONFIG, kind="Q4_0")
    with pytest.raises(InvalidArgumentError, match="quantized already"):
        load(path, quantize="int8")


def test_too_little_memory_is_met_by_int8(partly: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = weight_bytes(read_model(partly).spec, load(partly).options.formats, "bf16") - 1
    monkeypatch.setattr("octavo.runtime.loader.available_memory", lambda **_: room)
    with pytest.raises(InsufficientMemoryError) as caught:
        load(partly, dtype="bf16")
    assert any(change.get("quantize") == "int8" for change in caught.value.remedies)


def test_commands_know_both_the_codes_and_the_numbers(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(mixed), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["kind"] for each in facts["converted"]] == ["Q4_K", "Q6_K", "Q8_0", "Q4_0"]
    assert set(facts["weights"]["bytes_by_dtype"]) == {"Q4_K", "Q6_K", "Q8_0", "Q4_0", "f32"}
    assert facts["weights"]["total_bytes"] < mixed.stat().st_size
    assert main(["info", str(mixed)]) == 0
    assert "Stored as" in capsys.readouterr().out
    evaluate = ["eval", str(mixed), "--random", "60", "--against", "same", "--json"]
    assert main([*evaluate, "--dtype", "f32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["divergence"]["mean_kl"] < 1e-3
    assert found["against"]["weights"] == "f32"
    assert main(["diff", str(mixed), "--random", "20", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["generate", "-m", str(mixed), "the", "--max-tokens", "2"]) == 0
    assert "Q6_K (down) as int8, groups of 32" in capsys.readouterr().err
    assert main(["quantize", str(mixed), str(tmp_path / "out"), "--scheme", "int8", "--json"]) == 0
    formats = open_checkpoint(read_model(tmp_path / "out")).formats
    assert set(formats.values()) == {WeightFormat("int8")}
