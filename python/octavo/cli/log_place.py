"""Where event logs lie that nobody gave a name: `--event-log auto` writes, `octavo trace` reads."""

from __future__ import annotations

import os
import time
from pathlib import Path

from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.files import writing

AUTO = "auto"


def new_log() -> Path:
    """A name that is not taken, in a folder that is there. Raises FileError."""
    folder = read_environment().logs
    with writing(folder, "the event log"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"


def newest_log() -> Path:
    """The log that was written last; InvalidArgumentError if there is none."""
    folder = read_environment().logs
    logs = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise InvalidArgumentError(
            f"no event log is named, and {folder} has none; expected a file that --event-log wrote "
            "(`--event-log auto` writes one there)"
        )
    return logs[-1]
