"""The `octavo` command; one file a verb."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done. 1: a difference, or requests that failed. 2: something the user can put right. 130:
    interrupted. arguments: without the program's name; None takes those of this process.
    """
    try:
        from octavo.cli.app import run  # takes a tenth of a second, and may be interrupted

        return run(arguments)
    except KeyboardInterrupt:
        return 130
