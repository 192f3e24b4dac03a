"""`octavo batch`: a file of prompts in, a file of answers out; stopped and resumed at will."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli import common
from octavo.cli.batch_input import (
    BadLine,
    BatchRequest,
    Defaults,
    check_ids,
    parse_line,
    read_lines,
)
from octavo.cli.batch_output import OutputFile
from octavo.cli.batch_stamp import Run, Stamp, describe_run
from octavo.cli.options import (
    STOP,
    AdaptersOption,
    ChatOption,
    EventLogOption,
    ModelOption,
    SystemOption,
    argument,
    engine_options,
    option,
    tried,
)
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError, OctavoError
from octavo.files import writing
from octavo.progress import Bar, duration
from octavo.sampling_params import SamplingParams
from octavo.server.errors import ApiError

if TYPE_CHECKING:
    from octavo.engine.outputs import RequestOutput
    from octavo.llm import LLM
    from octavo.prompts import EncodedPrompt


@engine_options("runner", "max_num_seqs", "seed")
def batch(
    *,
    input_file: Annotated[Path, argument("One prompt per line: plain text, or JSON.", "IN.jsonl")],
    output_file: Annotated[
        Path,
        argument("The answers, one per line.", **tried("the answers", "OUT.jsonl")),
    ],
    model: ModelOption = None,
    adapter: AdaptersOption = None,
    chat: ChatOption = None,
    system: SystemOption = None,
    overwrite: Annotated[
        bool, option("Start again, and delete the answers in OUT.jsonl.", "--overwrite")
    ] = False,
    max_tokens: Annotated[
        int,
        option(
            "Longest answer, in tokens. For lines that give no limit.",
            "--max-tokens",
            "-n",
            metavar="N",
        ),
    ] = 256,
    stop: Annotated[
        list[str] | None,
        option("End answers before this text. May be given several times.", panel=STOP),
    ] = None,
    temperature: Annotated[
        float | None,
        option(
            "How varied: 0 always takes the likeliest token. For lines that give none. Left out: 1 "
            "for OpenAI's lines (their default), 0 for all others.",
            "--temperature",
            "-t",
            metavar="NUMBER",
        ),
    ] = None,
    config: EngineConfig,
    event_log: EventLogOption = None,
    quiet: Annotated[bool, option("No bar and no messages, only errors.", "--quiet", "-q")] = False,
) -> int:
    """Answer a whole file of prompts; can be stopped and resumed.

    Each line of IN.jsonl is a prompt as plain text, or an object {"prompt": …} or {"messages": …},
    or a line of OpenAI's batch format. With --adapter, a line's "model" may name an adapter.

    Answers are written as they come, in OpenAI's batch output format; the text is at
    response.body.choices[0]. However a run was stopped, the same command resumes it; a command that
    would give other answers is refused. A line that cannot be answered gets an "error" and does not
    stop the rest.

    After SIGUSR1 it takes no more lines, finishes those under way, and ends as after Ctrl-C.

    Exit code: 0 all answered, 1 some lines failed, 2 a mistake in the command, 130 Ctrl-C.

    [bold]octavo batch prompts.txt answers.jsonl --max-tokens 100[/bold]
    """
    say = _silent if quiet else common.note
    defaults = Defaults(temperature, max_tokens, {"stop": tuple(stop or ())})
    # A wrong default is a mistake in the command, not one in every line.
    SamplingParams(temperature=temperature or 0.0, max_tokens=max_tokens, stop=tuple(stop or ()))
    if system is not None and chat is False:
        raise InvalidArgumentError("--system needs the chat template; leave out --raw")
    adapters = common.named_adapters(adapter, (model,) if model else ())
    _check_files(input_file, output_file, event_log)
    ids = check_ids(input_file)
    if not ids:
        raise InvalidArgumentError(f"{input_file} is empty; expected one prompt a line")
    with writing(output_file, "the answers"), OutputFile(output_file, overwrite) as output:
        run = describe_run(model, config, chat, system, defaults, adapters)
        output.check(input_file, run)
        tally = _begin_tally(output, len(ids), say)
        interrupted = False
        if tally.finished == len(ids):
            output.begin()
        else:
            config = replace(config, max_adapters=len(adapters))  # all may be asked for at once
            llm = common.load_llm(str(run.directory), config, adapters, quiet=quiet)
            with (
                _event_log(llm, event_log) as noted,
                common.progress_bar("count", quiet=quiet) as bar,
            ):
                interrupted = _answer_all(llm, run, input_file, output, tally, noted, bar)
    return _summarize(tally, output_file, interrupted, say)


def _silent(message: str) -> None:
    """Say nothing: for --quiet."""


def _check_files(input_file: Path, output_file: Path, event_log: Path | None) -> None:
    """Raise for a pipe, or a file that is named twice, before anything is done."""
    for path in (input_file, output_file):
        if os.path.exists(path) and not path.is_file() and not path.is_dir():
            raise InvalidArgumentError(
                f"{path} is a pipe or a device; expected a plain file, to be read more than once"
            )
    if os.path.exists(output_file) and output_file.samefile(input_file):
        raise InvalidArgumentError("the output is the input; expected another file")
    if event_log is not None and event_log.resolve() in (
        input_file.resolve(),
        output_file.resolve(),
    ):
        raise InvalidArgumentError(
            f"--event-log is {event_log}, which is the input or the output; expected another file"
        )


@dataclass
class Tally:
    """What has been done; times in seconds of `time.monotonic`."""

    total: int
    skipped: int
    failed: int
    done: int = 0  # in this run, failed ones included
    prompt_tokens: int = 0
    output_tokens: int = 0
    start: float = 0.0

    @property
    def finished(self) -> int:
        return self.skipped + self.done

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the time since the model was ready."""
        return self.output_tokens / max(time.monotonic() - self.start, 1e-9)

    @property
    def pace(self) -> str:
        """For the bar."""
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"{self.tokens_per_second:,.0f} tokens/s{failed}"


def _begin_tally(output: OutputFile, total: int, say: Callable[[str], None]) -> Tally:
    """What an earlier run has done, which the user is told."""
    skipped = len(output.answered)
    if skipped:
        going_on = "; going on" if skipped < total else ""
        say(f"{skipped:,} of {total:,} answered by an earlier run{going_on}")
    return Tally(total=total, skipped=skipped, failed=output.num_failed)


def _answer_all(
    llm: LLM,
    run: Run,
    input_file: Path,
    output: OutputFile,
    tally: Tally,
    note_events: Callable[[], None],
    bar: Bar,
) -> bool:
    """Answer every line that has no answer yet; returns whether Ctrl-C ended it."""
    waiting: dict[str, tuple[BatchRequest, Stamp]] = {}

    def items() -> Iterator[tuple[str, EncodedPrompt, SamplingParams, str | None]]:
        for line in read_lines(input_file):
            if drain:
                return
            if line.custom_id in output.answered:
                continue
            request = parse_line(line, run.defaults)
            stamp = run.stamp(request, line)
            if isinstance(request, BatchRequest):
                try:
                    adapter = run.adapter_of(request)
                    is_chat = run.is_chat(request)
                    prompt = request.encode(llm, is_chat, run.system)
                    params = request.params_for(llm, prompt, is_chat)
                except (OctavoError, ApiError) as error:
                    request = BadLine(line.custom_id, f"line {line.number}: {error}")
            if isinstance(request, BadLine):
                output.write(error_record(request.custom_id, request.message), stamp)
                tally.done += 1
                tally.failed += 1
                continue
            waiting[request.custom_id] = request, stamp
            yield request.custom_id, prompt, params, adapter

    output.begin()  # not earlier: where loading failed, the old answers stay
    tally.start = time.monotonic()
    try:
        with _asked_to_drain() as drain:
            bar.start("answering", tally.total, tally.finished)
            for custom_id, answer in llm.generate_as_completed(items()):
                request, stamp = waiting.pop(custom_id)
                name = run.adapter_of(request) or run.name
                record = answer_record(request, answer, name, llm, run.is_chat(request))
                output.write(record, stamp)
                tally.done += 1
                tally.failed += record["error"] is not None
                tally.prompt_tokens += answer.metrics.num_prompt_tokens
                tally.output_tokens += answer.metrics.num_output_tokens
                note_events()
                bar.update("answering", tally.finished, tally.total, tally.pace)
    except KeyboardInterrupt:
        return True
    return tally.finished < tally.total  # SIGUSR1


@contextmanager
def _asked_to_drain() -> Iterator[list[int]]:
    """A list that SIGUSR1 makes true: take no more lines, finish those under way, and end."""
    asked: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def _event_log(llm: LLM, path: Path | None) -> Iterator[Callable[[], None]]:
    """A function that writes the latest events to the file, if there is one."""
    if path is None:
        yield lambda: None
        return
    from octavo.engine.events import EventLogFile

    with EventLogFile(llm.engine.events, path) as file:
        yield file.flush


def _summarize(
    tally: Tally, output_file: Path, interrupted: bool, say: Callable[[str], None]
) -> int:
    if tally.done:
        seconds = time.monotonic() - tally.start
        say(
            f"{tally.done:,} prompts in {duration(seconds)}: {tally.prompt_tokens:,} prompt "
            f"tokens, {tally.output_tokens:,} new tokens, {tally.tokens_per_second:,.1f} new "
            "tokens/s"
        )
    if interrupted:
        say(
            f"interrupted with {tally.finished:,} of {tally.total:,} done; the same command goes on"
        )
        return common.INTERRUPTED
    if tally.failed:
        say(f'{tally.failed:,} of {tally.total:,} lines failed: look for "error" in {output_file}')
        return common.FAILED
    say(f"all {tally.total:,} answered: {output_file}")
    return 0


def error_record(custom_id: str, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """The line for a request that was not answered."""
    return {
        "id": f"batch_req_{custom_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


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
