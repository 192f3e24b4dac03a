"""The output file of a batch: one answer per line, and the answers of an earlier run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from octavo.cli.batch_input import BatchLine, parse_line, read_lines
from octavo.cli.batch_stamp import Run, Stamp
from octavo.errors import InvalidArgumentError

_BEGINNING = b'{"id": "batch_req_'  # of every line
_ADVICE = (
    "repeat the command that began the file, name another output, or begin anew with --overwrite"
)


@dataclass(frozen=True)
class _Earlier:
    """One line that an earlier run wrote: an answer, or an error in its place."""

    number: int  # of the line, from 1
    stamp: Stamp | None
    model: str | None  # its name then; None for an error


class OutputFile:
    """The output file.

    Opening reads it and changes nothing; `check` compares its answers with what this run would
    give; `begin` drops lines that cannot be used, and must come before `write`. A line is written
    whole and flushed at once: if the process is killed, only unfinished answers are lost.

    answered: ids that need no work: answered, or failed with the same prompt, options and model.
    num_failed: how many of those failed.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        """Open and read the file; it is created where it does not exist.

        overwrite: ignore what is in it. Raises InvalidArgumentError where it holds anything but
        answers of a batch, and where another process is writing it; OSError where it cannot be
        opened.
        """
        self.path = path
        self.answered: set[str] = set()
        self.num_failed = 0
        self._answers: dict[str, _Earlier] = {}
        self._failures: dict[str, _Earlier] = {}
        self._outdated: set[int] = set()  # numbers of the lines to drop
        self._end = 0  # of the last whole line, in bytes
        self._file: IO[bytes] = path.open("ab+")
        try:
            self._lock(self._file)
            if not overwrite:
                self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, input_file: Path, run: Run) -> None:
        """Compare every answer with what this run would answer; the file stays as it is.

        An error whose line, options or model have changed is dropped by `begin`, and the line is
        tried again. Raises InvalidArgumentError for an answer whose have changed.
        """
        wanted = {*self._answers, *self._failures}
        first_mismatch: tuple[_Earlier, BatchLine, Stamp] | None = None
        num_mismatches = 0
        for line in read_lines(input_file) if wanted else ():
            if line.custom_id not in wanted:
                continue
            wanted.remove(line.custom_id)
            stamp = run.stamp(parse_line(line, run.defaults), line)
            answer = self._answers.get(line.custom_id)
            failure = self._failures.get(line.custom_id)
            if answer is not None:
                self.answered.add(line.custom_id)
                if answer.stamp != stamp:
                    first_mismatch = first_mismatch or (answer, line, stamp)
                    num_mismatches += 1
            elif failure is not None and failure.stamp == stamp:
                self.answered.add(line.custom_id)
                self.num_failed += 1
                failure = None
            if failure is not None:
                self._outdated.add(failure.number)
        if wanted:
            self._refuse_unknown_ids(wanted, input_file)
        if first_mismatch is not None:
            self._refuse_mismatch(*first_mismatch, num_mismatches, input_file, run)

    def begin(self) -> None:
        """Drop all lines with overwrite; else a last line that was cut off, and outdated errors."""
        if self._outdated:
            self._rewrite()
        elif self._end < self._file.seek(0, os.SEEK_END):
            self._file.truncate(self._end)

    def write(self, record: Mapping[str, Any], stamp: Stamp) -> None:
        """Append one answer, and what it depends on."""
        line = json.dumps({**record, "octavo": stamp.to_json()}, ensure_ascii=False) + "\n"
        # Half a surrogate pair, which a line of the input may hold, becomes its JSON escape again.
        self._file.write(line.encode("utf-8", errors="backslashreplace"))
        self._file.flush()

    def _lock(self, file: IO[bytes]) -> None:
        try:
            import fcntl
        except ImportError:  # not a Unix: there is no lock there
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidArgumentError(
                f"another process is writing {self.path}; wait for it, or name another output"
            ) from error
        except OSError:
            pass  # a network file system without locks

    def _whole_lines(self) -> Iterable[tuple[int, bytes]]:
        """The lines with their numbers, without a last one that was cut off."""
        self._file.seek(0)
        for number, data in enumerate(self._file, start=1):
            is_torn = data.startswith(_BEGINNING) or _BEGINNING.startswith(data)
            if data.endswith(b"\n") or not is_torn:
                yield number, data

    def _read(self) -> None:
        for number, data in self._whole_lines():
            self._end += len(data)
            try:
                record = json.loads(data)
                custom_id = record["custom_id"]
                failed = record["error"] is not None
                model = None if failed else record["response"]["body"]["model"]
                line = _Earlier(number, Stamp.read(record), model)
                first = (self._failures if failed else self._answers).setdefault(custom_id, line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InvalidArgumentError(
                    f"{self.path}, line {number}, is not an answer of a batch: name another "
                    "output, or begin anew with --overwrite"
                ) from error
            if failed and first is not line:
                self._outdated.add(number)
            elif first.stamp != line.stamp:
                raise InvalidArgumentError(
                    f"{self.path}, lines {first.number} and {number}, both answer {custom_id!r}, "
                    "with different prompts, options or models; expected the answers of one run: "
                    f"delete one of them, or {_ADVICE}"
                )

    def _rewrite(self) -> None:
        """Replace the file, atomically, by one without the outdated errors."""
        target = self.path.resolve()  # a link stays one
        partial = target.with_name(f".{target.name}.partial")
        try:
            new = partial.open("wb+")
        except OSError as error:
            raise InvalidArgumentError(
                f"{partial} cannot be written: {error.strerror or error}. It is needed to take "
                f"errors out of {self.path} whose lines are tried again"
            ) from error
        try:
            self._lock(new)
            for number, data in self._whole_lines():
                if number not in self._outdated:
                    new.write(data)
            new.flush()
            os.fsync(new.fileno())
            shutil.copymode(target, partial)
            partial.replace(target)
        except BaseException:
            new.close()
            with suppress(OSError):
                partial.unlink()
            raise
        self._file.close()
        self._file = new

    def _refuse_unknown_ids(self, ids: set[str], input_file: Path) -> None:
        known = {**self._failures, **self._answers}
        custom_id = min(ids, key=lambda each: known[each].number)
        raise InvalidArgumentError(
            f"{self.path}, line {known[custom_id].number}, answers {custom_id!r}, which is not in "
            f"{input_file}{_and_more(len(ids))}: it belongs to another batch, or the line was "
            f"taken out of the input. Put it back, or {_ADVICE}"
        )

    def _refuse_mismatch(
        self,
        answer: _Earlier,
        line: BatchLine,
        now: Stamp,
        count: int,
        input_file: Path,
        run: Run,
    ) -> None:
        """Raise, and say how an answer differs from what `line` asks for now, and what to do."""
        old, advice = answer.stamp, _ADVICE
        where = f"{input_file}, line {line.number} ({line.custom_id!r}),"
        if old is None:
            what = "does not say which prompt, options and model it is of: an older octavo wrote it"
            advice = "finish the file with that one, name another output, or use --overwrite"
        elif old.model != now.model:
            what = (
                f"is of another model: {answer.model!r}, whose digest was {old.model}; this run "
                f"has {run.name!r} with {now.model} (weights, configuration, tokenizer and chat "
                "template count)"
            )
        elif old.prompt != now.prompt:
            what = f"answers another prompt than {where} holds now"
            if line.custom_id == f"line-{line.number}":
                advice += (
                    ". A line without a custom_id is known by its number: add new ones at the end"
                )
            advice += f". To answer changed lines anew, delete their answers from {self.path}"
        else:
            what = f"answers {where} with other options: {old.differences(now)}"
        raise InvalidArgumentError(
            f"{self.path}, line {answer.number}, {what}{_and_more(count)}. Nothing was "
            f"changed; {advice}"
        )


def _and_more(count: int) -> str:
    return f" ({count - 1:,} more of its answers do not fit either)" if count > 1 else ""
