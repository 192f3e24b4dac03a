"""Every error octavo raises on purpose.

Each message says three things: what was given, what was expected, what to do next. The command
line prints the message and exits with code 2; the Python API lets the exception through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass


class OctavoError(Exception):
    """Base class: catching it catches everything that octavo raises on purpose."""


class InvalidArgumentError(OctavoError, ValueError):
    """An option, a sampling parameter or a prompt that cannot be used."""


class FileError(OctavoError, OSError):
    """A file that cannot be read or written: missing, forbidden, a folder, or on a full disk."""


class ModelNotFoundError(OctavoError, FileNotFoundError):
    """The named model is neither a directory, nor in the cache, nor obtainable."""


class UnsupportedModelError(OctavoError):
    """A model whose configuration asks for something octavo does not implement."""


class WeightsError(OctavoError):
    """Weight files that are damaged, or do not fit the configuration.

    `problems` lists every problem found, so that one attempt shows them all; the text has ten.
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        super().__init__("\n  - ".join([summary, *self.problems[:10], *more]))


class TokenizerError(OctavoError):
    """A tokenizer or chat template that is missing, malformed or fails on its input."""


class DownloadError(OctavoError):
    """A model that could not be fetched, or whose content is not the expected one."""


@dataclass(eq=False, repr=False)
class AdapterNotFoundError(InvalidArgumentError):
    """A request for a LoRA adapter that there is not. names: those that there are."""

    name: str
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        known = f"expected one of {', '.join(self.names)}" if self.names else "there are none"
        super().__init__(f"the adapter {self.name!r} is not loaded: {known}")

    def __reduce__(self) -> tuple[type[AdapterNotFoundError], tuple[str, Sequence[str]]]:
        return type(self), (self.name, self.names)


@dataclass(eq=False, repr=False)
class AdaptersInUseError(OctavoError):
    """An adapter that cannot be loaded while requests use all places: try again later."""

    max_adapters: int

    def __post_init__(self) -> None:
        super().__init__(
            f"requests use all {self.max_adapters} places for adapters (max_adapters): try again "
            "later, or start with more"
        )

    def __reduce__(self) -> tuple[type[AdaptersInUseError], tuple[int]]:
        return type(self), (self.max_adapters,)


@dataclass(eq=False, repr=False)
class QueueFullError(OctavoError):
    """A request that was refused because too many wait already: try again later.

    num_requests, num_tokens: what waits now (requests that have not started, and their prompts'
    tokens). max_requests, max_tokens: the limits; None where there is none.
    """

    num_requests: int
    num_tokens: int
    max_requests: int | None
    max_tokens: int | None
    num_new_tokens: int

    def __post_init__(self) -> None:
        requests, tokens = f"{self.num_requests} requests", f"{self.num_tokens} prompt tokens"
        if self.max_requests is not None:
            requests += f" of {self.max_requests} (max_waiting_requests)"
        if self.max_tokens is not None:
            tokens += f" of {self.max_tokens} (max_waiting_tokens)"
        super().__init__(
            f"the queue is full: {requests} with {tokens} wait, and this one brings "
            f"{self.num_new_tokens}: try again later"
        )

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[int | None, ...]]:
        # An error of a worker process travels as its arguments, and `args` is the message.
        return type(self), astuple(self)


class EngineStepError(OctavoError, RuntimeError):
    """A step of the engine failed, and with it every request that was being computed."""


class RankError(OctavoError, RuntimeError):
    """A process of a model that is divided among ranks has ended or failed: the model is lost."""


class EngineInUseError(OctavoError, RuntimeError):
    """An engine that was used while it was in use, or by somebody else than its owner."""


class EngineClosedError(OctavoError, RuntimeError):
    """A model that was used after it was closed."""


@dataclass(eq=False, repr=False)
class WrongProcessError(OctavoError, RuntimeError):
    """A model that was used in another process than the one that loaded it.

    pid: of the process that loaded it. this_pid: of the one that used it; None for a model that was
    to be pickled, to be sent to another one.
    """

    pid: int
    this_pid: int | None

    def __post_init__(self) -> None:
        what = f"this is process {self.this_pid}, a fork of it without the threads that compute"
        if self.this_pid is None:
            what = "it cannot be pickled to be sent to another one"
        super().__init__(
            f"the model was loaded by process {self.pid}, and {what}: load it in the process that "
            'uses it (with multiprocessing, in the child, best with the start method "spawn"; in a '
            "web server, in each worker, without preloading)"
        )

    def __reduce__(self) -> tuple[type[WrongProcessError], tuple[int, int | None]]:
        return type(self), astuple(self)


class ShutdownError(OctavoError):
    """A request that was cut off, since the server is shutting down."""


@dataclass(eq=False, repr=False)
class InsufficientMemoryError(OctavoError, MemoryError):
    """The weights or the KV cache do not fit in the memory of the device.

    problem: what does not fit. remedies: options of `EngineConfig` with other values, each of which
    would make it fit. otherwise: what to do where there is none.
    """

    problem: str
    remedies: Sequence[Mapping[str, object]] = ()
    otherwise: str = "use a smaller model, or free memory"

    def __post_init__(self) -> None:
        super().__init__(self.message(_as_arguments))

    def __reduce__(self) -> tuple[type[InsufficientMemoryError], tuple[object, ...]]:
        # An error of a rank travels as its arguments, and `args` is the message.
        return type(self), (self.problem, self.remedies, self.otherwise)

    def message(self, spell: Callable[[Mapping[str, object]], str | None]) -> str:
        """The problem and what to do. spell: a remedy as the reader writes it; None: cannot."""
        ways = [text for remedy in self.remedies if (text := spell(remedy))]
        advice = f"use {', or '.join(ways)}, or free memory" if ways else self.otherwise
        return f"{self.problem}: {advice}"


def _as_arguments(remedy: Mapping[str, object]) -> str:
    return " with ".join(f"{name}={value!r}" for name, value in remedy.items())
