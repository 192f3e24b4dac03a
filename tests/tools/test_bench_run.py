"""`octavo bench` on a tiny model: gates, outputs, the machine's limits. Nothing here is timed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from text_helpers import tiny_model

from octavo import _native
from octavo.bench.benchmark import (
    BenchResult,
    Loading,
    Runner,
    bench,
    fit_config,
    hash_of,
    measure_peak,
)
from octavo.bench.cases import Case, Peak, make_cases
from octavo.bench.report import CSV_COLUMNS, HEADINGS, cells, to_csv, to_markdown
from octavo.cli import main
from octavo.config import EngineConfig, read_environment
from octavo.reference.llama import ReferenceModel
from octavo.runtime.loader import load_runtime
from octavo.runtime.session import Session, Step
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

CASES = make_cases([40], [3], [1, 3, 5], [0, 21])
SHAPES = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured, but briefly."""
    bandwidth, flops = _native.measure_bandwidth, _native.measure_flops
    monkeypatch.setattr(
        _native, "measure_bandwidth", lambda threads, *_: bandwidth(threads, 0.0, 1 << 20)
    )
    monkeypatch.setattr(_native, "measure_flops", lambda threads, isa, *_: flops(threads, isa, 0.0))


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(
        **{"device": "cpu", "load_format": "dummy", "num_threads": 2, "dtype": "bf16", **fields}
    )


def run(model: Path, cases: list[Case] = CASES, **fields: Any) -> BenchResult:
    return bench(str(model), config(**fields), cases, 2, read_environment())


def load(model: Path, cases: list[Case] = CASES, **fields: Any) -> tuple[Any, Any]:
    files = read_model(model)
    settings = fit_config(config(**fields), cases)
    return load_runtime(files, open_checkpoint(files, "dummy"), settings), files.spec


def test_a_run(model: Path, quick_peak: None) -> None:
    result = run(model)
    assert result.passed and [row.case for row in result.rows] == CASES
    assert result.peak is not None and result.peak.bandwidth > 0 and result.peak.flops > 0
    for row in result.rows:
        assert len(row.samples) == 2 and row.mean is not None and row.mean > 0
        assert row.limit in ("memory", "arithmetic") and row.percent_of_limit is not None
    # The first sequence's logits: the same for every batch size, another for another depth.
    hashes = {row.case.depth: set() for row in result.rows if row.case.kind == "decode"}
    for row in result.rows[1:]:
        hashes[row.case.depth].add(row.gate.logits_hash)
    assert all(len(values) == 1 for values in hashes.values())
    assert hashes[0] != hashes[21]
    again = run(model, max_num_batched_tokens=7, num_threads=1)
    assert [row.gate for row in again.rows] == [row.gate for row in result.rows]


@pytest.mark.parametrize("quantize", ["int8", "w8a8", "int4"])
def test_quantized_weights_keep_the_gate(model: Path, quick_peak: None, quantize: str) -> None:
    result = run(model, quantize=quantize)
    plain = run(model)
    assert result.passed and quantize in result.weights and plain.weights == "bf16"
    assert result.weight_bytes < plain.weight_bytes
    hashes = [{row.gate.logits_hash for row in r.rows} for r in (result, plain)]
    assert not hashes[0] & hashes[1]


def test_what_is_timed_computes_the_model(model: Path) -> None:
    """Its prefill and decode, in f32, against the reference."""
    loaded, spec = load(model, dtype="f32", max_num_batched_tokens=9)
    weights = {
        name: tensor.to_float32()
        for name, tensor in open_checkpoint(read_model(model), "dummy").items()
    }
    runner = Runner(loaded, spec, None)
    prompt = runner.tokens(0, 33)
    expected = ReferenceModel(spec, weights).forward(prompt)[-1]
    np.testing.assert_allclose(runner.prefill(prompt), expected, atol=1e-4)
    prompts = [runner.tokens(index, 22) for index in range(3)]
    logits = runner.decode_logits(prompts, 3)
    assert logits.shape == (3, 3, spec.vocab_size)
    for index, prompt in enumerate(prompts):
        tokens = list(prompt)
        for step in range(3):
            expected = ReferenceModel(spec, weights).forward(tokens)[-1]
            np.testing.assert_allclose(logits[step, index], expected, atol=1e-4)
            tokens.append(int(expected.argmax()))


def test_what_depends_on_its_neighbours_gets_no_figure(
    model: Path, quick_peak: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A runtime whose logits differ in the last bit where sequences share a step."""
    right = Session.step

    def wrong(self: Session, new: Any, *options: Any) -> Step:
        step = right(self, new, *options)
        up = np.nextafter(step.logits, np.float32(np.inf))
        return step._replace(logits=up) if len(new) > 1 else step

    monkeypatch.setattr(Session, "step", wrong)
    result = run(model)
    assert not result.passed
    decoded = [row for row in result.rows if row.case.kind == "decode"]
    assert decoded and not any(row.gate.passed for row in decoded)
    assert all(row.mean is None and not row.samples for row in decoded)
    assert cells(decoded[0])[2] == "-" and cells(decoded[0])[-1] == "FAILED"
    arguments = ["bench", str(model), "--load-format", "dummy", "--device", "cpu"]
    assert main([*arguments, "-p", "0", "-n", "2", "-r", "1"]) == 1
    assert "a gate failed" in capsys.readouterr().err


def test_a_prompt_that_depends_on_its_chunks_is_found(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, spec = load(model)
    runner = Runner(loaded, spec, None)
    assert runner.gate(CASES[0]).passed
    right = Runner.prefill

    def wrong(self: Runner, prompt: Any, chunk: Any = None, companion: Any = ()) -> Any:
        logits = right(self, prompt, chunk, companion)
        return logits if chunk is None else np.nextafter(logits, np.float32(np.inf))

    monkeypatch.setattr(Runner, "prefill", wrong)
    assert not runner.gate(CASES[0]).passed


def test_the_hash_sees_one_bit() -> None:
    logits = np.linspace(-1, 1, 77, dtype=np.float32)
    other = logits.copy()
    other[40] = np.nextafter(other[40], np.float32(2))
    assert hash_of(logits) == hash_of(logits.copy()) != hash_of(other)
    assert len(hash_of(logits)) == 16


def test_the_outputs(model: Path, quick_peak: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(model), "--load-format", "dummy", "--device", "cpu", "-r", "2"]
    arguments += ["-p", "17", "-n", "3", "-b", "1,2", "-d", "5", "-o"]
    assert main([*arguments, "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["case"]["batch"]) for row in found["rows"]] == [
        ("pp17", 1),
        ("tg3 @ d5", 1),
        ("tg3 @ d5", 2),
    ]
    for row in found["rows"]:
        assert row["gate"]["passed"] and len(row["samples"]) == 2
        assert row["mean"] == pytest.approx(sum(row["samples"]) / 2)
    assert found["peak"]["bandwidth"] > 0 and found["isa"] in _native.available_isas()
    assert main([*arguments, "csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == list(CSV_COLUMNS) and len(rows) == 4
    assert all(len(row) == len(CSV_COLUMNS) for row in rows)
    assert main([*arguments, "md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 5  # with its rule
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(HEADINGS) + 1}
    assert main([*arguments, "table"]) == 0
    table = capsys.readouterr().out
    assert "KV cache bf16" in table
    assert main([*arguments, "table", "--kv-dtype", "int8"]) == 0
    assert "KV cache int8" in capsys.readouterr().out
    assert "tg3 @ d5" in table and "% of limit" in table and "limits measured" in table
    assert "loaded in" in table and "KV cache 0 MiB" in table


@pytest.mark.usefixtures("quick_peak")
def test_ranks_are_counted_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, weights, work and limits are those of all; the gates compare within the ranks."""
    measured = []
    bandwidth = _native.measure_bandwidth
    monkeypatch.setattr(
        _native,
        "measure_bandwidth",
        lambda threads, *given: measured.append(threads) or bandwidth(threads, *given),
    )
    one = run(model, num_threads=1)
    two = run(model, num_threads=1, tensor_parallel_size=2)
    assert one.passed and two.passed
    assert (one.num_threads, two.num_threads) == (1, 2) and measured == [1, 2]
    assert (one.tensor_parallel_size, two.tensor_parallel_size) == (1, 2)
    assert two.weight_bytes > one.weight_bytes and two.num_parameters == one.num_parameters
    assert "2 threads of 2 ranks" in to_markdown(two) and "before (rank 0)" in to_markdown(two)
    assert "1 threads, " in to_markdown(one) and "rank" not in to_markdown(one)
    assert json.loads(json.dumps(two.to_json()))["tensor_parallel_size"] == 2
    assert [row["tensor_parallel_size"] for row in csv.DictReader(io.StringIO(to_csv(two)))] == [
        "2"
    ] * len(CASES)


@pytest.mark.parametrize(("kv_heads", "vocab"), [(2, 512), (1, 512), (2, 307)])
def test_the_work_of_ranks(tmp_path: Path, kv_heads: int, vocab: int) -> None:
    """That of the whole model; what each rank has whole is read, and computed, by each."""
    fields = {"num_attention_heads": 4, "head_dim": 32, "vocab_size": vocab}
    shape = json.loads((SHAPES / "tiny" / "config.json").read_text(encoding="utf-8"))
    shape |= {**fields, "num_key_value_heads": kv_heads}
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    case = Case("decode", 3, 2, 20)
    works = []
    for ranks in (1, 2):
        loaded, spec = load(tmp_path, [case], tensor_parallel_size=ranks, num_threads=1)
        works.append(Runner(loaded, spec, None).work(case))
    hidden, layers, steps, attended = 128, 2, 3, 2 * (21 + 22 + 23)
    copied = 2 * 32 * layers * (kv_heads == 1)  # outputs of k and v
    head = vocab * (vocab == 307)  # which two ranks cannot share
    vectors = 4 * hidden * (2 * layers + 1)
    more = works[1].num_operations - works[0].num_operations
    assert more == 2 * (copied + head) * hidden * case.tokens
    read = works[1].num_bytes - works[0].num_bytes
    expected = steps * (2 * (copied + head) * hidden + vectors) + 2 * copied * attended
    # Tables of rope, and rows up to a multiple of 32, are in memory, too, but not in the formula.
    assert read == pytest.approx(expected, abs=steps * 3 * 2**13)


def test_the_limits_of_gpus_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.bench.benchmark.measure_cuda", lambda: Peak(3e12, 9e14, "bf16"))
    loaded = SimpleNamespace(device="cuda", options=SimpleNamespace(world_size=4))
    peak = measure_peak(loaded, 1, lambda *_: None)  # type: ignore[arg-type]
    assert peak == Peak(12e12, 36e14, "bf16")


def test_a_row_without_a_measured_machine(model: Path) -> None:
    loaded, spec = load(model)
    row = Runner(loaded, spec, None).measure(CASES[1], 1)
    assert row.samples and row.limit is None and row.percent_of_limit is None
    assert row.deviation == 0 and cells(row)[5] == "-"
    result = BenchResult(
        *("tiny", 1, 1, "bf16", "bf16", "bf16", "dummy", "elsewhere", "none", 1, "a processor"),
        native={"compiler": "none"},
        date="now",
        peak=None,
        rows=(row,),
    )
    assert "limits measured" not in to_markdown(result) and to_csv(result).count("\n") == 1
    assert "loaded in" not in to_markdown(result)
    loading = Loading(1.25, 3 << 20, 50 << 20, 70 << 20)
    expected = "loaded in 1.25 s; KV cache 3 MiB; 70 MiB in memory at most, of them 50 before"
    assert expected in to_markdown(replace(result, loading=loading))
    silent = replace(loading, resident_bytes_before=None, resident_bytes_at_most=None)
    assert "KV cache 3 MiB\n" in to_markdown(replace(result, loading=silent))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "5,x"], "-p is '5,x'; expected numbers"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-b", "0"], "-b has 0; expected 1 or more"),
        (["-r", "0"], "repetitions is 0"),
        (["-p", "5000"], "max_model_len is 5000"),
        (["-o", "xml"], "--output is 'xml'"),
    ],
)
def test_mistakes(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model), "--load-format", "dummy", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("isa", _native.available_isas())
def test_the_machine_has_limits(isa: str) -> None:
    """Plausible for any computer since 1995, in any instruction set."""
    assert 1e6 < _native.measure_flops(1, isa, 0.0) < 1e15
    assert 1e6 < _native.measure_bandwidth(1, 0.0, 1 << 20) < 1e14


def test_measuring_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_threads is -1"):
        _native.measure_bandwidth(-1)
    with pytest.raises(ValueError, match='isa is "mmx"'):
        _native.measure_flops(1, "mmx")
    with pytest.raises(ValueError, match="seconds is -1"):
        _native.measure_flops(1, "auto", -1.0)


def test_the_shapes_that_come_along() -> None:
    spec = read_model(SHAPES / "llama-3.2-1b").spec
    assert len(spec.layers) == 16 and spec.vocab_size == 128256 and spec.tie_word_embeddings
    assert open_checkpoint(read_model(SHAPES / "llama-3.2-1b"), "dummy").num_parameters == (
        1_235_814_400
    )
