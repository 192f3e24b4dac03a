"""Models divided among ranks, and beside them the same model in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from octavo import LLM
from octavo.config import EngineConfig
from octavo.runtime.loader import LoadedRuntime, load_runtime
from octavo.runtime.ranks import RankedRuntime
from octavo.runtime.session import Session
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

# Sizes that 2 ranks can divide in every format: 64 of the inputs of o and 96 of down for each.
DIVISIBLE: dict[str, Any] = {"num_attention_heads": 8, "intermediate_size": 192, "vocab_size": 68}
LIMITS: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "num_threads": 1, "device": "cpu"}


def load_session(path: Path, ranks: int, **options: Any) -> Session:
    config = EngineConfig(tensor_parallel_size=ranks, **{**LIMITS, **options})
    files = read_model(path)  # one KV group, as sessions have it
    return Session(load_runtime(files, open_checkpoint(files), config))


def logits_of(session: Session) -> np.ndarray:
    """Of a prompt of 19 tokens, and of a step that goes on with it beside another prompt."""
    session.restart(2)
    prompt = [(7 * i * i + 3) % 67 for i in range(19)]
    first = session.step({0: prompt}, rows=[0, 4, 18]).logits
    return np.concatenate([first, session.step({0: [5], 1: [9, 8, 33, 2, 66]}).logits])


def load_llm(path: Path, ranks: int, **options: Any) -> LLM:
    return LLM(path, tensor_parallel_size=ranks, **{**LIMITS, **options})


def processes_of(loaded: LLM | LoadedRuntime) -> list[Any]:
    """The processes of the other ranks."""
    runtime = loaded.engine.runtime if isinstance(loaded, LLM) else loaded.runtime
    assert isinstance(runtime, RankedRuntime)
    return list(runtime._team._processes)


@contextmanager
def ended_ranks(llm: LLM) -> Iterator[LLM]:
    """Close the model, and see that its other processes end."""
    processes = processes_of(llm)
    try:
        yield llm
    finally:
        llm.close()
    assert all(process.wait(10) == 0 for process in processes)


def numbers(outputs: Sequence[Any]) -> list[Any]:
    """All that a request promises to answer with the same bits."""
    return [
        (each.token_ids, each.finish_reason, each.logprobs, each.cumulative_logprob)
        for output in outputs
        for each in output.outputs
    ]


def children() -> list[int]:
    """Processes of ranks that this thread has started."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    pids = [int(pid) for pid in text.split()]
    return [p for p in pids if b"rank_process" in Path(f"/proc/{p}/cmdline").read_bytes()]
