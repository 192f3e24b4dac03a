"""The process of a rank other than 0: it does what rank 0 tells it (runtime/ranks.py)."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from octavo import _native
from octavo.config import EngineConfig, Environment
from octavo.models.shards import Shard
from octavo.models.spec import ModelSpec
from octavo.runtime.loader import fill, prepare
from octavo.runtime.ranks import Rank, shard_adapter
from octavo.weights.checkpoint import NonFiniteWeightsWarning, open_checkpoint
from octavo.weights.model_files import read_model

_SECONDS = 0.5  # between looks whether rank 0 is there


class _RankRuntime:
    """What rank 0 tells or asks: the names are those of the methods. Results of steps are its."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._prepared: Any = None  # until its weights are loaded
        self._runtime: Any = None
        self._shards: Mapping[str, Shard] = {}
        self._first_rows: dict[int, Any] = {}  # of each step: the first row of logits, or none

    def prepare(
        self, model: Path, spec: ModelSpec, config: EngineConfig, environment: Environment
    ) -> int:
        """Make the runtime; returns the bytes that its device has left.

        spec: of the whole model, as rank 0 has it; some callers divide its layers into KV groups.
        """
        files = replace(read_model(model), spec=spec)
        checkpoint = open_checkpoint(files, config.load_format, config.seed)
        self._prepared = prepare(files, checkpoint, config, environment, self._rank)
        self._runtime, self._shards = self._prepared.runtime, self._prepared.shards
        return int(self._runtime.memory()["available"])

    def fill(self) -> tuple[int, list[NonFiniteWeightsWarning]]:
        """Load the weights; returns the bytes that the device has left, and what it warns of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NonFiniteWeightsWarning)
            fill(self._prepared)
        self._prepared = None
        messages = [each.message for each in caught]
        found = [each for each in messages if isinstance(each, NonFiniteWeightsWarning)]
        return int(self._runtime.memory()["available"]), found

    def submit(self, arguments: Mapping[str, Any], *options: Any) -> None:
        # With taps too: a device takes steps without them in another shape.
        ticket = self._runtime.submit(_native.Batch(**arguments), *options)
        self._first_rows[ticket] = np.zeros(min(len(arguments["logit_rows"]), 1), np.int32)

    def logits(self, ticket: int) -> None:
        """Wait for them: of one row is enough."""
        if ticket in self._first_rows:
            self._runtime.logits(ticket, self._first_rows[ticket])

    def wait(self, ticket: int) -> None:
        if ticket in self._first_rows:  # else rank 0 asks again, and has an error of its own
            self._runtime.wait(ticket)
            del self._first_rows[ticket]

    def load_adapter(self, slot: int, matrices: Any) -> None:
        self._runtime.load_adapter(slot, shard_adapter(matrices, self._shards))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)  # the same arguments, and results that are numbers


def main() -> None:
    """Serve rank 0 until it closes the connection.

    Arguments: its process, descriptors of connection and memory, rank, ranks.
    """
    parent, connection_file, memory, number, size = map(int, sys.argv[1:])
    # Ctrl-C, and what a service manager sends to all processes, are for rank 0. It ends this one
    # when it has answered what it has still to answer.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # rank 0 warns of the same
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    rank = Rank(number, size, _native.RankGroup(memory, number, size))
    os.close(memory)
    serve(Connection(connection_file), rank)


def serve(connection: Connection, rank: Rank) -> None:
    """Do what comes over the connection, and answer what is asked, until it is closed."""
    runtime = _RankRuntime(rank)
    while True:
        try:
            name, arguments, is_asked = connection.recv()
        except (EOFError, OSError):
            rank.abort("rank 0 has ended")  # else a step of this one would wait for it
            return
        try:
            answer = False, getattr(runtime, name)(*arguments)
        except Exception as error:
            answer = True, _portable(error)
            if name == "prepare" or not is_asked:  # rank 0 may wait for this one in the core
                rank.abort(f"rank {rank.number}: {type(error).__name__}: {error}")
        if is_asked:
            try:
                connection.send(answer)
            except OSError:  # rank 0 has ended, or closed the connection
                return


def _portable(error: Exception) -> Exception:
    """The error, or one of the same text where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with(parent: int) -> None:
    """End this process when rank 0 has ended, whatever it is waiting for."""
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
