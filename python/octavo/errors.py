"""Every error octavo raises on purpose.

Each message says three things: what was given, what was expected, what to do next. The command
line prints the message and exits with code 2; the Python API lets the exception through.
"""

from __future__ import annotations

from collections.abc import Sequence


class OctavoError(Exception):
    """Base class: catching it catches everything that octavo raises on purpose."""


class InvalidArgumentError(OctavoError, ValueError):
    """An option, a sampling parameter or a prompt that cannot be used."""


class ModelNotFoundError(OctavoError, FileNotFoundError):
    """The named model is neither a directory, nor in the cache, nor obtainable."""


class UnsupportedModelError(OctavoError):
    """A model whose configuration asks for something octavo does not implement."""


class WeightsError(OctavoError):
    """Weight files that are damaged, or do not fit the configuration.

    `problems` lists every problem found, so that one attempt shows them all.
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  - ".join([summary, *self.problems]))


class TokenizerError(OctavoError):
    """A tokenizer or chat template that is missing, malformed or fails on its input."""


class DownloadError(OctavoError):
    """A model that could not be fetched, or whose content is not the expected one."""


class InsufficientMemoryError(OctavoError, MemoryError):
    """The weights or the KV cache do not fit in the memory of the device."""
