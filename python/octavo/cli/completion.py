"""What a shell is offered when somebody presses Tab: models, adapters, and words to choose from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

Completer = Callable[[str], list[str]]


def asked_words(variables: Mapping[str, str]) -> list[str] | None:
    """The words after `octavo` that a shell wants to have completed; None: it does not ask.

    The shell asks by environment variables, in the way of typer's completion scripts.
    """
    if not variables.get("_OCTAVO_COMPLETE"):
        return None
    line = variables.get("COMP_WORDS") or variables.get("_TYPER_COMPLETE_ARGS") or ""
    return line.split()[1:]


def words(choices: Sequence[str]) -> Completer:
    """One of a few words."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def models(incomplete: str) -> list[str]:
    """Names of pulled models; none where there are no such, so that the shell offers files."""
    from octavo.config import read_environment
    from octavo.errors import OctavoError
    from octavo.weights.hub import pulled_models

    with suppress(OctavoError, OSError):
        return [name for name in pulled_models(read_environment()) if name.startswith(incomplete)]
    return []


def adapters(incomplete: str) -> list[str]:
    """Folders with a LoRA adapter, below the folder that is typed; NAME= stays before them."""
    name, equals, path = incomplete.rpartition("=")
    start, _ = os.path.split(path)
    with suppress(OSError):
        found = sorted(Path(start or ".").glob("*/adapter_config.json"))
        return [f"{name}{equals}{os.path.join(start, each.parent.name)}" for each in found]
    return []
