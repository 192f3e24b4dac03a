"""`octavo slurm work`: rows that run, stop, come back; builds and weights that are made once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from text_helpers import tiny_model
from weights_helpers import write_gguf

from octavo.cli import main
from octavo.config import Environment
from octavo.errors import InvalidArgumentError, ModelNotFoundError, OctavoError, WeightsError
from octavo.slurm.build import build_for_node, locked
from octavo.slurm.collect import collect
from octavo.slurm.job import KINDS, Row
from octavo.slurm.node import Gpu, NodeInfo
from octavo.slurm.stage import model_bytes, stage
from octavo.slurm.work import FAILED, FINISHED, STOPPED, JobId, Preparation, Worker, work
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.hub import resolve_model

NODE = NodeInfo("Some CPU @ 2 GHz", Gpu("NVIDIA H100", "9.0", "555.1"))


def python(name: str, code: str, *words: str) -> Row:
    return Row(name, (sys.executable, "-c", code, *words))


def worker(folder: Path, kind: str = "bench", drain: float = 5.0, **job: Any) -> Worker:
    said: list[str] = []
    made = Worker(kind, KINDS[kind], folder, JobId(**job), NODE, drain, said.append)
    made.said = said  # type: ignore[attr-defined]
    return made


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())  # type: ignore[no-any-return]


GOOD = "import json; print(json.dumps({'rows': [], 'x': 7}))"


def test_rows_run_once_and_say_what_ran_them(tmp_path: Path) -> None:
    rows = [python("a", GOOD), python("b", GOOD + "; raise SystemExit(1)")]
    first = worker(tmp_path / "deep" / "folder", job="12", node="n1", array_task="3")
    assert first.run(rows) == FINISHED and first.progressed
    found = result(first.folder, "b")
    assert found["x"] == 7 and found["job"]["exit_code"] == 1  # a gate that failed is a result
    (run,) = found["job"]["runs"]
    assert (run["job"], run["node"], run["array_task"]) == ("12", "n1", "3")
    assert run["gpu"]["name"] == "NVIDIA H100" and run["ended"] >= run["began"]
    before = (first.folder / "a.json").read_bytes()
    second = worker(first.folder)
    assert second.run(rows) == FINISHED and "2 of 2 rows are done" in second.said[0]  # type: ignore[attr-defined]
    assert (first.folder / "a.json").read_bytes() == before


FAILURES = {
    "a mistake": GOOD + "; raise SystemExit(2)",
    "a traceback": "raise ValueError",
    "no JSON": "print('hm')",
    "a crash": "import os; os.abort()",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_row_that_fails_does_not_stop_the_others(tmp_path: Path, name: str) -> None:
    rows = [python("bad", FAILURES[name]), python("good", GOOD)]
    assert worker(tmp_path).run(rows) == FAILED
    assert not (tmp_path / "bad.json").exists() and result(tmp_path, "good")["x"] == 7
    assert worker(tmp_path).run([Row("none", ("no-such-program",))]) == FAILED


def test_another_jobs_results_are_left_alone(tmp_path: Path) -> None:
    worker(tmp_path).run([python("a", GOOD)])
    with pytest.raises(InvalidArgumentError, match="result of another command"):
        worker(tmp_path).run([python("a", GOOD, "more")])
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match="no result of a job"):
        worker(tmp_path).run([python("b", GOOD)])


def test_answers_that_are_missing_are_no_result(tmp_path: Path) -> None:
    """Python's own exit code after a traceback is 1, as that of a batch with bad lines."""
    (tmp_path / "in{}").write_text("one\n\ntwo\n")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '{{}}' >>{tmp_path}/a.jsonl; exit 1\n")
    program.chmod(0o755)
    row = Row("a", (str(program), "batch", str(tmp_path / "in{{}")))
    assert worker(tmp_path, "batch").run([row]) == FAILED
    assert worker(tmp_path, "batch").run([row]) == FINISHED
    assert (
        result(tmp_path, "a")["num_answers"] == 2 and len(result(tmp_path, "a")["job"]["runs"]) == 2
    )


SLOW = """
import signal, sys, time
def stop(number, _):
    open(sys.argv[1], "a").write(f"{signal.Signals(number).name}\\n")
    if sys.argv[2] == "ends": sys.exit(130)
for each in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM): signal.signal(each, stop)
open(sys.argv[1], "a").write("began\\n")
while True: time.sleep(0.05)
"""


def signalled(made: Worker, rows: Sequence[Row], number: signal.Signals, notes: Path) -> int:
    """The worker's code, with a signal to this process once the first row has begun."""

    def send() -> None:
        while not notes.is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with made.listening():
        code = made.run(rows)
    thread.join()
    return code


@pytest.mark.parametrize(
    ("kind", "number", "asked"),
    [
        ("bench", signal.SIGUSR1, ["SIGINT"]),
        ("batch", signal.SIGUSR1, ["SIGUSR1"]),
        ("batch", signal.SIGTERM, ["SIGUSR1"]),
        ("serve", signal.SIGUSR1, ["SIGTERM"]),
    ],
)
def test_a_signal_stops_what_runs(
    tmp_path: Path, kind: str, number: signal.Signals, asked: list[str]
) -> None:
    notes = tmp_path / "notes"
    rows = [python("slow", SLOW, str(notes), "ends"), python("later", GOOD)]
    made = worker(tmp_path, kind)
    code = signalled(made, rows, number, notes)
    assert code == (FINISHED if kind == "serve" else STOPPED)
    assert notes.read_text().split() == ["began", *asked]
    assert not (tmp_path / "slow.json").exists() and not (tmp_path / "later.runs.jsonl").exists()
    assert made.stopping == number and not made.progressed


def test_what_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.slurm.work._LAST_SECONDS", 0.3)
    notes = tmp_path / "notes"
    rows = [python("slow", SLOW, str(notes), "never")]
    assert signalled(worker(tmp_path, "batch", 0.3), rows, signal.SIGUSR1, notes) == STOPPED
    assert notes.read_text().split() == ["began", "SIGUSR1", "SIGINT"]


@pytest.mark.parametrize("progressed", [True, False])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_job_goes_back_as_long_as_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressed: bool, restarts: int
) -> None:
    asked: list[JobId] = []

    def requeue(job: JobId, say: object) -> bool:
        asked.append(job)
        return True

    monkeypatch.setattr("octavo.slurm.work.requeue", requeue)
    made = worker(tmp_path, job="5", restarts=restarts)
    made.stopping, made.progressed = signal.SIGUSR1, progressed
    code = work(made, [python("a", GOOD)], Preparation())
    comes_back = progressed or not restarts
    assert [job.job for job in asked] == (["5"] if comes_back else [])
    assert code == (FINISHED if comes_back else FAILED)
    made.stopping = signal.SIGTERM
    assert work(made, [python("a", GOOD)], Preparation()) == FAILED and len(asked) == comes_back


def checkout(folder: Path) -> Path:
    (folder / "csrc").mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc/a.cpp"):
        (folder / name).write_text(name)
    return folder


def test_octavo_is_built_once_for_each_state_and_node(tmp_path: Path) -> None:
    source, builds = checkout(tmp_path / "source"), tmp_path / "builds"
    ran: list[list[str]] = []

    def run(command: Sequence[str], log: Path) -> int:
        ran.append(list(command))
        if "--target" in command:
            Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return 0

    first = build_for_node(source, builds, NODE, run)
    assert (
        len(ran) == 2
        and "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real" in ran[0]
    )
    assert build_for_node(source, builds, NODE, run) == first and len(ran) == 2
    other = build_for_node(source, builds, NodeInfo("Some CPU @ 2 GHz", None), run)
    assert other != first and "--config-settings=cmake.define.OCTAVO_CUDA=OFF" in ran[2]
    (source / "csrc" / "a.cpp").write_text("changed")
    assert build_for_node(source, builds, NODE, run) not in (first, other)
    assert not list(builds.glob("*.lock")) and not list(builds.glob("*.partial"))
    with pytest.raises(InvalidArgumentError, match="no checkout of octavo"):
        build_for_node(tmp_path, builds, NODE, run)


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    def run(command: Sequence[str], log: Path) -> int:
        log.write_text("first\nno nvcc\n")
        return 1

    with pytest.raises(OctavoError, match=r"could not be built for some-cpu.*(?s:.)*no nvcc"):
        build_for_node(checkout(tmp_path / "source"), tmp_path / "builds", NODE, run)
    assert not list((tmp_path / "builds").glob("*.lock"))


def test_one_holds_the_lock_and_the_dead_hold_none(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "x.lock", [0], [0]

    def hold() -> None:
        with locked(lock, beat=0.02, stale=0.5, say=lambda _: None):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    lock.mkdir()  # of a job that was killed
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and not lock.exists()


def test_weights_are_copied_once_and_keep_their_name(tmp_path: Path) -> None:
    home = tmp_path / "home"
    model = tiny_model(home / "models" / "org--name")
    environment = Environment(home, 1, "auto")
    for name, called in (("org/name", "org/name"), (str(model), "org--name")):
        local = tmp_path / called.replace("/", "")
        got, own_home, said = stage(name, environment, local)
        assert got == called and own_home is not None and "on the node" in said
        (copy,) = (own_home / "models").iterdir()
        assert {p.name for p in copy.iterdir()} == {p.name for p in model.iterdir()}
        mark = copy.stat().st_mtime_ns
        assert stage(name, environment, local)[0] == called and copy.stat().st_mtime_ns == mark
    assert stage("org/name", environment, None)[:2] == ("org/name", None)
    for missing in ("org/other", "smollm2-135m"):  # it is not fetched: nodes have no network
        with pytest.raises(ModelNotFoundError, match="octavo pull"):
            stage(missing, environment, None)


def weights_of(home: Path, called: str) -> bytes:
    return (resolve_model(called, Environment(home, 1, "auto")) / "weights").read_bytes()


def test_another_models_copy_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of two runs have one name, and so has a model that was trained again."""
    environment, local = Environment(tmp_path / "home", 1, "auto"), tmp_path / "local"
    models = [tmp_path / run / "checkpoint-1000" for run in ("lr1", "lr2")]
    for model in models:
        model.mkdir(parents=True)
        (model / "weights").write_text(model.parent.name)
    for model in models:
        called, home, _ = stage(str(model), environment, local)
        assert home is not None and called == model.name
        assert weights_of(home, called) == model.parent.name.encode()
    (models[0] / "weights").write_text("new")  # of as many bytes
    called, home, _ = stage(str(models[0]), environment, local)
    assert home is not None and weights_of(home, called) == b"new"
    monkeypatch.chdir(models[0].parent)  # in which that name is another model
    called, home, _ = stage(str(models[1]), environment, local)
    assert home is not None and weights_of(home, called) == b"lr2"


def test_all_parts_of_a_gguf_are_copied(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tensors_per_part=9)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    size = sum(part.stat().st_size for part in parts)
    assert len(parts) > 1 and model_bytes(parts[1]) == size
    environment = Environment(tmp_path / "home", 1, "auto")
    called, home, _ = stage(str(parts[1]), environment, tmp_path / "local")
    assert home is not None and Path(called).is_relative_to(home)
    assert [part.name for part in GgufParts(Path(called)).paths] == [part.name for part in parts]
    parts[0].unlink()
    with pytest.raises(WeightsError, match="these are missing beside it"):
        stage(str(parts[1]), environment, tmp_path / "local")


def test_a_full_disk_leaves_weights_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "home" / "models" / "tiny")
    monkeypatch.setattr("octavo.slurm.stage._SPARE", 1e15)
    name, home, said = stage("tiny", Environment(tmp_path / "home", 1, "auto"), tmp_path / "local")
    assert (name, home) == ("tiny", None) and "free for" in said


def test_results_are_merged_and_gaps_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = 'print(\'{"rows": [{"name": "tg9", "mean": 3.5}]}\')'
    worker(tmp_path / "one", job="1", node="n1").run([python("a", code)])
    worker(tmp_path / "two", "batch").run([Row("b", ("true", "x", str(tmp_path)))])
    (tmp_path / "two" / "note.json").write_text("[1]")
    (tmp_path / "two" / "c.runs.jsonl").write_text('{"began": "x", "node": "n2"}\n{"beg')
    assert (
        main(["slurm", "collect", str(tmp_path / "one"), str(tmp_path / "two"), "--no-report"]) == 1
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "tg9 3.5 tokens/s" in shown and "0 answers" in shown and "not done" in shown
    merged = json.loads((tmp_path / "one" / "collected.json").read_text())
    assert [each["job"]["name"] for each in merged["results"]] == ["a", "b"]
    assert merged["unfinished"] == {str(tmp_path / "two" / "c"): [{"began": "x", "node": "n2"}]}
    assert len(collect([tmp_path]).results) == 2  # the merged file is none of them
    (tmp_path / "two" / "bad.json").write_text("{")
    for folder, said in ((tmp_path, "is no JSON"), (tmp_path / "x", "is no folder")):
        assert main(["slurm", "collect", str(folder)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["slurm", "collect", str(tmp_path / "empty")]) == 2
    assert "there are no results of jobs" in capsys.readouterr().err


def test_figures_are_those_of_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `octavo eval` writes, and a row of `octavo bench` whose gate failed."""
    model = str(tiny_model(tmp_path / "tiny"))
    options = ("--load-format", "dummy", "--random", "40", "--device", "cpu", "--json")
    assert (
        worker(tmp_path / "out", "eval").run([Row("e", ("octavo", "eval", model, *options))]) == 0
    )
    code = 'print(\'{"rows": [{"name": "tg9", "mean": null}]}\')'
    worker(tmp_path / "out").run([python("b", code)])
    assert main(["slurm", "collect", str(tmp_path / "out"), "--no-report"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tg9 gate failed" in shown
    perplexity = result(tmp_path / "out", "e")["model"]["perplexity"]["value"]
    assert f"perplexity {perplexity:.3f}" in shown


def test_work_as_a_job_calls_it(tmp_path: Path) -> None:
    """A whole process: one row of an array, on a copy of the model; then nothing is left."""
    tiny_model(tmp_path / "home" / "models" / "tiny")
    (tmp_path / "in.txt").write_text("fox\nship\n")
    rows = "".join(
        f"b{n} octavo batch in.txt {{results}}/b{n}.jsonl --model {{model}} --max-tokens {n} "
        "--load-format dummy --device cpu\n"
        for n in (2, 3)
    )
    command = [*(sys.executable, "-m", "octavo", "slurm", "work", "--kind", "batch")]
    command += ["--results", "out", "--model", "tiny", "--local", "local"]
    slurm = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1", "SLURMD_NODENAME": "n9"}
    variables = {**os.environ, **slurm, "OCTAVO_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=variables,
        input=rows,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "out", "b3")
    assert found["num_answers"] == 2 and found["job"]["runs"][0]["job"] == "77"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "b3.json",
        "b3.jsonl",
        "b3.runs.jsonl",
    }
    first = json.loads((tmp_path / "out" / "b3.jsonl").read_text().splitlines()[0])
    assert first["response"]["body"]["model"] == "tiny"


def test_a_signal_before_the_rows_sends_the_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over while octavo is built: the build ends, and the next run begins it anew."""
    asked: list[JobId] = []
    monkeypatch.setattr("octavo.slurm.work.requeue", lambda job, _: asked.append(job) or True)
    made = worker(tmp_path / "out", job="8")

    def build(source: Path, builds: Path, node: NodeInfo, run: Any) -> Path:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        run(["sleep", "60"], tmp_path / "log")
        raise AssertionError("a signal has come")

    monkeypatch.setattr("octavo.slurm.work.build_for_node", build)
    started = time.monotonic()
    assert work(made, [python("a", GOOD)], Preparation(tmp_path, tmp_path)) == FINISHED
    assert [job.job for job in asked] == ["8"] and time.monotonic() - started < 30
    assert not (tmp_path / "out").exists()
