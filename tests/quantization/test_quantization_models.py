"""Quantized models end to end: against the reference, in every batch, from every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ops_helpers import grouped_activations, one_isa_of_each
from quantization_helpers import CONFIG, SCHEMES, write_float_model, write_quantized_model
from runtime_helpers import tiny_spec
from weights_helpers import random_weights, write_model

from octavo import _native
from octavo.cli.app import run
from octavo.config import QUANTIZE, EngineConfig, Environment
from octavo.diff.comparison import DiffOptions
from octavo.diff.native import NativeImplementation, load_native
from octavo.diff.setup import DiffRequest, compare
from octavo.errors import InsufficientMemoryError, InvalidArgumentError
from octavo.llm import LLM
from octavo.models.layer import weight_shapes
from octavo.models.spec import WeightFormat
from octavo.quantization.apply import dequantized, quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.reference.llama import ReferenceModel
from octavo.reference.ops import round_to_bf16
from octavo.reference.quantization import round_activations, rounded_product
from octavo.runtime.loader import load_runtime
from octavo.sampling_params import SamplingParams
from octavo.search.contrastive import ContrastiveParams
from octavo.weights.checkpoint import NonFiniteWeightsWarning, open_checkpoint
from octavo.weights.model_files import read_model
from octavo.weights.safetensors import SafetensorsFile

PROMPT = [3, 30, 7, 7, 21, 66, 1]
ENVIRONMENT = Environment(home=Path("/nowhere"), num_threads=1, isa="auto")


def quiet(*_: Any) -> None:
    """Progress that nobody looks at."""


def logits_of(path: Path, **options: Any) -> np.ndarray:
    files = read_model(path)
    config = EngineConfig(max_model_len=64, max_num_seqs=1, num_threads=1, **options)
    loaded = load_runtime(files, open_checkpoint(files), config, environment=ENVIRONMENT)
    side = NativeImplementation(loaded)
    return side.feed(np.array(PROMPT, np.int32)).logits


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_diff_finds_nothing(
    tmp_path: Path, quantize: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_ISA", isa)
    source = write_float_model(tmp_path / "float")
    request = DiffRequest(
        str(source), quantize=quantize, random=40, num_threads=1, options=DiffOptions(steps=4)
    )
    result = compare(request, ENVIRONMENT, quiet)
    assert result.ok, (result.first_bad, result.findings)
    assert result.decode.promised and result.decode.different == 0
    assert all(tap.own[0] is not None for tap in result.taps)


@pytest.mark.parametrize("isa", one_isa_of_each())
@pytest.mark.parametrize("scheme", SCHEMES)
def test_diff_of_a_directory_finds_nothing(
    tmp_path: Path, scheme: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_ISA", isa)
    _, target = write_quantized_model(tmp_path, scheme, tie_word_embeddings=scheme == "int4-rtn")
    request = DiffRequest(str(target), random=23, num_threads=1, options=DiffOptions(steps=3))
    result = compare(request, ENVIRONMENT, quiet)
    assert result.ok, (result.first_bad, result.findings)
    assert result.model == target.name, "a directory is called by its own name"


@pytest.mark.parametrize("isa", one_isa_of_each())
def test_diff_finds_the_other_rounding(
    tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error: the definition rounds what meets int4 as another instruction set would."""
    monkeypatch.setenv("OCTAVO_ISA", isa)
    other = "whole" if grouped_activations(isa) == "bf16" else "bf16"
    monkeypatch.setattr(_native, "grouped_activations", lambda isa: other)
    source = write_float_model(tmp_path / "float")
    request = DiffRequest(str(source), quantize="int4", random=40, num_threads=1)
    result = compare(request, ENVIRONMENT, quiet)
    assert not result.ok and result.findings[0].op == "linear"


@pytest.mark.parametrize("isa", one_isa_of_each())
def test_diff_finds_a_wrong_scale(
    tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error: the reference sees one group's scale as a little larger."""
    monkeypatch.setenv("OCTAVO_ISA", isa)
    source = write_float_model(tmp_path / "float")
    files = read_model(source)
    checkpoint = quantize_checkpoint(open_checkpoint(files), files.spec, Scheme("int4"))
    weights = {name: dequantized(checkpoint, name) for name in weight_shapes(files.spec)}
    side = load_native(
        files, checkpoint, device="cpu", dtype="bf16", max_tokens=32, chunk_size=16, num_threads=1
    )
    taps = side.feed(np.array(PROMPT, np.int32), taps=True).taps

    def own_error() -> float:
        x, weight = taps["layers.1.mlp_norm"].astype(np.float64), weights["layers.1.up.weight"]
        format, rounds = checkpoint.formats["layers.1.up"], grouped_activations(isa)
        expected = rounded_product(x, weight, None, format, grouped_activations=rounds)
        return float(np.abs(taps["layers.1.up"] - expected).max() / np.abs(expected).max())

    assert own_error() < 1e-6
    weights["layers.1.up.weight"][7, 32:64] *= 1.05
    assert own_error() > 1e-3


@pytest.mark.parametrize("rounds", ["whole", "bf16"])
def test_the_reference_rounds_what_meets_a_quantized_matrix(tmp_path: Path, rounds: str) -> None:
    source = write_float_model(tmp_path / "float")
    files = read_model(source)
    checkpoint = quantize_checkpoint(open_checkpoint(files), files.spec, Scheme("int4"))
    weights = {name: dequantized(checkpoint, name) for name in weight_shapes(files.spec)}
    for dtype in ("f32", "bf16"):
        model = ReferenceModel(
            files.spec,
            weights,
            dtype=dtype,
            formats=checkpoint.formats,
            grouped_activations=rounds,
        )
        name = "layers.0.q.weight"
        assert np.array_equal(model.weights[name], weights[name])  # not rounded again
        taps: dict[str, np.ndarray] = {}
        model.forward(PROMPT, taps=taps)
        x = taps["layers.0.attn_norm"]
        steps, step = round_activations(x)
        expected = (round_to_bf16(x) if rounds == "bf16" else steps * step) @ weights[name].T
        assert np.allclose(taps["layers.0.q"], expected, rtol=0, atol=1e-5)
        assert not np.array_equal(weights[name], round_to_bf16(weights[name]))
        # The head is int8, which has one definition.
        steps, step = round_activations(taps["final_norm"])
        expected = (steps * step) @ weights["lm_head.weight"].T
        assert np.allclose(taps["logits"], expected, rtol=0, atol=1e-5)


def test_a_rounding_that_is_none_is_refused() -> None:
    x, format = np.ones((1, 32), np.float32), WeightFormat("int4", 32)
    with pytest.raises(ValueError, match="grouped_activations is 'f16'; expected one of"):
        rounded_product(x, x, None, format, grouped_activations="f16")
    with pytest.raises(ValueError, match="grouped_activations is 'f16'; expected one of"):
        ReferenceModel(tiny_spec(), {}, grouped_activations="f16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_directory_gives_the_bits_of_quantizing_at_load(tmp_path: Path, scheme: str) -> None:
    source, target = write_quantized_model(tmp_path, scheme)
    files = read_model(source)
    at_load = quantize_checkpoint(open_checkpoint(files), files.spec, SCHEMES[scheme])
    side = load_native(
        files, at_load, device="cpu", dtype="bf16", max_tokens=32, chunk_size=16, num_threads=1
    )
    ours = side.feed(np.array(PROMPT, np.int32)).logits
    assert np.array_equal(ours, logits_of(target))
    if scheme in QUANTIZE:
        assert np.array_equal(ours, logits_of(source, quantize=scheme))


def test_int8_from_a_directory_equals_int8_at_load(tmp_path: Path) -> None:
    source, target = write_quantized_model(tmp_path, "int8")
    ours, theirs = logits_of(source, quantize="int8"), logits_of(target)
    plain = logits_of(source)
    spread = plain.std()
    assert (ours == theirs).all()
    assert 0 < np.abs(ours - plain).max() < 0.15 * spread
    kept = logits_of(source, quantize="int8", keep_embedding=True)
    assert np.abs(kept - plain).max() > 0 and not np.array_equal(kept, ours)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_batch_changes_no_bit(tmp_path: Path, scheme: str) -> None:
    _, target = write_quantized_model(tmp_path, scheme)
    prompts = [[1 + (7 * i + j * j) % 60 for j in range(3 + 11 * i % 40)] for i in range(9)]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2)

    def answers(num_threads: int = 1, **options: Any) -> list[Any]:
        llm = LLM(target, max_model_len=64, num_threads=num_threads, **options)
        return [output.outputs for output in llm.generate(prompts, params, progress=False)]

    together = answers()
    assert answers(max_num_seqs=1) == together  # one after the other
    assert answers(max_num_batched_tokens=7) == together  # in chunks
    assert answers(num_threads=2) == answers(num_threads=3, max_num_seqs=2) == together


def test_dummy_weights_are_quantized_too(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").unlink()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for quantize in ("int8", "int4"):
        llm = LLM(tmp_path, load_format="dummy", quantize=quantize, max_model_len=64, num_threads=1)
        assert len(llm.generate([1, 2], params, progress=False)[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize(
    ("name", "own_name", "row", "column"),
    [
        ("model.layers.1.mlp.up_proj", "layers.1.up", 3, slice(None)),
        ("model.layers.0.self_attn.o_proj", "layers.0.o", 7, slice(None)),
        ("lm_head", "lm_head", 12, 12),  # the logit of one token
    ],
)
def test_no_rounding_hides_a_nan(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantize: Any,
    name: str,
    own_name: str,
    row: int,
    column: Any,
) -> None:
    """Rows without one have the bits that they have in a model without one."""
    weights = random_weights(CONFIG)
    write_model(tmp_path, CONFIG, weights=weights)
    # Five rows at once: the others are rounded by the native core.
    monkeypatch.setattr(SafetensorsFile, "rows_at_once", lambda self, name: 5)
    want = logits_of(tmp_path, quantize=quantize)
    for value in (np.nan, np.inf):
        weights[f"{name}.weight"][row, 5] = value
        write_model(tmp_path, CONFIG, weights=weights)
        with pytest.warns(NonFiniteWeightsWarning, match=rf"^1 of .*\({own_name}\."):
            got = logits_of(tmp_path, quantize=quantize)
        assert not np.isfinite(got[..., column]).any()
        got[..., column] = want[..., column]
        assert np.array_equal(got, want)


def test_memory_is_judged_by_the_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.runtime import loader

    source = write_float_model(tmp_path / "float")
    monkeypatch.setattr(loader, "available_memory", lambda **_: 100_000)
    with pytest.raises(InsufficientMemoryError, match="as bf16"):
        logits_of(source, num_kv_blocks=4)
    with pytest.raises(InsufficientMemoryError, match="KiB as int8; "):
        logits_of(source, num_kv_blocks=4, quantize="int8")


def test_options_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="quantize is 'int3'; expected one of int8, "):
        EngineConfig(quantize="int3")  # type: ignore[arg-type]
    _, target = write_quantized_model(tmp_path, "int4")
    with pytest.raises(InvalidArgumentError, match="quantize is 'int8', but the model's weights"):
        logits_of(target, quantize="int8")
    with pytest.raises(InvalidArgumentError, match="expected --against reference"):
        compare(DiffRequest(str(target), against="hf", random=4), ENVIRONMENT, quiet)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_float_model(tmp_path / "float")
    (source / "LICENSE").write_text("as it was")
    (source / "octavo.json").write_text("{}")
    target = tmp_path / "out"
    arguments = ["quantize", str(source), str(target), "--scheme", "int4", "--group-size", "64"]
    assert run([*arguments, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "groups of 32 (width 96), since 64 does not divide" in printed.out and not printed.err
    assert "4.51 bits a weight" in printed.out
    assert (target / "LICENSE").read_text() == "as it was"
    assert not (target / "octavo.json").exists()
    assert run([*arguments, "--quiet"]) == 2
    assert "exists; expected the name of a new directory" in capsys.readouterr().err
    assert run(["quantize", str(source), str(tmp_path / "b"), "--scheme", "int8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bits_per_weight"] > 8 and facts["num_bytes"] < facts["source_bytes"]
    assert run(["diff", str(target), "--random", "9", "--steps", "2", "--num-threads", "1"]) == 0
    assert "int4 and int8 weights" in capsys.readouterr().out
    assert run(["diff", str(source), "--random", "9", "--quantize", "int4", "--steps", "0"]) == 0
    assert run(["quantize", str(source), str(tmp_path / "c"), "--scheme", "int2"]) == 2
    assert "scheme is 'int2'" in capsys.readouterr().err


def test_info_shows_the_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_quantized_model(tmp_path, "int4-asymmetric")
    assert run(["info", str(target)]) == 0
    assert "int4, groups of 32, asymmetric (q, k, v, o, gate, up, down)" in capsys.readouterr().out
    sizes = []
    for path in (source, target):
        assert run(["info", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        sizes.append(facts["memory"]["as"]["bf16"]["weight_bytes"])
        assert facts["num_parameters"] == 154_656
    assert len(facts["quantized"]) == 1 and sizes[1] < 0.5 * sizes[0]


def test_a_quantized_amateur_of_a_model_that_is_quantized_while_it_is_loaded(
    tmp_path: Path,
) -> None:
    large, small = write_quantized_model(tmp_path, "int4")
    options: dict[str, Any] = {"max_model_len": 64, "num_threads": 1}
    params = ContrastiveParams(max_tokens=6, ignore_eos=True)
    prompt = {"prompt_token_ids": PROMPT}
    llm = LLM(large, quantize="int8", **options)
    (output,) = llm.contrastive_decoding(prompt, small, params, progress=False)
    assert len(output.outputs[0].token_ids) == 6
