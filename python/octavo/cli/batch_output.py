"""The answers of a batch: one JSON line each, as soon as it is there, in OpenAI's format."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from octavo.cli.batch_input import BadLine, BatchRequest
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from octavo.engine.outputs import RequestOutput
    from octavo.llm import LLM


class Journal:
    """The output file, one answer a line.

    A line is written whole and handed to the system at once, so that whatever kills this process
    costs only the answers that were in the making. Opening it reads what an earlier run has
    answered. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path, wanted: Collection[str], model: str, overwrite: bool) -> None:
        """Open and read the file; it is created where it does not exist.

        wanted: the ids of the input. Raises InvalidArgumentError where the file holds something
        else than answers to these, of this model, and where another process is writing it.
        """
        self.path = path
        self.num_failed = 0  # among the answers of earlier runs
        self.answered: set[str] = set()
        try:
            self._file = path.open("ab+")
        except OSError as error:
            raise InvalidArgumentError(
                f"{path} cannot be written: {error.strerror or error}"
            ) from error
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._read(wanted, model)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one answer."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not a Unix: two runs are not kept apart there
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidArgumentError(
                f"another process is writing {self.path}; wait for it, or name another output"
            ) from error
        except OSError:
            pass  # a network file system without locks

    def _read(self, wanted: Collection[str], model: str) -> None:
        self._file.seek(0)
        end = 0  # of the last whole line
        for number, data in enumerate(self._file, start=1):
            if not data.endswith(b"\n"):
                break
            end += len(data)
            self._take(number, data, wanted, model)
        if end < self._file.seek(0, os.SEEK_END):
            self._file.truncate(end)
            self._file.seek(end)

    def _take(self, number: int, data: bytes, wanted: Collection[str], model: str) -> None:
        advice = "name another output, or begin anew with --overwrite"
        try:
            record = json.loads(data)
            custom_id = record["custom_id"]
            failed = record["error"] is not None
            written_by = model if failed else record["response"]["body"]["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(
                f"{self.path}, line {number}, is not an answer of a batch: {advice}"
            ) from error
        if custom_id not in wanted:
            raise InvalidArgumentError(
                f"{self.path}, line {number}, answers {custom_id!r}, which is not in the input: "
                f"it belongs to another batch; {advice}"
            )
        if written_by != model:
            raise InvalidArgumentError(
                f"{self.path} was begun with the model {written_by!r}, and this one is {model!r}; "
                f"{advice}"
            )
        self.answered.add(custom_id)
        self.num_failed += failed


def error_record(custom_id: str, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """The line for a request that was not answered."""
    return {
        "id": f"batch_req_{custom_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def bad_line_record(line: BadLine) -> dict[str, Any]:
    """The line for a line that could not be understood."""
    return error_record(line.custom_id, line.message)


def answer_record(
    request: BatchRequest, output: RequestOutput, model: str, llm: LLM, is_chat: bool
) -> dict[str, Any]:
    """The line for an answered request: the body is what the server would answer."""
    from octavo.server.formats import Head, usage_of

    failed = [answer for answer in output.outputs if answer.finish_reason == "error"]
    if output.error is not None or failed or not output.outputs:
        # A refused prompt has no outputs; with outputs, the model itself failed.
        code = "model_error" if output.outputs else "invalid_request"
        return error_record(request.custom_id, output.error or "the model failed", code)
    head = Head(f"{'chatcmpl' if is_chat else 'cmpl'}-{request.custom_id}", int(time.time()), model)
    answer_format = request.answer_format(llm, head, output, is_chat)
    metrics = output.metrics
    usage = usage_of(metrics.num_prompt_tokens, metrics.num_output_tokens)
    return {
        "id": f"batch_req_{request.custom_id}",
        "custom_id": request.custom_id,
        "response": {
            "status_code": 200,
            "request_id": output.request_id,
            "body": answer_format.whole([output], usage),
        },
        "error": None,
    }
