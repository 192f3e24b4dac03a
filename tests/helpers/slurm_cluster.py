"""A real Slurm of one node on this machine: munged, slurmctld and slurmd, started for the tests.

Without systemd and without control groups, as root: Debian's packages slurmctld, slurmd,
slurm-client and munge. Its node can be made to fail, and to come back.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"
# One GPU of each kind, which is a word for Slurm and nothing else. The limits on a node that does
# not answer, and on processes that do not end, are as short as they can be.
CONFIGURATION = """\
ClusterName=octavo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=3
MinJobAge=900
JobRequeue=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 Gres=gpu:h100:1 Feature=big State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" if one can."""
    absent = [name for name in PROGRAMS if _find(name) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt install {PACKAGES}"
    return "" if os.getuid() == 0 else "Slurm's daemons have to be started by root"


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(what: str, is_so: Callable[[], object], seconds: float = 90.0) -> None:
    """Until something is so; TimeoutError, which says what it was, where it never is."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not so after {seconds:.0f} s")
        time.sleep(0.2)


class Cluster:
    """A running cluster. folder: of its configuration and state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(parents=True, mode=0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.configuration = folder / "slurm.conf"
        ports = {"controller_port": _free_port(), "node_port": _free_port()}
        self.configuration.write_text(CONFIGURATION.format(folder=folder, host=self.host, **ports))
        (folder / "gres.conf").write_text("Name=gpu Type=h100 File=/dev/null\n")
        self.variables = {**os.environ, "SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """All three daemons; the node is idle when this returns."""
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        options = [f"--{name}={munge / file}" for name, file in files.items()]
        self._daemon("munged", "--force", *options, f"--seed-file={munge / 'seed'}")
        self._daemon("slurmctld", "-i")
        self.start_node()

    def start_node(self) -> None:
        self._daemon("slurmd")
        wait_for("the node is up", lambda: self.node_state() in ("idle", "mixed", "allocated"))

    def stop(self) -> None:
        """End every job and every daemon that was started here."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ask("scancel", "--user=root")
        self.kill_node()
        for name in ("slurmctld.pid", "munge/pid"):
            self._kill(self.folder / name, signal.SIGTERM)

    def kill_node(self) -> None:
        """What a node that loses its power does: slurmd and all jobs are gone without a word."""
        self._kill(self.folder / "slurmd.pid", signal.SIGKILL)
        (self.folder / "slurmd.pid").unlink(missing_ok=True)
        for pid in self._job_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def freeze(self, number: str) -> None:
        """Stop every process of a job, as if it hung."""
        for pid in self._job_processes(number):
            os.kill(pid, signal.SIGSTOP)

    def ask(self, *command: str) -> str:
        """Standard output of one of Slurm's programs."""
        done = subprocess.run(
            command, env=self.variables, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """Submit a job from its folder; its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, script.name],
            cwd=script.parent,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def job(self, number: str, key: str) -> str:
        """A field of `scontrol show job`, as in JobState or Restarts."""
        found = re.search(rf"\b{key}=(\S+)", self.ask("scontrol", "show", "job", number))
        return found[1] if found else ""

    def start_now(self, number: str) -> None:
        """Let a job that was requeued begin: Slurm would wait two minutes."""
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")

    def node_state(self) -> str:
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.ask("sinfo", "-h", "-o", "%T").strip()
        return ""

    def _daemon(self, program: str, *options: str) -> None:
        path = _find(program)
        assert path is not None
        command = [path, *options]
        done = subprocess.run(
            command, env=self.variables, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def _kill(self, pid_file: Path, number: signal.Signals) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), number)

    def _job_processes(self, number: str = "") -> list[int]:
        """Of one of this cluster's jobs, or of all, with slurmstepd; by their environment."""
        mark, found = f"SLURM_CONF={self.configuration}".encode(), []
        job = f"SLURM_JOB_ID={number}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            in_job = job in variables if number else any(e.startswith(job) for e in variables)
            is_step = name.startswith(b"slurmstepd") and not number
            if mark in variables and (in_job or is_step):
                found.append(int(entry.name))
        return found
