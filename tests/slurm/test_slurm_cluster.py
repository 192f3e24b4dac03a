"""Jobs on a real Slurm: killed by a signal, at their limit, with their node; then resumed."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, wait_for

from octavo.cli import main

PROMPTS = 120
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(autouse=True)
def in_site(site: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    monkeypatch.setenv("OCTAVO_HOME", str(site / "home"))
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))


def render(name: str, *arguments: str) -> Path:
    script = Path(f"{name}.sbatch").absolute()
    assert main(["slurm", "render", "-m", "tiny", "-o", str(script), *arguments]) == 0
    return script


def answers(path: Path) -> dict[str, Any]:
    """Everything about each answer but the second at which it was given."""
    found = {}
    for line in path.read_bytes().splitlines():
        record = json.loads(line)
        del record["response"]["body"]["created"], record["response"]["request_id"]
        assert record["custom_id"] not in found
        found[record["custom_id"]] = record
    return found


def count(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def wait_until_ended(cluster: Cluster, number: str) -> str:
    wait_for(f"job {number} has ended", lambda: cluster.job(number, "JobState") in ENDED)
    return cluster.job(number, "JobState")


def wait_until_pending(cluster: Cluster, number: str) -> None:
    wait_for(f"job {number} is requeued", lambda: cluster.job(number, "JobState") == "PENDING")


def write_prompts(path: Path) -> None:
    """Half of them greedy, half drawn, by seeds that the line's name decides."""
    lines = [
        {"custom_id": f"p{i}", "prompt": f"fox {i} ship", "temperature": i % 2, "max_tokens": 200}
        for i in range(PROMPTS)
    ]
    path.write_text("".join(json.dumps(line | {"ignore_eos": True}) + "\n" for line in lines))


def test_a_batch_that_is_killed_gives_the_answers_of_one_that_is_not(
    cluster: Cluster, site: Path
) -> None:
    """By the signal before the limit, at the limit itself, and with the node; twice each."""
    write_prompts(site / "in.jsonl")
    command = ["batch", "in.jsonl", "whole.jsonl", "-m", "tiny", "--device", "cpu"]
    assert main(command) == 0
    whole = answers(site / "whole.jsonl")
    assert len(whole) == PROMPTS
    # Two prompts at a time: it takes some seconds, in which it is killed.
    common = ("batch", "-c", "cluster.yaml", "-i", "in.jsonl", "-b", "2")
    folders = {name: site / f"results-{name}" for name in ("signal", "limit")}
    scripts = {name: render(name, *common, "-r", folder.name) for name, folder in folders.items()}
    # The one gets no warning before its limit (SIGCONT is none).
    more = {"signal": (), "limit": ("--signal=B:CONT@1",)}
    jobs = {name: cluster.submit(script, *more[name]) for name, script in scripts.items()}
    files = {name: folder / "auto-b2.jsonl" for name, folder in folders.items()}
    for file in files.values():
        wait_for(f"{file.parent.name} has answers", lambda file=file: count(file) > 1)
    # Slurm sends this signal before the limit; the job ends in good order and requeues itself.
    cluster.ask("scancel", "--signal=USR1", "--batch", jobs["signal"])
    # And this one hangs until its time is over: Slurm continues it, and kills it.
    cluster.freeze(jobs["limit"])
    cluster.ask("scontrol", "update", f"JobId={jobs['limit']}", "EndTime=now+1")
    wait_until_pending(cluster, jobs["signal"])
    assert wait_until_ended(cluster, jobs["limit"]) == "TIMEOUT"
    assert all(1 < count(file) < PROMPTS for file in files.values()), "they were killed too late"
    cluster.start_now(jobs["signal"])
    jobs["limit"] = cluster.submit(scripts["limit"])
    for name, file in files.items():
        before = count(file)
        wait_for(f"{name} goes on", lambda file=file, before=before: count(file) > before)
    cluster.kill_node()
    for number in jobs.values():
        wait_for(
            "it is requeued", lambda number=number: cluster.job(number, "JobState") == "PENDING"
        )
    assert all(1 < count(file) < PROMPTS for file in files.values())
    cluster.start_node()
    # Slurm 22.05 takes the nodes from a job that begins in the seconds after its node came back.
    time.sleep(10)
    for number in jobs.values():
        cluster.start_now(number)
    for number in jobs.values():
        assert wait_until_ended(cluster, number) == "COMPLETED"
    for name, folder in folders.items():
        assert answers(files[name]) == whole
        job = json.loads((folder / "auto-b2.json").read_text())["job"]
        assert {run["node"] for run in job["runs"]} == {cluster.host}
        ends = [(run.get("stopped_by"), run.get("exit_code")) for run in job["runs"]]
        assert ends[1:] == [(None, None), (None, 0)], "the node failed, and then it was done"
        assert name == "limit" or ends[0] == ("SIGUSR1", 130)
    assert cluster.job(jobs["signal"], "Restarts") == "2"


def test_rows_of_an_array_are_collected(
    cluster: Cluster, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = render(
        "bench",
        *("bench", "-c", "cluster.yaml", "-f", "f32,int8", "-b", "3", "-r", "rows"),
        *("--", "-p", "16", "-n", "4", "-r", "2"),
    )
    number = cluster.submit(script)
    names = ["f32-b3", "int8-b3"]
    wait_for(
        "all rows are there", lambda: all((site / "rows" / f"{n}.json").is_file() for n in names)
    )
    capsys.readouterr()
    assert main(["slurm", "collect", "rows", "--no-report"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in names) and cluster.host in shown
    found = json.loads((site / "rows" / "collected.json").read_text())
    assert [each["job"]["name"] for each in found["results"]] == names and not found["unfinished"]
    runs = [run for each in found["results"] for run in each["job"]["runs"]]
    assert {run["array_job"] for run in runs} == {number}
    assert sorted(run["array_task"] for run in runs) == ["0", "1"]
    # Submitted again, it finds that nothing is left to do.
    again = cluster.submit(script)
    wait_for("it has ended", lambda: not cluster.ask("squeue", "-h", "-j", again).strip())
    assert "1 of 1 rows are done already" in next(site.glob(f"*-{again}_0.log")).read_text()


def test_a_server_says_how_it_is_reached(cluster: Cluster, site: Path) -> None:
    number = cluster.submit(render("serve", "serve", "-c", "cluster.yaml"))
    log = site / f"octavo-serve-{number}.log"
    wait_for("it serves", lambda: log.is_file() and "listening" in log.read_text(), 60)
    assert log.stat().st_mode & 0o077 == 0
    text = log.read_text()
    tunnel = re.search(r"ssh -N -L 8000:(\S+):(\d+) (\S+)@login.example.org", text)
    key = re.search(r"OPENAI_API_KEY=(\S+)", text)
    assert tunnel is not None and key is not None, text
    request = urllib.request.Request(f"http://{tunnel[1]}:{tunnel[2]}/v1/models")
    with pytest.raises(OSError, match="401"):
        urllib.request.urlopen(request, timeout=10)
    request.add_header("Authorization", f"Bearer {key[1]}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    # Slurm itself asks it to stop, since there are 60 seconds left of two minutes.
    cluster.ask("scontrol", "update", f"JobId={number}", "EndTime=now+50")
    assert wait_until_ended(cluster, number) == "COMPLETED"
    assert "SIGUSR1: stopping" in log.read_text()


@pytest.mark.parametrize(
    ("gpu", "more", "queue", "said"),
    [
        ("h100", (), "ok", "to start at"),
        ("h200", (), "failed", "of 133.4 GiB of H200"),
        ("cpu", ("--time", "30", "--", "--max-windows", "1"), "ok", "of 00:30:00"),
    ],
)
def test_slurm_is_asked_before_the_queue_is_spent(
    cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    gpu: str,
    more: tuple[str, ...],
    queue: str,
    said: str,
) -> None:
    script = render("eval", "eval", "-c", "cluster.yaml", "--gpu", gpu, *more)
    capsys.readouterr()
    assert main(["slurm", "preflight", str(script), "--json"]) == (queue == "failed")
    found = json.loads(capsys.readouterr().out)
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert found["passed"] == (queue == "ok") and status["queue"] == queue
    assert status["script"] == status["weights"] == status["memory"] == status["time"] == "ok"
    assert any(said in check["said"] for check in found["checks"])
    assert not cluster.ask("squeue", "-h").strip(), "nothing was submitted"
