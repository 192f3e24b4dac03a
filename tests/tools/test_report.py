"""`octavo report`: every kind of results file, tables, plots, one page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from octavo.cli import main
from octavo.errors import InvalidArgumentError
from octavo.report import plots, table
from octavo.report.convert import convert, quality_of_eval
from octavo.report.markdown import tables
from octavo.report.page import lacking, machine_of, render, sections, write_pictures
from octavo.report.results import SCHEMA, SCHEMA_FILE, Results, read_results
from octavo.report.style import ENGINES, look

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
OTHERS = ("neighbour", "serving_promises", "ladder")  # results of other shapes


def distribution(scale: float) -> dict[str, object]:
    quantiles = [scale * (1 + i / 50) for i in range(101)]
    return {
        "count": 40,
        "p50": quantiles[50],
        "p90": quantiles[90],
        "p99": quantiles[99],
        "quantiles": quantiles,
    }


def row(system: str, measure: str, *samples: float, **more: object) -> dict[str, object]:
    sizes = {"prompt": 16, "tokens": 8, "requests": 1, "unit": "tokens/s", "model": "m & <b>"}
    return {**sizes, "system": system, "measure": measure, "samples": list(samples), **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    work = {
        "bytes": 3e8,
        "operations": 6e8,
        "operations_per_second": 6e9,
        "percent_of_limit": 71.0,
        "limit": "memory",
    }
    rows = []
    for scale, system in ((2.0, "octavo int8"), (1.0, "llama.cpp q8_0")):
        rows += [
            row(system, "decode", 20 * scale, 30 * scale, 25 * scale, **work),
            row(system, "prefill", 300 * scale),
            *(row(system, "batch", scale * n**0.5, requests=n) for n in (1, 4, 16)),
            *(row(system, "context", scale, prompt=n, host_bytes=n << 20) for n in (256, 1024)),
            row(system, "latency", scale, first_ms=distribution(9), between_ms=distribution(2)),
            *(
                row(
                    system,
                    "load",
                    scale,
                    users=n,
                    first_ms=distribution(9.0 * n),
                    between_ms=distribution(2.0 * n),
                )
                for n in (1, 8)
            ),
        ]
    limits = {"bandwidth": 2e10, "flops": 4e11, "arithmetic": "whole numbers"}
    systems = [
        {
            "model": "m & <b>",
            "system": name,
            "engine": name.split()[0],
            "format": "int8",
            "bits": bits,
            "gate": {"passed": True},
            "limits": found,
            "load_seconds": 1.5,
        }
        for name, bits, found in (("octavo int8", 8.0, limits), ("llama.cpp q8_0", 8.5, {}))
    ]
    quality = [
        {
            "model": "m & <b>",
            "system": f"octavo {form}",
            "bits": bits,
            "perplexity": 20.0,
            "perplexity_ratio": 1 + kl,
            "mean_kl": kl,
        }
        for form, bits, kl in (("bf16", 16.0, 1e-4), ("int8", 8.0, 0.004), ("int4", 4.5, 0.2))
    ]
    content = {
        "schema": SCHEMA,
        "title": "a <script>title</script>",
        "machine": {"date": "now", "processor": "a processor", "num_threads": 2, "load": 1.7},
        "systems": systems,
        "rows": rows,
        "quality": quality,
        "gaps": [{"model": "m", "system": "vllm bf16", "what": "all", "why": "absent & gone"}],
        "spec": {"command": "python benchmarks/run.py x.yaml"},
    }
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_file_that_is_kept_can_be_read(path: Path) -> None:
    if path.stem.startswith(OTHERS):
        with pytest.raises(InvalidArgumentError, match="expected a file of benchmarks/run.py"):
            read_results(path)
        return
    results = read_results(path)
    text = "\n".join(tables(results))
    assert results.machine["processor"] and results.models
    assert all(model in text for model in results.models)


def test_converted_figures_are_those_of_the_file() -> None:
    found = read_results(RESULTS / "compare_cpu-llama-3.2-1b-bf16-xeon-amx-2t.json")
    ours = found.of("llama-3.2-1b", "decode")[0]
    assert (ours.system, ours.tokens, round(ours.percent_of_limit or 0)) == ("octavo bf16", 32, 95)
    vllm = next(r for r in found.of("llama-3.2-1b", "prefill") if r.system == "vllm bf16")
    assert table.ratio(found.of("llama-3.2-1b", "prefill")[0], vllm) == "1.81 (1.51 to 1.92)"
    served = read_results(RESULTS / "compare_serving-smollm2-amd-epyc-2t.json")
    most = next(r for r in served.rows if r.users == 64 and r.system == "llama.cpp q8_0")
    assert round(most.median) == 540 and most.between_ms and round(most.between_ms.p99) == 1795
    under_load = table.latency_table(served, "smollm2-135m", "load")
    assert under_load.headings[-1] == "prompt and answer tokens/s"
    gpu = read_results(RESULTS / "gpu-nvidia-h100-80gb-hbm3-fused.json")
    decode = gpu.of("llama-3.2-1b", "decode")[0]
    assert decode.system == "octavo bf16 cuda" and round(1e6 / decode.median) == 1005
    reached = (decode.operations_per_second or 0) / (decode.operations or 1) * decode.tokens
    assert reached == pytest.approx(decode.median, rel=0.01)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "holds a list; expected an object"),
        ('{"a": 1}', r"its keys: a\); expected a file of benchmarks/run.py"),
        ('{"benchmark": "compare_cpu", "model": "m"}', "results of compare_cpu, but is not whole"),
        (json.dumps({"schema": SCHEMA}), "has no machine"),
        (json.dumps({"schema": SCHEMA, "machine": {}}), "machine has no date"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidArgumentError, match=message):
            read_results(path)


WRONG_PARTS: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "no list": (("rows",), 3, "rows is 3; expected a list"),
    "no text": (("rows", 0, "model"), 3, "rows[0].model is 3; expected text"),
    "nothing": (("rows", 0, "unit"), None, "rows[0] has no unit"),
    "no samples": (("rows", 0, "samples"), [], "samples is []; expected 1 of them or more"),
    "no number": (("rows", 0, "samples", 1), float("nan"), "samples[1] is nan; expected a number"),
    "a truth": (("rows", 0, "prompt"), True, "prompt is True; expected a whole number"),
    "a word": (("rows", 0, "limit"), "disk", "is 'disk'; expected one of memory, arithmetic"),
    "quantiles": (("rows", 7, "first_ms", "quantiles"), [1], "is [1]; expected 101 of them"),
    "no load": (("rows", 8, "users"), None, "rows[8] is of a load and has neither users nor"),
    "a machine": (("machine", "native"), "x", "machine.native is 'x'; expected an object"),
    "a version": (("machine", "versions"), {"a": 1}, "versions.a is 1; expected text"),
    "a limit": (("systems", 0, "limits", "flops"), "x", "limits.flops is 'x'; expected a number"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_damaged_parts_are_named(file: Path, name: str) -> None:
    place, value, said = WRONG_PARTS[name]
    content = part = json.loads(file.read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidArgumentError) as caught:
        read_results(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_null_is_as_if_nothing_stood_there(file: Path) -> None:
    content = json.loads(file.read_text())
    content["machine"] |= {"load": None, "num_threads": None, "governor": None}
    content["systems"][0]["gate"]["logprob_error"] = None
    file.write_text(json.dumps(content))
    results = read_results(file)
    text = "\n".join(tables(results)) + render([results], "t")
    assert "load before" not in text and "governor" not in text and "threads" not in text


BENCH_ROW = {
    "case": {"kind": "decode", "num_tokens": 8, "batch": 1, "depth": 0},
    **{"samples": [20.0, 30.0], "mean": 25.0, "bytes_per_second": 1e9, "flops": 1e9},
    **{"percent_of_limit": 50.0, "limit": "memory", "gate": {"passed": True}},
}
BENCH = {
    **{"model": "m", "weights": "bf16", "isa": "avx2", "device": "cpu", "weight_bytes": 9},
    **{"date": "now", "processor": "p", "num_threads": 3, "native": {"isa": "avx2"}},
    "rows": [BENCH_ROW],
}
LOAD = {
    **{"concurrency": 4, "rate": None, "requests": 6, "prompt_tokens": 60, "answer_tokens": 48},
    **{"total_tokens_per_second": 99.5, "ttft_ms": {"p50": 3, "p90": 4, "p99": 5}},
    "itl_ms": {"p50": 1, "p90": 2, "p99": 3},
}
SERVED = {"octavo": "0.1.0", "client": "p", "asked": {"model": "m"}, "loads": [LOAD]}
EVALUATED = {
    "model": {"path": "/a/m", "weights": "f32", "weight_bytes": 9, "perplexity": {"value": 20.5}},
    **{"against": None, "divergence": None, "text": "Alice", "num_scored": 9},
}
DAMAGED: dict[str, dict[str, object]] = {
    "a machine": {**BENCH, "native": "x"},
    "a mean of 0": {**BENCH, "rows": [{**BENCH_ROW, "mean": 0}]},
    "no users": {**SERVED, "loads": [{**LOAD, "concurrency": None}]},
    "endless prompts": {**SERVED, "loads": [{**LOAD, "prompt_tokens": float("inf")}]},
    "no side": {"asked": {"model": "m"}, "rounds": [{"side": "", "concurrency": 1}]},
    "no stamp": {"headline-bf16": {"sources": "x"}},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_results_of_other_tools_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DAMAGED[name]))
    assert main(["report", str(tmp_path / "x.json")]) == 2
    assert re.search(r"is not whole: |; expected ", capsys.readouterr().err)


@pytest.mark.parametrize("content", [BENCH, SERVED, EVALUATED], ids=["bench", "serve", "eval"])
def test_the_machine_is_told_as_far_as_the_file_holds_it(
    tmp_path: Path, content: dict[str, object]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    results = read_results(tmp_path / "x.json")
    threads = [line for line in tables(results) if line.startswith("- threads")]
    assert threads == (["- threads: 3"] if "num_threads" in content else [])
    assert ("threads" in machine_of(results)) == bool(threads)
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["properties"]["machine"]
    jsonschema.validate(convert(content, "x")["machine"], schema)


def test_the_ranks_of_a_divided_model_are_told(tmp_path: Path) -> None:
    for ranks, expected in ((1, []), (4, ["- ranks: 4"])):
        (tmp_path / "x.json").write_text(json.dumps({**BENCH, "tensor_parallel_size": ranks}))
        lines = tables(read_results(tmp_path / "x.json"))
        assert [line for line in lines if line.startswith("- ranks")] == expected


def test_the_tables(file: Path) -> None:
    lines = list(tables(read_results(file)))
    assert "### Decoding, one sequence: 16 in, 8 out" in lines
    assert "| octavo int8 | 50.0 | 40.0 to 60.0 (3) | 71 (memory) |" in lines
    assert "| octavo int8 | 2.00 (2.00 to 2.00) | llama.cpp q8_0: 2.00 (2.00 to 2.00) |" in lines
    assert any("| vllm bf16 | m | all | absent & gone |" in line for line in lines)


def test_a_peer_with_fewer_bits_is_not_the_one_to_beat(file: Path) -> None:
    content = json.loads(file.read_text())
    content["systems"][1]["bits"] = 4.5
    file.write_text(json.dumps(content))
    found = table.ratio_table(read_results(file), "m & <b>", "decode")
    assert found is not None and found.rows[0][-1] == "-"


def test_a_peer_that_stood_still_has_no_ratio(file: Path) -> None:
    content = json.loads(file.read_text())
    content["rows"] = [row("octavo bf16", "decode", 2.5), row("vllm bf16", "decode", 0)]
    file.write_text(json.dumps(content))
    found = table.ratio_table(read_results(file), "m & <b>", "decode")
    assert found is not None and found.rows[0][1] == "-"


def test_the_page_holds_everything_and_asks_for_nothing(file: Path, tmp_path: Path) -> None:
    assert main(["report", str(file), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', 'x="#'))
    assert "<script" not in page and "a &lt;script&gt;title" in page
    assert page.count('<div class="wide"><svg') == page.count('<div class="narrow"><svg') == 9
    for color, _ in ENGINES.values():  # only where the page's own variables are set
        assert page.count(color) <= 2, color
    assert "prefers-color-scheme: dark" in page and "var(--c-octavo)" in page
    ids = re.findall(r'<clipPath id="(\w+)"', page)
    assert ids and len(ids) == len(set(ids))
    for text in ("the machine was busy before: load 1.7", "absent &amp; gone", "x.yaml"):
        assert text in page


def test_every_axis_has_its_unit(file: Path) -> None:
    from matplotlib.figure import Figure

    shown = sections([read_results(file)])
    assert [part.title for part in shown][-1] == "Quality against size"
    for part in shown:
        assert part.plot is not None
        for narrow in (False, True):
            figure = Figure()
            part.plot.draw(figure, narrow)
            for axes in figure.axes:
                assert axes.get_xlabel(), part.title
                assert axes.get_ylabel() or axes.get_yticklabels(), part.title


def test_pictures_are_written_and_what_lacks_is_said(file: Path, tmp_path: Path) -> None:
    results, folder = read_results(file), tmp_path / "pictures"
    content = json.loads(file.read_text())
    few = {**content, "rows": content["rows"][:1], "quality": []}  # a bar and a roofline
    file.write_text(json.dumps(few))
    assert main(["report", str(file), "--png", str(folder), "--svg", str(folder)]) == 0
    names = sorted(path.name.removeprefix("r-m_b_-") for path in folder.iterdir())
    assert names == ["decode.png", "decode.svg", "roofline.png", "roofline.svg"]
    assert lacking([results]) == ["joules: the machine counted none"]
    bare = Results("f", "t", results.machine, (), results.rows[:1], (), ())
    text = " ".join(lacking([bare]))
    assert "offered load" in text and "octavo eval --json" in text
    assert "Not in these files at all" in render([bare], "t")


def test_every_plot_has_a_file_in_the_folder(file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    files = []
    for folder, model in (("a", "org/name"), ("b", "org/name"), ("c", "x/../../../escaped")):
        made = {**row("octavo int8", "decode", 2.5, 3.5), "model": model}
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "r.json")
        files[-1].write_text(json.dumps({**content, "rows": [made], "quality": []}))
    pictures = tmp_path / "deep" / "er" / "pictures"
    written = write_pictures([read_results(each) for each in files], pictures, "svg")
    names = ["r-org_name-decode.svg", "r-org_name-decode-2.svg", "r-x_.._.._.._escaped-decode.svg"]
    assert [path.name for path in written] == names
    found = [path for path in tmp_path.rglob("*") if path.suffix == ".svg"]
    assert sorted(found) == sorted(written)


def test_without_matplotlib_it_says_what_to_do(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["report", str(file), "-o", str(tmp_path / "page.html")]) == 2
    assert "--output needs matplotlib" in capsys.readouterr().err
    assert main(["report", str(file)]) == 0
    assert "| octavo int8 |" in capsys.readouterr().out


def test_what_octavo_eval_wrote_has_its_bits() -> None:
    run = {
        "path": "/models/m",
        "weights": "int8",
        "weight_bytes": 1100,
        "dtype": "bf16",
        "perplexity": {"value": 20.5},
    }
    content = {
        "model": run,
        "against": {"weights": "f32", "weight_bytes": 4400},
        "divergence": {"mean_kl": 0.004, "perplexity_ratio": 1.01},
        "text": "Alice",
        "num_scored": 9,
    }
    found = quality_of_eval(content)
    assert (found["model"], found["bits"], found["mean_kl"]) == ("m", 8.0, 0.004)


def test_looks_differ_where_systems_do() -> None:
    names = [f"{engine} {form}" for engine in ENGINES for form in ("f32", "bf16", "int8", "int4")]
    looks = {(look(name).color, look(name).mark) for name in names}
    assert len(looks) == len(names)
    assert look("llama.cpp q8_0").mark == look("octavo int8").mark
    assert look("llama.cpp Q4_K_M").mark == look("octavo int4").mark
