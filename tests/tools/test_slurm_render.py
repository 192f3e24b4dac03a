"""`octavo slurm render`: what a site's file may say, and the scripts that come of it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from octavo.cli import main
from octavo.errors import InvalidArgumentError, OctavoError
from octavo.slurm.job import JobRequest, make_rows, read_rows
from octavo.slurm.render import render, request_of, shell_path, with_time_of
from octavo.slurm.site import Site, format_time, parse_time, read_site

SLURM = Path(__file__).parents[2] / "slurm"
PACE = SLURM / "clusters" / "pace.yaml"
LEAST = "name: here\nenvironment: ~/env\nscratch: /scratch\nnodes: {cpu: {}}\n"


def site_of(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(text, encoding="utf-8")
    return read_site(path)


TIMES = {
    "90": 5400,
    "90:30": 5430,
    "1:02:03": 3723,
    "2-0": 172800,
    "2-3:04": 183840,
    "2-3:04:05": 183845,
    "16:00:00": 57600,
}


@pytest.mark.parametrize("text", TIMES)
def test_times_are_those_of_slurm(text: str) -> None:
    assert parse_time(text, "--time") == TIMES[text]
    assert parse_time(format_time(TIMES[text]), "--time") == TIMES[text]


@pytest.mark.parametrize("text", ["", "soon", "-1", "1:2:3:4", "0:30", "1-", "4h"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--time is"):
        parse_time(text, "--time")


def test_a_site_takes_times_and_words_as_they_stand(tmp_path: Path) -> None:
    """YAML would make 57600 of 16:00:00, a truth value of `no`, and 7 of 007."""
    more = "time: 4:00:00\nmax_time: 16:00:00\naccount: 007\npartition: no\noffline: off\n"
    site = site_of(tmp_path, LEAST + more)
    assert (site.time, site.max_time, site.account) == ("4:00:00", "16:00:00", "007")
    assert site.partition == "no" and site.offline is False
    assert site.node("cpu").device == "cpu" and not site.node("cpu").has_gpu


MISTAKES = {
    "unknown key": ("acount: x", "unknown key 'acount' (did you mean 'account'?)"),
    "a number": ("cpus: many", "cpus is 'many'; expected a number"),
    "a truth": ("offline: maybe", "offline is 'maybe'; expected true or false"),
    "a list": ("modules: cuda/12", "modules is 'cuda/12'; expected a list"),
    "in a list": ("modules: [cuda, [gcc]]", "modules[1] is a list; expected one word"),
    "a time": ("time: 4 hours", "time is '4 hours'; expected a time as Slurm writes it"),
    "a table": ("time: {hours: 4}", "time is a table; expected a time"),
    "a size": ("memory: 4 GB", "memory is '4 GB'; expected a size"),
    "a shell's words": ("account: x; rm -r .", "expected one word"),
    "a path": ('home: "$(id)"', "expected a path without spaces"),
    "an option": ("sbatch: [mail]", "sbatch[0] is 'mail'; expected an option of sbatch"),
    "a key of a node": ("nodes: {h100: {gers: x}}", "nodes.h100 has the unknown key 'gers' (did"),
    "no gres": ("nodes: {h100: {}}", "nodes.h100 has no gres; expected what sbatch needs"),
    "no device": ("nodes: {h1000: {gres: gpu}}", "no device that octavo plans for (did you"),
    "no nodes": ("nodes: {}", "expected a table with the site's kinds of nodes"),
    "no YAML": ("nodes: {", "is no YAML"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_site_are_named(tmp_path: Path, name: str) -> None:
    line, said = MISTAKES[name]
    text = "" if line.startswith("nodes") else "nodes: {cpu: {}}\n"
    with pytest.raises(InvalidArgumentError) as caught:
        site_of(tmp_path, f"name: here\nenvironment: /e\nscratch: /s\n{text}{line}\n")
    assert said in str(caught.value) and str(tmp_path / "site.yaml") in str(caught.value)


def test_what_a_site_has_to_say(tmp_path: Path) -> None:
    for text, said in (("", "is empty"), ("- a", "is a list"), ("name: x", "has no 'nodes'")):
        with pytest.raises(InvalidArgumentError, match=said):
            site_of(tmp_path, text)
    with pytest.raises(OctavoError, match=r"none\.yaml does not exist"):
        read_site(tmp_path / "none.yaml")


def test_nodes_may_have_values_of_their_own(tmp_path: Path) -> None:
    site = site_of(tmp_path, LEAST.replace("{}", "{cpus: 3, modules: []}") + "modules: [gcc]\n")
    node = site.node("cpu")
    assert site.of(node, "cpus") == 3 and site.of(node, "modules") == ()
    assert site.of(node, "memory") == "32G"


REFUSED = {
    "kind": ({"kind": "train"}, "expected one of bench, batch"),
    "node": ({"node": "a100"}, "--gpu is 'a100', which pace does not have (did you mean 'a100-"),
    "format": ({"formats": ("int5",)}, "--formats has 'int5'"),
    "twice": ({"formats": ("int8", "int8")}, "names the same twice"),
    "batch sizes of eval": ({"kind": "eval", "batch_sizes": (1,)}, "--batch-sizes is 1, which a"),
    "input of bench": ({"input": "x"}, "--input is 'x', which a bench job does not take"),
    "no input": ({"kind": "batch"}, "a batch job needs --input"),
    "two servers": ({"kind": "serve", "formats": ("bf16", "int8")}, "a job serves one model"),
    "too long": ({"time": "5-0"}, "gives h100 jobs at most 3-00:00:00"),
    "no GPU": ({"kind": "gpu", "node": "cpu"}, "cpu of pace has no GPU"),
    "a line break": ({"extra": ("--stop", "\n")}, "cannot hold it"),
    "no ranks": ({"tensor_parallel_size": 0}, "--tensor-parallel-size is 0; expected a number"),
    "ranks of diff": ({"kind": "diff", "tensor_parallel_size": 2}, "2, which a diff job does not"),
    "ranks behind": ({"extra": ("-tp", "2")}, "-tp stands behind `--`"),
    "ranks behind, too": ({"extra": ("--tensor-parallel-size=2",)}, "would ask for one GPU only"),
    "a folder": ({"results": "a b"}, "--results is 'a b'; expected a path without"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_jobs_that_cannot_be_are_refused(name: str) -> None:
    changes, said = REFUSED[name]
    given = {"kind": "bench", "cluster": "pace.yaml", "node": "h100"} | changes
    with pytest.raises(InvalidArgumentError) as caught:
        render(JobRequest(**given), read_site(PACE))  # type: ignore[arg-type]
    assert said in str(caught.value)


GRES = {
    "gpu:h100:1": "gpu:h100:4",
    "gpu": "gpu:4",
    "gpu:1": "gpu:4",
    "gpu:h100": "gpu:h100:4",
    "gpu:1g.10gb:1,lscratch:100": "gpu:1g.10gb:4,lscratch:100",
}


@pytest.mark.parametrize("gres", GRES)
def test_a_divided_model_has_as_many_gpus_of_one_node(tmp_path: Path, gres: str) -> None:
    node = f'{{gres: "{gres}", gpus: 4, memory: 30G}}'
    site = site_of(tmp_path, LEAST.replace("cpu: {}", f"h100: {node}, cpu: {{}}"))
    text = render(JobRequest("serve", "c", "h100", tensor_parallel_size=4), site)
    lines = [line.partition(" ")[2] for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (f"--gres={GRES[gres]}", "--nodes=1", "--cpus-per-task=16", "--mem=120G"):
        assert wanted in lines
    assert "--device cuda --tensor-parallel-size 4" in text
    assert request_of(text).tensor_parallel_size == 4
    assert f"--gres={gres}\n" in render(JobRequest("serve", "c", "h100"), site)
    with pytest.raises(InvalidArgumentError, match="h100 of here has 4 GPUs; expected no more"):
        render(JobRequest("serve", "c", "h100", tensor_parallel_size=5), site)


def test_ranks_on_a_node_without_gpus_share_it(tmp_path: Path) -> None:
    text = render(JobRequest("bench", "c", "cpu", tensor_parallel_size=2), site_of(tmp_path, LEAST))
    assert "--device cpu --tensor-parallel-size 2" in text and "gres" not in text
    assert "--cpus-per-task=4\n" in text and "--mem=32G\n" in text


def test_a_gres_without_gpus(tmp_path: Path) -> None:
    site = site_of(tmp_path, LEAST.replace("cpu: {}", "h100: {gres: h100:1}"))
    with pytest.raises(InvalidArgumentError, match="gres is 'h100:1', from which a job of 2 GPUs"):
        render(JobRequest("serve", "c", "h100", tensor_parallel_size=2), site)


def test_rows_are_formats_times_batch_sizes() -> None:
    request = JobRequest("bench", "c", "h100", formats=("bf16", "int8"), batch_sizes=(1, 16))
    rows = make_rows(request, True)
    assert [row.name for row in rows] == ["bf16-b1", "bf16-b16", "int8-b1", "int8-b16"]
    assert "--dtype bf16 --quantize int8 --batch 16" in str(rows[3])
    assert "--device cpu --quantize int8 --batch 16" in str(make_rows(request, False)[3])
    text = "\n".join(map(str, rows))
    assert read_rows(f"# a remark\n\n{text}\n") == rows
    odd = JobRequest("bench", "c", "cpu", extra=("--speculative-config", '{"method": "it\'s"}'))
    (row,) = make_rows(odd, False)
    assert read_rows(str(row)) == [row]
    assert row.filled({"model": "m"})[2] == "m" and '{"method": "it\'s"}' in row.filled({})


def test_the_node_replaces_nothing_in_a_users_own_words() -> None:
    words = ("--system", "Answer as {model} would, {{results}}", "--stop", "}{")
    places = {"model": "m", "results": "r"}
    for kind, path in (("batch", "in-{model}.txt"), ("serve", ""), ("bench", "")):
        (row,) = make_rows(JobRequest(kind, "c", "cpu", input=path, extra=words), False)
        (read,) = read_rows(str(row))
        filled = read.filled(places)
        assert "m" in filled and [word for word in filled if word in words] == list(words)
        assert not path or filled[2:4] == [path, "r/auto.jsonl"]
    (row,) = make_rows(JobRequest("gpu", "c", "h100", extra=("{results}",)), True)
    assert row.filled(places)[-1] == "{results}"


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029"])
def test_a_row_ends_where_a_shells_line_does(mark: str) -> None:
    (row,) = make_rows(JobRequest("serve", "c", "cpu", extra=("--alias", f"a{mark}b")), False)
    assert read_rows(f"{row}\n") == [row]


def test_modules_are_single_words_of_the_script(tmp_path: Path) -> None:
    names = ["gcc/12.3.0", "cuda/12.6.1(default)", "gcc/12&touch"]
    site = site_of(tmp_path, LEAST + f"modules: [{', '.join(names)}]\n")
    text = render(JobRequest("bench", "c", "cpu"), site)
    lines = [line for line in text.splitlines() if line.startswith("module load")]
    assert [shlex.split(line)[2] for line in lines] == names and lines[0].split()[2] == names[0]
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["", "alone", "a x\na y", "b 'x", "../a x"])
def test_rows_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="rows"):
        read_rows(text)


def test_a_script_tells_what_it_was_asked_for() -> None:
    request = JobRequest(
        "eval", "pace.yaml", "h200", model="a/b", formats=("int8",), time="3:00:00"
    )
    text = render(request, read_site(PACE))
    assert request_of(text) == request
    edited = text.replace("--time=03:00:00", "--time=1-0")
    assert with_time_of(request_of(edited), edited).time == "1-0"
    for damaged in ("echo", text.replace("# request: {", "# request: {,")):
        with pytest.raises(InvalidArgumentError, match=r"octavo slurm render|damaged"):
            request_of(damaged)


def test_paths_keep_their_home_and_nothing_else() -> None:
    assert shell_path("~/a") == '"$HOME/a"' and shell_path("$TMPDIR") == '"$TMPDIR"'
    with pytest.raises(InvalidArgumentError, match="~somebody"):
        shell_path("~somebody/a")


# Files of slurm/examples, and the command that makes each.
EXAMPLES = {
    "pace-bench-h100": "bench --gpu h100 -m ORG/NAME -f bf16,int8,int4 -b 1,16,64",
    "pace-batch-a100": "batch --gpu a100-40 -m ORG/NAME -i prompts.jsonl -f bf16,int8,int4 --time "
    "8:00:00 -- --max-tokens 200",
    "pace-serve-h200": "serve --gpu h200 -m ORG/NAME -- --max-num-seqs 128",
    "pace-serve-70b-h100": "serve --gpu h100 -m ORG/NAME-70B -tp 4 -- --max-num-seqs 128",
    "pace-eval-h100": "eval --gpu h100 -m ORG/NAME -f bf16,int8,int4",
    "pace-diff-cpu": "diff --gpu cpu -m ORG/NAME -f f32,bf16",
    "pace-gpu-h100": "gpu --gpu h100 --time 0:30:00 -- lease",
    "generic-cpu-bench": "bench -f bf16,int8",
}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in (SLURM / "examples").glob("*.sbatch")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_is_rendered(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To make them anew: octavo slurm render … -o slurm/examples/NAME.sbatch, in the root."""
    monkeypatch.chdir(SLURM.parent)
    kind, *options = EXAMPLES[name].split()
    cluster = "generic-cpu" if name.startswith("generic") else "pace"
    command = ["slurm", "render", kind, "-c", f"slurm/clusters/{cluster}.yaml", *options]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text == (SLURM / "examples" / f"{name}.sbatch").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("# request")]
    assert max(map(len, lines)) < 130
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^#SBATCH --signal=B:USR1@120$", text, re.M)


def test_options_that_the_command_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["slurm", "render", "batch", "-c", str(PACE), "--gpu", "h100", "-i", "in.jsonl"]
    assert main([*command, "--", "--max-tokns", "9"]) == 2
    assert "no option --max-tokns (did you mean --max-tokens?)" in capsys.readouterr().err
    assert main([*command, "--", "--max-tokens=9"]) == 0
    assert main(["slurm"]) in (0, 2) and main(["slurm", "rendr"]) == 2
    assert main(["slurm", "render", "bench", "-c", str(PACE), "-b", "0"]) == 2
    assert "--batch-sizes is '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "behind", "problem"),
    [
        ("bench -f int8 -b 1,4", "--batch 3", "row int8-b1 has --batch already"),
        ("bench -f int8 -b 1,4", "-b 3", "row int8-b1 has --batch already"),
        ("bench -f int8", "--quantize=int4", "row int8 has --quantize already"),
        ("eval -f bf16", "--dtype f32", "row bf16 has --dtype already"),
        ("batch -i in.jsonl", "-m other", "row auto has --model already"),
        ("serve", "--port 80", "row serve has --port already"),
        ("batch -i in.jsonl", "--overwrite", "begin the batch anew whenever the job comes back"),
        ("bench", "--batch 3 --quantize int4", ""),
        ("bench -f int8 -b 4", "-p 99", ""),
    ],
)
def test_options_that_the_job_sets_itself(
    capsys: pytest.CaptureFixture[str], job: str, behind: str, problem: str
) -> None:
    """Otherwise row int8-b1 would hold figures of another format and another batch."""
    command = ["slurm", "render", *job.split(), "-c", str(PACE), "--gpu", "h100"]
    assert main([*command, "--", *behind.split()]) == (2 if problem else 0)
    assert problem in capsys.readouterr().err.replace("\n", " ")
