"""The systems of compare_cpu.py and compare_hf.py: what is measured, and how each is asked.

A system has `check(row)`, asked once before anything is timed, `warm_up(row)`, and `run(row)`:
tokens a second. It runs in a process of its own, so that no thread of it spins while another one
is measured; the Python of that process may be one that lacks octavo, so nothing of it is imported
here.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Bits of a weight by the name a system gives its format; the scales of groups count.
BITS: dict[str, float] = {"f32": 32, "bf16": 16, "int8": 8, "w8a8": 8, "q8_0": 8.5}
BITS |= {"int4": 4.5, "q4_0": 4.5, "int4-nonuniform": 4.5, "int4-g128": 4.125}


@dataclass(frozen=True)
class Row:
    """One thing to measure: `requests` prompts of `prompt` tokens, `generated` behind each.

    decode: one after the other, from a prompt of one token; only the generated ones count.
    prefill: a prompt up to the first token of its answer; only the prompt's tokens count.
    serve: requests that arrive together; all their tokens count.
    """

    name: Literal["decode", "prefill", "serve"]
    prompt: int
    generated: int
    requests: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that a system's speed counts."""
        counted = {"decode": self.generated, "prefill": self.prompt, "serve": self.longest}
        return self.requests * counted[self.name]

    @property
    def longest(self) -> int:
        """Tokens of a sequence at the end."""
        return self.prompt + self.generated

    @property
    def short(self) -> Row:
        """The same with fewer tokens, to warm up."""
        return Row(self.name, min(self.prompt, 16), min(self.generated, 4), self.requests)

    @property
    def title(self) -> str:
        """As a heading."""
        if self.name == "decode":
            return f"decode, one sequence, {self.generated} tokens: tok/s"
        if self.name == "prefill":
            return f"prefill, a prompt of {self.prompt}: tok/s"
        return (
            f"{self.requests} requests of {self.prompt} in, {self.generated} out: all tokens, tok/s"
        )

    def prompts(self) -> list[list[int]]:
        """Token ids of every request, from 10 to 499: the smallest vocabulary has them."""
        return [
            [(7919 * index + 131 * request) % 490 + 10 for index in range(self.prompt)]
            for request in range(self.requests)
        ]


class Generating:
    """A system of which `generate` is all that differs."""

    description: Mapping[str, Any]
    """What is known of it after loading: its version, its number of parameters."""

    def generate(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` greedy tokens after each prompt."""
        raise NotImplementedError

    def logprobs(self, prompt: list[int]) -> dict[int, float] | None:
        """Log-probabilities of likely next tokens; None where it does not tell them."""
        return None

    def check(self, row: Row) -> Mapping[str, Any]:
        """What is known of it; every run counts its tokens."""
        return self.description

    def warm_up(self, row: Row) -> None:
        """A short one of the same kind."""
        self.run(row.short)

    def run(self, row: Row) -> float:
        """Tokens a second."""
        return row.tokens / self.generate(row.prompts(), row.generated)


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
    of an environment that has the system. environment: set beside what is set already. Raises
    RuntimeError with the end of what the process printed when that ends too early.
    """

    def __init__(
        self,
        system: str,
        *settings: Any,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._system = system
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            [str(python), __file__, system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
        )
        # No path is pickled: Pythons differ in where its class is.
        plain = [str(value) if isinstance(value, Path) else value for value in settings]
        try:
            self._ask(plain)
        except RuntimeError:
            self.close()
            raise

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *values: self._ask((method, values))

    def _ask(self, question: Any) -> Any:
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait(30)
            self._log.seek(0)
            told = self._log.read()[-1500:]
            raise RuntimeError(f"{self._system} ended ({status}): {told}") from error

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()


def answer() -> None:
    """The other end of `Process`: make the system, and answer until the input ends."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a system prints is no answer
    module, name = sys.argv[1].split(".")
    system = getattr(importlib.import_module(module), name)(*pickle.load(questions))
    found = None
    while True:
        pickle.dump(found, answers)
        answers.flush()
        try:
            method, values = pickle.load(questions)
        except EOFError:
            return
        found = getattr(system, method)(*values)


if __name__ == "__main__":
    answer()
