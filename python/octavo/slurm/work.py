"""What a job runs: its rows one after the other, until they are done or the time is up.

Slurm's signals end it in good order. SIGUSR1, which `--signal` sends before the time limit: the row
under way is asked to stop, and the job puts itself back into the queue. SIGTERM, of `scancel` and
of a preemption: the same, but whether the job comes back is Slurm's business. A job that is killed
without a word loses what the row under way had not written yet.

Of each row there are in the folder: NAME.runs.jsonl, a line when it begins and one when it ends;
NAME.json once it is done, with its result and what ran it, under "job".
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.files import write_text, writing
from octavo.slurm.build import build_for_node
from octavo.slurm.job import Kind, Row
from octavo.slurm.node import NodeInfo
from octavo.slurm.stage import stage

SCHEMA = "octavo-slurm-1"
_POLL, _LAST_SECONDS, _REQUEUE_SECONDS = 0.1, 10.0, 120.0
_TERM_SECONDS = 15.0  # after SIGTERM Slurm waits 30 before it kills
FINISHED, FAILED, STOPPED = 0, 1, 3


class Interrupted(Exception):
    """A signal came before the rows began."""


@dataclass(frozen=True)
class JobId:
    """Who runs: as Slurm's environment variables say. restarts: how often it was requeued."""

    job: str = ""
    array_job: str = ""
    array_task: str = ""
    node: str = ""
    restarts: int = 0


@dataclass
class Worker:
    """Runs rows into a folder.

    command_line: the words with which "octavo" at the head of a row is replaced. variables: of the
    environment of rows, over this process's own. drain: seconds that a row which drains may take.
    """

    kind_name: str
    kind: Kind
    folder: Path
    job: JobId
    node: NodeInfo
    drain: float
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    command_line: Sequence[str] = (sys.executable, "-m", "octavo")
    variables: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    stopping: signal.Signals | None = None
    progressed: bool = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGUSR1 and SIGTERM, instead of dying of them."""

        def note(number: int, _: object) -> None:
            self.stopping = self.stopping or signal.Signals(number)

        numbers = (signal.SIGUSR1, signal.SIGTERM)
        before = [signal.signal(number, note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def run(self, rows: Sequence[Row]) -> int:
        """Run those that are not done.

        Returns FINISHED, FAILED where a row could not be run, or STOPPED where rows are left since
        a signal came. Raises InvalidArgumentError where the folder holds another job's results.
        """
        with writing(self.folder, "results"):
            self.folder.mkdir(parents=True, exist_ok=True)
        left = [row for row in rows if not self._is_done(row)]
        if len(left) < len(rows):
            self.say(f"{len(rows) - len(left)} of {len(rows)} rows are done already")
        code = FINISHED
        for row in left:
            if self.stopping is None and not self._run_row(row):
                code = FAILED
            if self.stopping is not None:
                break
        if self.stopping is not None and any(not self._is_done(row) for row in left):
            return STOPPED if self.kind.ends else FINISHED
        return code

    def run_command(self, words: Sequence[str], log: Path) -> int:
        """A command before the rows, such as a build. Interrupted if a signal came meanwhile."""
        with log.open("ab") as file:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            code = self._wait(process, Kind(""))
        if self.stopping is not None:
            raise Interrupted
        return code

    def _is_done(self, row: Row) -> bool:
        path = self.folder / f"{row.name}.json"
        if not self.kind.ends or not path.is_file():
            return False
        try:
            job = json.loads(path.read_text(encoding="utf-8"))["job"]
            other = job["row"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(
                f"{path} is no result of a job: name another folder (--results), or delete it"
            ) from error
        if other != str(row):
            raise InvalidArgumentError(
                f"{path} is the result of another command:\n  {other}\nand this job has\n  {row}\n"
                "name another folder (--results), or delete it"
            )
        return True

    def _run_row(self, row: Row) -> bool:
        """Whether it could be run (or was stopped); its result is written if it ended."""
        words = row.filled({"results": str(self.folder), **self.places})
        if words[0] == "octavo":
            words = [*self.command_line, *words[1:]]
        self.say(f"{row.name}: {shlex.join(words)}")
        answers = self.folder / f"{row.name}.jsonl"
        size = answers.stat().st_size if answers.is_file() else 0
        run = {**asdict(self.job), **asdict(self.node), "began": _now()}
        self._note(row, run)
        output = self.folder / f".{row.name}.out"
        started = time.monotonic()
        code = self._run_child(words, output if self.kind.captures else None)
        seconds = round(time.monotonic() - started, 1)
        ended = {"ended": _now(), "exit_code": code, "seconds": seconds}
        stopped = self.stopping is not None
        self._note(row, ended | ({"stopped_by": self.stopping.name} if self.stopping else {}))
        self.progressed |= answers.is_file() and answers.stat().st_size > size
        result = self._result(row, code, output) if self.kind.ends else {}
        if result is not None and self.kind.ends:
            self._write_result(row, code, result)
            self.progressed = True
        elif result is None and not stopped:
            self.say(f"{row.name} failed with exit code {code}; it is not tried again by this job")
        output.unlink(missing_ok=True)
        return result is not None or stopped

    def _run_child(self, words: Sequence[str], output: Path | None) -> int:
        environment = {**os.environ, **self.variables}
        try:
            with nullcontext() if output is None else output.open("wb") as file:
                process = subprocess.Popen(
                    words, env=environment, stdin=subprocess.DEVNULL, stdout=file
                )
                return self._wait(process, self.kind)
        except FileNotFoundError:
            return 127

    def _wait(self, process: subprocess.Popen[bytes], kind: Kind) -> int:
        """The exit code; once a signal came, ask it to stop, and kill it if it does not."""
        asks: list[tuple[float, signal.Signals]] = []
        stop_at: float | None = None
        while process.poll() is None:
            now = time.monotonic()
            if self.stopping is not None and stop_at is None:
                stop_at = now
                most = _TERM_SECONDS if self.stopping == signal.SIGTERM else self.drain
                patience = min(self.drain, most) if kind.drains else 0.0
                asks = [(now, kind.stop)] if kind.drains else []
                asks += [
                    (now + patience, signal.SIGINT),
                    (now + patience + _LAST_SECONDS, signal.SIGKILL),
                ]
                self.say(f"{self.stopping.name}: stopping")
            while asks and asks[0][0] <= now:
                process.send_signal(asks.pop(0)[1])
            time.sleep(_POLL)
        return process.returncode

    def _note(self, row: Row, what: Mapping[str, Any]) -> None:
        with (
            writing(self.folder, "what ran"),
            (self.folder / f"{row.name}.runs.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(what) + "\n")

    def _result(self, row: Row, code: int, output: Path) -> dict[str, Any] | None:
        """What a row gave; None if it failed or did not come to its end.

        Exit code 1 may be a result, too: a gate failed, or some prompts could not be answered.
        """
        if code not in (0, 1):
            return None
        if self.kind.captures:
            try:
                result = json.loads(output.read_text(encoding="utf-8"))
            except ValueError:
                return None
            return result if isinstance(result, dict) else {"output": result}
        if self.kind_name != "batch":
            return {}
        answers = self.folder / f"{row.name}.jsonl"
        count = _num_lines(answers)
        if code == 1 and count < _num_lines(Path(row.filled({})[2])):
            return None
        return {"answers": answers.name, "num_answers": count}

    def _write_result(self, row: Row, code: int, result: dict[str, Any]) -> None:
        """NAME.json: the row's own JSON, and beside it what ran it."""
        job = {
            "schema": SCHEMA,
            "kind": self.kind_name,
            "name": row.name,
            "row": str(row),
            "exit_code": code,
            "build": self.variables.get("PYTHONPATH"),
            "runs": read_runs(self.folder, row.name),
        }
        text = json.dumps({**result, "job": job}, indent=1) + "\n"
        write_text(self.folder / f"{row.name}.json", "a result", text)


def _num_lines(path: Path) -> int:
    """Lines with something in them; 0 for a file that is not there."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def read_runs(folder: Path, name: str) -> list[dict[str, Any]]:
    """Every run of a row, in order; one without "ended" was killed, or runs still."""
    runs: list[dict[str, Any]] = []
    path = folder / f"{name}.runs.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if "began" in entry:
            runs.append(entry)
        elif runs:
            runs[-1] |= entry
    return runs


def requeue(job: JobId, say: Callable[[str], None]) -> bool:
    """Put this job back into the queue; Slurm then ends it. False if Slurm will not."""
    command = ["scontrol", "requeue", job.job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        say("scontrol is not here: submit the job again, it goes on where it stopped")
        return False
    if done.returncode != 0:
        say(
            f"`{shlex.join(command)}` failed ({done.stderr.strip()}): submit the job again, it "
            "goes on where it stopped"
        )
        return False
    say(f"job {job.job} is back in the queue, and goes on where it stopped")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which Slurm ends this run of it
    time.sleep(_REQUEUE_SECONDS)
    return True


@dataclass(frozen=True)
class Preparation:
    """What comes before the rows.

    source, builds: a checkout, built into the folder of builds; None: the environment's octavo is
    run. model, local: weights, copied to a folder of the node.
    """

    source: Path | None = None
    builds: Path | None = None
    model: str | None = None
    local: Path | None = None


def work(worker: Worker, rows: Sequence[Row], preparation: Preparation) -> int:
    """Prepare the node, run the rows, and put the job back where it did not end.

    Returns an exit code: 0, or 1 where something failed or the job cannot come back. Raises what
    building, staging and `Worker.run` raise.
    """
    with worker.listening():
        try:
            _prepare(worker, preparation)
            code = worker.run(rows)
        except Interrupted:
            code = STOPPED
        if code != STOPPED:
            return code
        if worker.stopping == signal.SIGTERM:
            worker.say("stopped by Slurm or its user; submitted again, it goes on where it stopped")
            return FAILED
        if not worker.progressed and worker.job.restarts > 0:
            worker.say(
                "no row and no answer was finished within the time limit: the job does not go back "
                "into the queue. Give it more --time"
            )
            return FAILED
        return FINISHED if requeue(worker.job, worker.say) else FAILED


def _prepare(worker: Worker, preparation: Preparation) -> None:
    if preparation.source is not None and preparation.builds is not None:
        built = build_for_node(
            preparation.source, preparation.builds, worker.node, worker.run_command
        )
        worker.variables["PYTHONPATH"] = str(built)
        worker.say(f"octavo is {built}")
    if preparation.model is not None:
        name, home, said = stage(preparation.model, read_environment(), preparation.local)
        worker.places["model"] = name
        if home is not None:
            worker.variables["OCTAVO_HOME"] = str(home)
        worker.say(said)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
