"""The framework of benchmarks/run.py: specs, rounds, gaps, and the file it writes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from text_helpers import tiny_model

from octavo.errors import InvalidArgumentError
from octavo.progress import Bar
from octavo.report.results import SCHEMA_FILE, read_results

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = "common energy spec systems record agreement peers catalog servers under_load"
MODULES += " model_run run"
SPECS = sorted((BENCHMARKS / "specs").glob("*.yaml"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load_module
    for name in MODULES.split():
        sys.modules.pop(name, None)


SPEC: dict[str, Any] = {
    "title": "a try",
    "rounds": 3,
    "models": [
        {
            "model": "tiny",
            "systems": ["octavo bf16", {"system": "vllm bf16", "tokens": 3}],
            "decode": {"tokens": 8},
            "batch": {"sizes": [1, 3], "prompt": 4, "tokens": 2},
        }
    ],
}


def changed(**model: Any) -> dict[str, Any]:
    return {**SPEC, "models": [{**SPEC["models"][0], **model}]}


def test_a_spec_is_read(load) -> None:
    spec, systems = load("spec"), load("systems")
    made = spec.make_spec(changed(load={"systems": ["octavo int8"], "users": [1, 2]}), "here")
    model = made.models[0]
    assert [system.name for system in model.systems] == ["octavo bf16", "vllm bf16"]
    rows = [("decode", 1, 8, 1), ("batch", 4, 2, 1), ("batch", 4, 2, 3)]
    assert model.rows == tuple(systems.Row(*row) for row in rows)
    assert model.systems[1].row(model.rows[0]) == systems.Row("decode", 1, 3)
    assert model.load.users == (1, 2) and model.load.answer == "16-48" and model.quality is None
    cuda = spec.SystemSpec("transformers bf16 compiled cuda")
    assert (cuda.device, cuda.variants, cuda.bits) == ("cuda", ["compiled", "cuda"], 16)


@pytest.mark.parametrize("file", SPECS, ids=lambda path: path.stem)
def test_every_spec_that_is_kept_can_be_read(load, file: Path) -> None:
    made = load("spec").read_spec(file)
    for model in made.models:
        assert model.rows or model.load
        for system in model.load.systems if model.load else ():
            engine, form = system.split()
            assert form in load("spec").ENGINES[engine]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"titel": "x", "models": [1]}, r"has 'titel' \(do you mean title\?\)"),
        ({"title": "x"}, "models is None; expected a list"),
        ({"title": "x", "models": [7]}, "model 1 is 7; expected"),
        (changed(systems="octavo bf16"), "systems is 'octavo bf16'; expected a list"),
        (
            changed(systems=["octavo int3"]),
            "is 'octavo int3'; expected one of octavo f32",
        ),
        (changed(systems=["vllm bf16 static"]), "of vllm there is nothing behind the format"),
        (changed(decode={"tokens": 0}), "decode has tokens 0; expected a whole number"),
        (changed(batch={"sizes": [1, "2"], "prompt": 1, "tokens": 1}), "batch has sizes '2'"),
        (changed(load={"users": [1]}), "load: .*systems"),
        (changed(seconds="long"), "seconds is 'long'; expected float"),
        (
            changed(quality={"formats": ["int8"], "window": 3}),
            r"'window' \(do you mean",
        ),
    ],
)
def test_a_mistake_in_a_spec_is_named(load, content: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load("spec").make_spec(content, "here")


class Fake:
    """In a process's place. fails: the measure in which it fails, always or in one round."""

    load_seconds, start_seconds = 0.25, 0.5

    def __init__(self, name: str, fails: str = "", passed: bool = True) -> None:
        self.name, self._fails, self._passed, self.rounds = name, fails, passed, 0
        self.closed = False

    def describe(self) -> dict[str, Any]:
        return {"num_parameters": 77, "version": "1"}

    def check(self, row: Any) -> dict[str, Any]:
        return {"passed": self._passed, "logits": ["0123"]} if "octavo" in self.name else {}

    def works(self, row: Any) -> list[tuple[float, float]]:
        return [(2e6 * row.tokens, 1e6 * row.tokens)]

    def limits(self) -> dict[str, Any]:
        return {"bandwidth": 1e9, "flops": 1e9, "arithmetic": "whole numbers"}

    def memory(self) -> dict[str, int]:
        return {"host": 4096}

    def warm_up(self, row: Any) -> None:
        if row.name == self._fails:
            raise RuntimeError("no such measure")

    def run(self, row: Any) -> dict[str, Any]:
        self.rounds += 1
        seconds = row.tokens / (100 * self.rounds)
        return {"seconds": seconds, "times": [seconds * (i + 1) for i in range(row.generated)]}

    def close(self) -> None:
        self.closed = True


def measured(load: Any, tmp_path: Path, systems: dict[str, Any], content: Any) -> dict[str, Any]:
    """The file of a run in which these systems, or errors, take the place of real ones."""
    run, catalog = load("run"), load("catalog")
    path = tiny_model(tmp_path / "tiny")

    def start(self: Any, system: Any, rows: Any) -> Any:
        found = systems[system.name]
        if isinstance(found, Exception):
            raise found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog.Catalog, "start", start)
        given = ["spec", "--model", str(path), "--load-format", "dummy"]
        given += ["--threads", "1", "--folder", str(tmp_path), "--output", str(tmp_path / "r.json")]
        arguments = run.options().parse_args(given)
        spec = run.chosen(load("spec").make_spec(content, "here"), arguments)
        with Bar("count", quiet=True) as bar:
            run.run(spec, arguments, bar)
    found: dict[str, Any] = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    return found


def test_rounds_gates_limits_and_gaps(load, tmp_path: Path) -> None:
    systems = {
        "octavo bf16": Fake("octavo bf16"),
        "vllm bf16": Fake("vllm bf16", fails="batch"),
        "transformers bf16": load("catalog").Absent("the package torch is not installed"),
    }
    content = changed(
        systems=[*SPEC["models"][0]["systems"], "transformers bf16"],
        latency={"prompt": 4, "tokens": 5},
        left_out={"openvino": "not asked for"},
    )
    found = measured(load, tmp_path, systems, content)
    gaps = {(gap["system"], gap["what"]): gap["why"] for gap in found["gaps"]}
    assert gaps["transformers bf16", "all of it"] == "the package torch is not installed"
    assert gaps["vllm bf16", "batch, 3 at once"] == "no such measure"
    assert gaps["openvino", "all of it"] == "not asked for"
    rows = {(row["system"], row["measure"], row["requests"]): row for row in found["rows"]}
    assert ("vllm bf16", "batch", 1) not in rows
    ours = rows["octavo bf16", "decode", 1]
    assert len(ours["samples"]) == 3 and ours["least"] < ours["median"] < ours["most"]
    assert ours["percent_of_limit"] == pytest.approx(100 * ours["median"] * 2e6 / 1e9)
    assert ours["limit"] == "memory" and ours["operations_per_second"] == ours["median"] * 1e6
    # Asked for three tokens where octavo is asked for eight, and held against the same limit.
    theirs = rows["vllm bf16", "decode", 1]
    assert theirs["tokens"] == 3 and theirs["limit_of"] == "octavo bf16"
    assert theirs["percent_of_limit"] == pytest.approx(100 * theirs["median"] * 2e6 / 1e9)
    latency = rows["octavo bf16", "latency", 1]["between_ms"]
    assert latency["count"] == 12 and latency["p50"] <= latency["p99"] == latency["quantiles"][99]
    entry = found["systems"][0]
    assert entry["gate"]["passed"] and entry["gate"]["logits"]["batch 3"] == ["0123"]
    assert (entry["host_bytes"], entry["limits"]["flops"]) == (4096, 1e9)
    assert systems["octavo bf16"].closed and systems["vllm bf16"].closed
    assert read_results(tmp_path / "r.json").machine["num_threads"] == 1


def test_a_gate_that_fails_leaves_no_figure(load, tmp_path: Path) -> None:
    systems = {"octavo bf16": Fake("octavo bf16", passed=False), "vllm bf16": Fake("vllm bf16")}
    found = measured(load, tmp_path, systems, SPEC)
    assert {row["system"] for row in found["rows"]} == {"vllm bf16"}
    assert any("its bits depend" in gap["why"] for gap in found["gaps"])
    assert found["systems"][0]["gate"] == {"passed": False} and systems["octavo bf16"].closed


def test_time_that_is_used_up_is_a_gap(load, tmp_path: Path) -> None:
    found = measured(load, tmp_path, {}, changed(seconds=1))
    assert not found["rows"]
    assert all("used up" in gap["why"] for gap in found["gaps"] if gap["system"])
    assert {gap["system"] for gap in found["gaps"]} >= {"octavo bf16", "vllm bf16"}


def test_the_command_line_narrows_a_spec(load) -> None:
    run, made = load("run"), load("spec").make_spec(SPEC, "here")
    arguments = run.options().parse_args(["x", "--systems", "vllm bf16", "--measures", "decode"])
    model = run.chosen(made, arguments).models[0]
    assert [each.name for each in model.systems] == ["vllm bf16"]
    assert [row.name for row in model.rows] == ["decode"]
    arguments = run.options().parse_args(["x", "--measures", "decoding"])
    with pytest.raises(InvalidArgumentError, match="--measures has 'decoding'; expected some of"):
        run.chosen(made, arguments)
    assert run.command_line(["run.py", "a.yaml", "--folder", "/home/x/kept"]).endswith(
        "a.yaml --folder kept"
    )


def counters(folder: Path, values: Iterator[int] | list[int]) -> None:
    for index, value in enumerate(values):
        package = folder / f"intel-rapl:{index}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(str(value))
        (package / "max_energy_range_uj").write_text("1000000000")
    part = folder / "intel-rapl:0:0"  # of package 0: counted there already
    part.mkdir(exist_ok=True)
    (part / "energy_uj").write_text("5")


def test_joules_are_those_of_all_packages_and_counters_may_begin_anew(load, tmp_path: Path) -> None:
    energy = load("energy")
    counters(tmp_path, [999_000_000, 2_000_000])
    meter = energy.Meter(tmp_path, nvml=False)
    before = meter.joules()
    counters(tmp_path, [1_500_000, 5_000_000])
    assert meter.joules()["cpu"] - before["cpu"] == pytest.approx(1 + 1.5 + 3)
    absent = energy.Meter(tmp_path / "none", nvml=False)
    assert absent.joules() == {} and "no RAPL" in absent.missing["cpu"]


def test_the_machine_is_described(load, tmp_path: Path) -> None:
    frequency = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    frequency.mkdir(parents=True)
    (frequency / "scaling_governor").write_text("performance\n")
    (frequency / "cpuinfo_max_freq").write_text("3500000\n")
    for node in range(2):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2000.5\ncpu MHz : 3000.5\nmodel name : x\n")
    found = load("common").circumstances(tmp_path / "sys", tmp_path)
    assert (found["governor"], found["mhz"], found["mhz_at_most"]) == ("performance", 2500, 3500)
    assert found["numa_nodes"] == 2 and found["memory_bytes"] > 0 and found["load"] >= 0
    bare = load("common").circumstances(tmp_path / "none", tmp_path / "none")
    assert (bare["governor"], bare["mhz"], bare["numa_nodes"]) == ("not told", None, 1)


def test_a_load_is_a_row(load) -> None:
    serving = load("under_load")
    record, run = importlib.import_module("octavo.bench.serve_client").Record, load("under_load")
    answers = [
        record(0.0, 1.0 + i, [0.1 * (i + 1), 0.4 + i, 1.0 + i], ["a", "b", "c"], 7, 3, 200)
        for i in range(3)
    ]
    row = serving.row_of(run.Measured(run.Load(3, 2), 5.0, tuple(answers)))
    assert (row["users"], row["rate"], row["prompt"], row["tokens"]) == (2, None, 7, 3)
    assert row["samples"] == [6.0] and row["first_ms"]["p50"] == pytest.approx(200)
    assert row["between_ms"]["count"] == 6
    answers[1].status = 500
    with pytest.raises(RuntimeError, match="1 requests failed"):
        serving.row_of(run.Measured(run.Load(3, 2), 5.0, tuple(answers)))
