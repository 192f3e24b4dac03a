"""`octavo slurm preflight`: every thing that can be wrong is found, and named; without a Slurm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_helpers import tiny_model

from octavo.cli import main
from octavo.config import Environment
from octavo.plan.devices import GPUS
from octavo.plan.plan import ModelToPlan
from octavo.slurm.estimate import Sizes, estimate
from octavo.slurm.job import JobRequest, make_rows
from octavo.weights.model_files import read_model

LLAMA = Path(__file__).parents[2] / "benchmarks" / "shapes" / "llama-3.2-1b"
# A site in which everything is right; NVCC stands for a program that the tests write.
SITE = """
name: here
environment: {environment}
source: {root}/source
scratch: {root}/scratch
home: {root}/home
modules: [cuda/12.6]
max_time: 1-0
nodes:
  h100: {{gres: gpu:h100:1}}
  a10: {{gres: gpu:a10:1}}
"""
PYTHON = "#!/bin/sh\n[ {code} = 0 ] || echo No module named ninja\necho 0.1.0\nexit {code}\n"
# What a login shell would have of Lmod.
MODULE = 'module() { echo "Unable to locate $2" | grep -v cuda/12.6; [ "$2" = cuda/12.6 ]; }\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a site, its environment and checkout, a home with a model, and nvcc."""
    programs = tmp_path / "bin"
    (tmp_path / "env" / "bin").mkdir(parents=True)
    programs.mkdir()
    write_program(tmp_path / "env" / "bin" / "python", PYTHON.format(code=0))
    write_program(programs / "nvcc", "#!/bin/sh\necho Cuda compilation tools, release 12.6, V12\n")
    (tmp_path / "source" / "csrc").mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (tmp_path / "source" / name).touch()
    tiny_model(tmp_path / "home" / "models" / "tiny")
    (tmp_path / "site.yaml").write_text(SITE.format(environment=tmp_path / "env", root=tmp_path))
    # `bash -l` reads this in place of the user's own files, and then sets PATH anew.
    (tmp_path / ".bash_profile").write_text(f"{MODULE}PATH={programs}:$PATH\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "fox"}\n' * 50)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "another"))  # the job has the site's
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr("octavo.slurm.preflight.shutil.which", lambda name: None)
    monkeypatch.setattr("octavo.slurm.node.shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def checks_of(capsys: pytest.CaptureFixture[str], *render: str) -> tuple[int, dict[str, Any]]:
    """The exit code of preflight, and name -> (status, what was said)."""
    command = ["slurm", "render", *render[:1], "-c", "site.yaml", "--gpu", "h100"]
    assert main([*command, "-m", "tiny", "-o", "job.sbatch", *render[1:]]) == 0
    capsys.readouterr()
    code = main(["slurm", "preflight", "job.sbatch", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] == (code == 0)
    return code, {each["name"]: (each["status"], each["said"]) for each in found["checks"]}


@pytest.fixture(autouse=True)
def weights_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has a configuration alone."""
    monkeypatch.setattr("octavo.weights.checkpoint.open_checkpoint", lambda files: None)


def test_nothing_stands_in_the_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checks_of(capsys, "batch", "-i", "in.jsonl")
    assert code == 0
    unseen = {name for name, (status, _) in found.items() if status == "unknown"}
    assert unseen == {"queue", "driver"}, "which are not on this machine"
    others = {status for name, (status, _) in found.items() if name not in unseen}
    assert others == {"ok"}
    assert "nvcc 12.6" in found["nvcc"][1] and "50 prompts" in found["input"][1]
    assert "not built yet" in found["source"][1] and "cuda/12.6" in found["modules"][1]
    assert main(["slurm", "preflight", "job.sbatch"]) == 0
    assert "not seen" in capsys.readouterr().out


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


WRONG = {
    "modules": ("site.yaml", "cuda/12.6", "cuda/99", "Unable to locate cuda/99"),
    "nvcc": ("bin/nvcc", "release 12.6", "release 11.8", "expected 12.4 or newer"),
    "environment": ("env/bin/python", "[ 0 = 0 ]", "[ 1 = 0 ]", "slurm/README.md"),
    "input": ("in.jsonl", '{"prompt": "fox"}\n', "\n", "in.jsonl is empty"),
    "disk": ("site.yaml", "scratch: ", "scratch: /proc", "cannot be written by you"),
    "source": ("site.yaml", "/source", "/elsewhere", "no checkout of octavo"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, old, new, said = WRONG[name]
    edit(place / file, old, new)
    if name == "environment":
        edit(place / file, "exit 0", "exit 1")
    monkeypatch.setattr(
        "octavo.slurm.preflight.os.access", lambda path, _: str(path)[:5] != "/proc"
    )
    code, found = checks_of(capsys, "batch", "-i", "in.jsonl")
    assert code == 1 and found[name][0] == "failed" and said in found[name][1]
    assert main(["slurm", "preflight", "job.sbatch"]) == 1
    assert f"not ready: {name}\n" in capsys.readouterr().err


def test_weights_have_to_be_here(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The nodes have no network; nothing is fetched by the check either."""
    code, found = checks_of(capsys, "eval", "-m", "org/name")
    assert code == 1 and "octavo pull org/name" in found["weights"][1]
    assert found["memory"][0] == found["time"][0] == "unknown", "it is told once"


def test_a_script_may_be_edited(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks_of(capsys, "eval", "--time", "4:00:00")
    edit(place / "job.sbatch", "--time=04:00:00", "--time=2-0")
    assert main(["slurm", "preflight", "job.sbatch", "--json"]) == 1
    said = capsys.readouterr().out
    assert "was edited" in said and "at most 1-0" in said


def test_time_and_memory_are_those_of_the_plan(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "home" / "models" / "llama").symlink_to(LLAMA)
    code, found = checks_of(capsys, "bench", "-m", "llama", "-b", "4000,1", "--time", "1:00:00")
    assert found["memory"][0] == "ok" and "4000 x 512 tokens" in found["memory"][1]
    code, found = checks_of(capsys, "bench", "-m", "llama", "-b", "4600,1", "--time", "1:00:00")
    assert code == 1 and found["memory"][0] == "failed"
    assert (
        "with --kv-dtype int8, or --tensor-parallel-size 2, or --batch-sizes 42"
        in found["memory"][1]
    )
    edit(place / "site.yaml", f"source: {place}/source\n", "")
    code, found = checks_of(capsys, "diff", "-m", "llama", "--time", "1")
    assert code == 0 and found["time"][0] == "ok"
    (place / "in.jsonl").write_text(("x" * 4000 + "\n") * 90_000)
    options = ("-m", "llama", "-i", "in.jsonl", "--time", "10")
    code, found = checks_of(capsys, "batch", *options)
    assert code == 0 and found["time"][0] == "warning" and "comes back about" in found["time"][1]


def test_the_memory_is_that_of_each_gpu(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights take 2.3 GiB, or 1.1 on each of four GPUs, which have the embedding whole."""
    (place / "home" / "models" / "llama").symlink_to(LLAMA)
    options = ("bench", "-m", "llama", "-b", "8000", "--time", "1:00:00")
    code, found = checks_of(capsys, *options)
    assert code == 1 and "--tensor-parallel-size 4" in found["memory"][1]
    code, found = checks_of(capsys, *options, "-tp", "4")
    assert found["memory"][0] == "ok" and "SXM on each of 4, for 8000 x" in found["memory"][1]
    code, found = checks_of(capsys, *options, "-tp", "3")
    assert code == 1 and "32 attention heads, which cannot be divided" in found["memory"][1]


def test_a_module_is_one_word_of_the_shell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place / "site.yaml", "cuda/12.6", "cuda/99&touch")
    _, found = checks_of(capsys, "eval")
    assert "Unable to locate cuda/99&touch" in found["modules"][1]


def test_options_that_are_no_numbers_are_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, option in (("batch", "--max-num-seqs"), ("batch", "-n"), ("bench", "--batch")):
        words = ("-i", "in.jsonl") if kind == "batch" else ()
        code, found = checks_of(capsys, kind, *words, "--", option, "abc")
        assert code == 1 and f"{option} is 'abc'; expected a whole number" in found["memory"][1]


@pytest.mark.parametrize("words", ["--max-tokens=300", "-n 300", "-n300", "--max-tokens 300"])
def test_the_plan_is_of_the_jobs_options(words: str) -> None:
    model = ModelToPlan.of(read_model(LLAMA))
    extra = ("--max-num-seqs=150", "--kv-dtype=f32", *words.split())
    request = JobRequest("batch", "c", "h100", input="x", extra=extra)
    plans = []
    for asked in (request, replace(request, extra=extra[2:])):
        found = estimate(
            *(asked, make_rows(asked, True), model, 10**9, GPUS["h100"]),
            Environment(home=None, num_threads=1, isa="auto"),
            builds=False,
            sizes=Sizes(640, 64_000),
        )
        assert found.plan is not None
        plans.append(found.plan)
    assert [plan.request.concurrency for plan in plans] == [150, 64]
    assert [plan.request.context for plan in plans] == [400, 400]
    assert [plan.options.kv_dtype for plan in plans] == ["f32", "bf16"]


def test_seconds_are_work_over_speed() -> None:
    """640 prompts of 100 tokens by 64, answers of 256: ten times 256 steps of 64 sequences."""
    model = ModelToPlan.of(read_model(LLAMA))
    request = JobRequest("batch", "c", "h100", input="x", batch_sizes=(64,))
    environment = Environment(home=None, num_threads=1, isa="auto")
    arguments = (model, 2_500_000_000, GPUS["h100"], environment)
    sizes = Sizes(640, 64_000)
    found = estimate(request, make_rows(request, True), *arguments, builds=False, sizes=sizes)
    assert found.plan is not None and found.plan.request.context == 356
    speed = found.plan.speed
    expected = 20 + 5 + 64_000 / speed.prefill + 10 * 256 * speed.decode_step
    assert found.seconds == {"auto-b64": pytest.approx(expected)}
    longer = replace(request, extra=("--max-tokens", "512"))
    more = estimate(longer, make_rows(longer, True), *arguments, builds=True, sizes=sizes)
    assert more.seconds["auto-b64"] - found.seconds["auto-b64"] > 900 + 10 * 256 * speed.decode_step
