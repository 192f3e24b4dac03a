"""A model divided among processes of this machine (tensor parallelism), driven by one of them.

Rank 0 is the process that the user started: it has the engine. It starts the others
(runtime/rank_process.py), each of which loads its part of the model (models/shards.py), and tells
them each call of its own runtime. So all ranks compute the same steps, and exchange their partial
sums within them (csrc/core/rank_group.h). They sample the same tokens from the same logits.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import octavo
from octavo import _native
from octavo.errors import InvalidArgumentError, RankError
from octavo.machine import core_share
from octavo.models.layer import split_tap
from octavo.models.shards import Shard

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Matrices = Mapping[str, tuple[Float32, Float32]]
_LONGEST = 1000  # bytes of an error that other ranks are told; the core cuts them anywhere
# Before a division, or behind the sum of the parts.
WHOLE_TAPS = (
    "embed",
    "attn_norm",
    "attn_out",
    "attn_out_norm",
    "mlp_norm",
    "router",
    "mlp_out",
    "mlp_out_norm",
    "out",
    "final_norm",
    "logits",
)
_STDERR = 2  # for all that other ranks print: results of rank 0 are in standard output
PATIENCE = 5.0  # seconds, for a rank to end, or to say why it failed
# Python puts the working directory, whose json.py may be another, before the paths that it is told.
_PROGRAM = """
import sys
sys.path[:] = {paths!r}
from octavo.runtime.rank_process import main
main()
"""


@dataclass(frozen=True, eq=False)
class Rank:
    """Which of how many ranks a process is, and where it meets the others."""

    number: int
    size: int
    group: _native.RankGroup

    def abort(self, why: str) -> None:
        """End every rank's steps with a RuntimeError; of a long text the beginning is kept."""
        self.group.abort(why.encode(errors="replace")[:_LONGEST].decode(errors="ignore"))

    def device_index(self, device: str) -> int:
        """Which of the devices is the rank's; InvalidArgumentError where there are too few."""
        if device != "cuda":  # one for all
            return 0
        count = int(_native.build_info()["num_devices"])
        if self.size > count > 0:  # without any, the core says why
            raise InvalidArgumentError(
                f"tensor_parallel_size is {self.size}, and this process sees {count} GPUs; "
                "expected no more ranks than GPUs: lower it, or ask the cluster for more "
                "(CUDA_VISIBLE_DEVICES)"
            )
        return min(self.number, max(count - 1, 0))


@contextlib.contextmanager
def on_own_cores(rank: Rank | None) -> Iterator[None]:
    """The calling thread, and threads that it starts, on the rank's share of the cores.

    So is the memory that they are the first to write: it is near to these cores. None: no change.
    """
    if rank is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core_share(before, rank.number, rank.size))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Team:
    """The other ranks, as rank 0 sees them: processes that answer calls, or just do them.

    A rank that ends, or whose step fails, ends the model: rank 0 gets a RankError that says which
    and why, then and from every later step.
    """

    def __init__(self, size: int) -> None:
        memory = _shared_memory(_native.RankGroup.memory_bytes(size))
        try:
            self.rank = Rank(0, size, _native.RankGroup(memory, 0, size))
            self._connections: list[Connection] = []
            self._processes: list[subprocess.Popen[bytes]] = []
            self._stop = weakref.finalize(
                self, _stop, os.getpid(), self.rank.group, self._connections, self._processes
            )
            try:
                for number in range(1, size):
                    self._start(number, memory)
            except BaseException:
                self._stop()  # whoever keeps the error would keep those that have started
                raise
        finally:
            os.close(memory)

    def _start(self, number: int, memory: int) -> None:
        """Start a rank's process, in which modules are found where they are found in this one."""
        paths = [os.path.abspath(path) for path in sys.path]
        own = str(Path(octavo.__file__).resolve().parent.parent)
        if own not in map(os.path.realpath, paths):  # found by a relative path, in another folder
            paths.insert(0, own)
        program = _PROGRAM.format(paths=paths)
        ours, theirs = Pipe()
        with theirs, _signals_held():
            file = theirs.fileno()
            numbers = map(str, (os.getpid(), file, memory, number, self.rank.size))
            process = subprocess.Popen(
                [sys.executable, "-c", program, *numbers],
                pass_fds=(file, memory),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
            )
            self._connections.append(ours)
            self._processes.append(process)
        watcher = (process, number, self.rank.group, self._connections)
        threading.Thread(target=_watch, args=watcher, daemon=True).start()

    def tell(self, name: str, *arguments: Any) -> None:
        """Let every other rank do something."""
        self._send(name, arguments, False)

    def ask(self, name: str, *arguments: Any) -> None:
        """The same, when `answers` will be called for what comes of it."""
        self._send(name, arguments, True)

    def answers(self, patience: float | None = None) -> list[Any]:
        """What came of it in each of the other ranks; raises the error of one where it failed.

        patience: seconds after which a rank that does not answer is left out; None: never.
        """
        found = []
        for number, connection in enumerate(self._connections, 1):
            try:
                if patience is None or connection.poll(patience):
                    found.append(connection.recv())
            except (EOFError, OSError) as error:
                raise self._lost(number) from error
        for is_error, value in found:
            if is_error:
                raise value
        return [value for _, value in found]

    def close(self) -> None:
        """End the other ranks."""
        self._stop()

    def _send(self, name: str, arguments: tuple[Any, ...], is_asked: bool) -> None:
        message = pickle.dumps((name, arguments, is_asked), pickle.HIGHEST_PROTOCOL)
        for number, connection in enumerate(self._connections, 1):
            try:
                connection.send_bytes(message)
            except OSError as error:
                raise self._lost(number) from error

    def check(self) -> None:
        """Raise a RankError where a rank has ended."""
        for number, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise _ended(number, process.returncode)

    def _lost(self, number: int) -> RankError:
        """What to raise when a rank's connection has ended."""
        status = None
        if self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._processes[number - 1].wait(PATIENCE)
        return _ended(number, status)


class RankedBatch(_native.Batch):
    """A batch that can be told to other ranks."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.arguments = arguments


class RankedRuntime:
    """The runtime of rank 0, with the methods of `_native.Runtime`: the other ranks do the same.

    Batches are `RankedBatch`. What fails here at once is not told to the others.
    shards: the parts of the weights, for adapters.
    """

    def __init__(self, own: _native.Runtime, team: Team, shards: Mapping[str, Shard]) -> None:
        self._own = own
        self._team = team
        self._shards = shards

    def submit(
        self,
        batch: _native.Batch,
        taps: Sequence[str] | None = None,
        sample: bool = False,
        states: str | None = None,
    ) -> int:
        """As `_native.Runtime`; of taps, those that every rank has whole."""
        parts = [tap for tap in taps or () if split_tap(tap)[1] not in WHOLE_TAPS]
        if parts:
            raise InvalidArgumentError(
                f"a rank has only a part of {', '.join(parts)}: expected taps that are whole "
                f"({', '.join(WHOLE_TAPS)}), or tensor_parallel_size = 1"
            )
        if not isinstance(batch, RankedBatch):
            raise TypeError("the batch cannot be told to other ranks; expected a RankedBatch")
        ticket = self._own.submit(batch, taps, sample, states)
        self._team.tell("submit", batch.arguments, taps, sample, states)
        return ticket

    def sample(self, ticket: int, masks: Int32 | None = None, adjustments: Any = None) -> None:
        """As `_native.Runtime`."""
        self._own.sample(ticket, masks, adjustments)
        self._team.tell("sample", ticket, masks, adjustments)

    def logits(self, ticket: int, rows: Int32 | None = None) -> Float32:
        """As `_native.Runtime`; every rank has all logits."""
        # They wait, too: the emulated device computes only while somebody does.
        self._team.tell("logits", ticket)
        with self._aborting():
            return self._own.logits(ticket, rows)

    def set_logits(self, ticket: int, row: int, values: Float32) -> None:
        """As `_native.Runtime`."""
        self._own.set_logits(ticket, row, values)
        self._team.tell("set_logits", ticket, row, values)

    def wait(self, ticket: int) -> _native.StepOutput:
        """As `_native.Runtime`. After an error no rank can go on."""
        self._team.tell("wait", ticket)
        with self._aborting():
            return self._own.wait(ticket)

    def copy_blocks(self, kv_group: int, pairs: Int32) -> None:
        """As `_native.Runtime`."""
        self._own.copy_blocks(kv_group, pairs)
        self._team.tell("copy_blocks", kv_group, pairs)

    def load_adapter(self, slot: int, matrices: Matrices) -> None:
        """As `_native.Runtime`, of the whole model; each rank takes its part."""
        self._team.ask("load_adapter", slot, matrices)
        try:
            self._own.load_adapter(slot, shard_adapter(matrices, self._shards))
        finally:
            self._team.answers()

    def unload_adapter(self, slot: int) -> None:
        """As `_native.Runtime`."""
        self._own.unload_adapter(slot)
        self._team.tell("unload_adapter", slot)

    def kv_bytes_per_block(self) -> int:
        """As `_native.Runtime`: of this rank."""
        return self._own.kv_bytes_per_block()

    def alloc_kv(self, num_blocks: int) -> None:
        """As `_native.Runtime`."""
        self._team.ask("alloc_kv", num_blocks)
        try:
            self._own.alloc_kv(num_blocks)
        finally:
            self._team.answers()

    def memory(self) -> dict[str, int]:
        """As `_native.Runtime`: of all ranks together, but for `available`, the least of them."""
        self._team.ask("memory")
        own = self._own.memory()
        for other in self._team.answers():
            for name, count in other.items():
                own[name] = min(own[name], count) if name == "available" else own[name] + count
        return own

    def check(self) -> None:
        """Raise a RankError where a rank has ended. (A step would; this is for times without.)"""
        self._team.check()

    def close(self) -> None:
        """End the other ranks; no step can follow."""
        self._team.close()

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        """Where a step fails here, the others would wait for this rank."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self._team.rank.abort(f"an earlier step failed: {error}")
            self._team.check()
            raise RankError(f"{error}: load the model again") from error

    def allocations(self) -> int:
        """As `_native.Runtime`: of this rank."""
        return self._own.allocations()

    def counts(self) -> dict[str, int]:
        """As `_native.Runtime`: of this rank."""
        return self._own.counts()


def shard_adapter(matrices: Matrices, shards: Mapping[str, Shard]) -> Matrices:
    """A rank's part of an adapter, as `Adapter.native` gives it.

    Where a matrix is divided by its outputs, B is; where by its inputs, A is: then the ranks' parts
    of B (A x) add up to the whole.
    """
    parts = {}
    for name, (a, b) in matrices.items():
        if shard := shards.get(f"{name}.weight"):
            taken = slice(shard.start, shard.stop)
            a, b = (a, b[taken]) if shard.axis == 0 else (np.ascontiguousarray(a[:, taken]), b)
        parts[name] = a, b
    return parts


def _shared_memory(size: int) -> int:
    """A descriptor of new memory that other processes may map, too; it has no name."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("octavo-ranks")
    else:
        with tempfile.TemporaryFile() as made:
            file = os.dup(made.fileno())
    os.truncate(file, size)
    return file


def _ended(number: int, status: int | None) -> RankError:
    """status: as `subprocess` has it, below 0 the signal; None: not known yet."""
    how = "" if status is None else f", with status {status}"
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            how += f" ({signal.Signals(-status).name})"
    return RankError(
        f"rank {number} of the model has ended{how}; its own messages, or the system's log, say "
        "why: load the model again"
    )


def _watch(
    process: subprocess.Popen[bytes],
    number: int,
    group: _native.RankGroup,
    connections: list[Connection],
) -> None:
    status = process.wait()
    if connections:  # else it was told to end
        group.abort(str(_ended(number, status)))


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started meanwhile do not get Ctrl-C and SIGTERM: see `rank_process.main`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(
    owner: int,
    group: _native.RankGroup,
    connections: list[Connection],
    processes: list[subprocess.Popen[bytes]],
) -> None:
    """End the ranks: they read the end of their connections. owner: the process that has them."""
    closing = connections.copy()
    connections.clear()
    is_fork = os.getpid() != owner
    if not is_fork:
        group.abort("the model was closed")  # for those that wait for this rank in a step
    for connection in closing:
        if not is_fork:  # forks may hold the connection, too, which closing alone would not end
            with (
                contextlib.suppress(OSError),
                socket.socket(fileno=os.dup(connection.fileno())) as s,
            ):
                s.shutdown(socket.SHUT_RDWR)
        connection.close()
    if is_fork:
        return
    patience_ends = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, patience_ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
