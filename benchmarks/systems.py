"""What benchmarks/run.py measures, and how each system is asked.

A system has `check(row)`, asked once before anything is timed, `warm_up(row)`, `run(row)` and
`memory()`. It runs in a process of its own, so that no thread of it spins while another one is
measured; the Python of that process may be one that lacks octavo, so nothing of it is imported
here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

# Bits of a weight by the name a system gives its format; the scales of groups count.
BITS: dict[str, float] = {"f32": 32, "bf16": 16, "int8": 8, "w8a8": 8, "q8_0": 8.5}
BITS |= {"int4": 4.5, "q4_0": 4.5, "int4-nonuniform": 4.5, "int4-g128": 4.125}

Measure = Literal["decode", "prefill", "requests", "batch", "context", "latency"]
# Which tokens a speed counts: the prompts', the answers', or all of them.
COUNTED = {"decode": "generated", "prefill": "prompt", "requests": "longest"}
COUNTED |= {"batch": "generated", "context": "generated", "latency": "generated"}


@dataclass(frozen=True)
class Row:
    """One thing to measure: `requests` prompts of `prompt` tokens, `generated` behind each.

    decode: one sequence, from a prompt of one token; only the generated tokens count.
    prefill: a prompt up to the first token of its answer; only the prompt's tokens count.
    requests: prompts that arrive together; all tokens count. batch: the same, the answers' count.
    context: as decode, behind a long prompt, by a system that was started for it: its memory.
    latency: as decode, with the time of every token.
    """

    name: Measure
    prompt: int
    generated: int
    requests: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that a system's speed counts."""
        counted: int = getattr(self, COUNTED[self.name])
        return self.requests * counted

    @property
    def longest(self) -> int:
        """Tokens of a sequence at the end."""
        return self.prompt + self.generated

    @property
    def short(self) -> Row:
        """The same with fewer tokens, to warm up."""
        return Row(self.name, min(self.prompt, 16), min(self.generated, 4), self.requests)

    def prompts(self) -> list[list[int]]:
        """Token ids of every request, from 10 to 299: the smallest vocabulary has them."""
        return [
            [(7919 * index + 131 * request) % 290 + 10 for index in range(self.prompt)]
            for request in range(self.requests)
        ]

    def speed(self, sample: Mapping[str, Any]) -> float:
        """Tokens a second of what `run` returned."""
        return self.tokens / float(sample["seconds"])


class System:
    """What all systems of this process share."""

    description: Mapping[str, Any] = {}
    """What is known after loading: version, number of parameters, bytes of weights."""

    def check(self, row: Row) -> Mapping[str, Any]:
        """The gate of a row: {"passed": ...} where it has one; every run counts its tokens."""
        return {}

    def describe(self) -> Mapping[str, Any]:
        """As `description`."""
        return self.description

    def logprobs(self, prompt: list[int]) -> dict[int, float] | None:
        """Log-probabilities of likely next tokens; None where it does not tell them."""
        return None

    def warm_up(self, row: Row) -> None:
        """A short one of the same kind."""
        self.run(row.short)

    def run(self, row: Row) -> dict[str, Any]:
        """ "seconds" of one run; of a latency also "times", in seconds, to each token."""
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        """The most bytes so far: "host", mapped files included; "device", where it has one."""
        return {"host": host_peak(), **self.device_memory()}

    def device_memory(self) -> dict[str, int]:
        """{"device": bytes}; {} on the CPU."""
        return {}


class Generating(System):
    """A system of which `generate`, and perhaps `stream`, is all that differs."""

    def generate(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` greedy tokens after each prompt."""
        raise NotImplementedError

    def stream(self, prompt: list[int], count: int) -> Iterator[Any]:
        """Yields at each token."""
        raise NotImplementedError("it does not tell when each token comes")

    def run(self, row: Row) -> dict[str, Any]:
        if row.name == "latency":
            return timed(self.stream(row.prompts()[0], row.generated), row.generated)
        return {"seconds": self.generate(row.prompts(), row.generated)}


def timed(tokens: Iterator[Any], count: int) -> dict[str, Any]:
    """What `System.run` returns of a stream of tokens, which has to be of `count`."""
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in tokens]
    require_tokens([len(times)], count)
    return {"seconds": times[-1], "times": times}


def latencies(samples: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of each sample, and between tokens of all of them."""
    firsts = [1000 * sample["times"][0] for sample in samples]
    gaps = [1000 * (after - one) for sample in samples for one, after in pairwise(sample["times"])]
    return firsts, gaps


def host_peak() -> int:
    """Bytes that this process had in RAM at most, mapped files included; 0 where not told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def require_tokens(found: list[int], count: int) -> None:
    """Raise RuntimeError unless every answer has `count` tokens. found: how many each has."""
    if any(number != count for number in found):
        raise RuntimeError(f"answered {found} tokens; expected {count} of each")


def output_of(command: Sequence[str], timeout: float | None = None) -> tuple[str, str]:
    """Standard output and error of a program; RuntimeError with their end where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        name = Path(command[0]).name
        raise RuntimeError(f"{name} failed ({done.returncode}): {done.stderr[-800:]}")
    return done.stdout, done.stderr


class Process:
    """A system in a process of its own, with the same methods.

    system: "module.Class" of this folder. settings: the class's arguments. python: the interpreter
    of an environment that has the system. environment: set beside what is set already. seconds:
    that one answer may take. start_seconds: from its start until it was loaded, imports included.
    Raises RuntimeError with the end of what the process printed when that ends too early.
    """

    def __init__(
        self,
        system: str,
        *settings: Any,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
        seconds: float = 600.0,
    ) -> None:
        self._system, self._seconds = system, seconds
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            [str(python), __file__, system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # with what it starts itself, so that all of it can be ended
        )
        # No path is pickled: Pythons differ in where its class is.
        plain = [str(value) if isinstance(value, Path) else value for value in settings]
        start = time.perf_counter()
        try:
            self.load_seconds = self._ask(plain)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *values: self._ask((method, values))

    def _ask(self, question: Any) -> Any:
        late = threading.Timer(self._seconds, self._kill)
        late.start()
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait(30)
            if not late.is_alive():
                raise RuntimeError(f"no answer within {self._seconds:.0f} s") from error
            self._log.seek(0)
            told = self._log.read()[-1500:]
            raise RuntimeError(f"{self._system} ended ({status}): {told}") from error
        finally:
            late.cancel()
        if isinstance(answer, Failed):
            raise RuntimeError(str(answer))
        return answer

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=30)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._kill()
            self._process.communicate()
        self._log.close()


class Failed(str):
    """In place of an answer: what went wrong; the system can be asked on."""


def answer() -> None:
    """The other end of `Process`: make the system, and answer until the input ends."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a system prints is no answer
    name, kind = sys.argv[1].split(".")
    module = importlib.import_module(name)
    settings = pickle.load(questions)
    start = time.perf_counter()
    system = getattr(module, kind)(*settings)
    found: Any = time.perf_counter() - start
    while True:
        pickle.dump(found, answers)
        answers.flush()
        try:
            method, values = pickle.load(questions)
        except EOFError:
            return
        try:
            found = getattr(system, method)(*values)
        except Exception as error:
            traceback.print_exc()
            found = Failed(str(error) or type(error).__name__)


if __name__ == "__main__":
    # Under its own name, so that what is pickled has the same classes at both ends.
    importlib.import_module("systems").answer()
