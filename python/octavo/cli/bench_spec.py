"""`octavo bench spec`: what drafts save on tasks, and beside the formula."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from octavo.cli.bench import parse_numbers
from octavo.cli.common import FAILED, load_llm, print_error, progress_bar
from octavo.cli.options import ModelArgument, engine_options, option
from octavo.config import EngineConfig, check_choice
from octavo.errors import InvalidArgumentError
from octavo.speculative_config import SpeculativeConfig, read_speculative_config

if TYPE_CHECKING:
    from octavo.bench.spec import Row, SpecResult

_OUTPUTS = ("table", "md", "json")
_HEADINGS = (
    *("task", "batch", "accepted", "tokens/step", "plain tok/s", "tok/s", "speed-up"),
    *("foretold", "answers"),
)


@engine_options("runner")
def bench_spec(
    *,
    model: ModelArgument = None,
    tasks: Annotated[
        str,
        option("Of quote (a text), code (to be edited), chat.", "--tasks", metavar="NAME,NAME,…"),
    ] = "quote,code,chat",
    acceptance: Annotated[
        str,
        option(
            "Instead, drafts that are right with these probabilities. They are so whatever the "
            "model, and are measured beside what the formula foretells. Needs no tokenizer.",
            metavar="P,P,…",
        ),
    ] = "",
    second_guess: Annotated[
        str,
        option(
            "With --acceptance: check a second chain, too, whose first draft is right with this "
            "probability where that of the first chain is wrong.",
            panel="What to measure",
            metavar="P",
        ),
    ] = "",
    batch: Annotated[
        str, option("Numbers of answers at a time.", "-b", "--batch", metavar="N,N,…")
    ] = "1",
    generate: Annotated[
        int, option("Longest answer, in tokens.", "-n", "--n-gen", metavar="N")
    ] = 128,
    repetitions: Annotated[
        int, option("Pairs of runs, with drafts and without.", "-r", "--repetitions", metavar="N")
    ] = 3,
    config: EngineConfig,
    output: Annotated[
        str,
        option("Format of the result.", "-o", "--output", metavar="table|md|json"),
    ] = "table",
) -> int:
    """Measure what speculative decoding saves.

    Each run without drafts is followed by one with drafts, on the same model. The gate: all answers
    are the same to the token. Exit code: 0 if so, 1 if not.

    [bold]octavo bench spec smollm2-135m -b 1,8[/bold]

    [bold]octavo bench spec FOLDER --load-format dummy --acceptance 0.5,0.8,0.95[/bold]
    """
    from octavo.bench.spec import bench_spec as run_bench
    from octavo.bench.spec_tasks import TASKS

    check_choice("--output", output, _OUTPUTS)
    chosen = [task.strip() for task in tasks.split(",")]
    for task in chosen:
        check_choice("--tasks", task, TASKS)
    batches = parse_numbers("--batch", batch)
    if min(batches) < 1:
        raise InvalidArgumentError(f"--batch is {batch!r}; expected numbers of 1 or more")
    acceptances = _parse_parts("--acceptance", acceptance)
    chances = _parse_parts("--second-guess", second_guess)
    if len(chances) > 1 or (chances and not acceptances):
        raise InvalidArgumentError(
            f"--second-guess is {second_guess!r}; expected one number, beside --acceptance"
        )
    drafts = read_speculative_config(config.speculative_config) or SpeculativeConfig("ngram")
    if chances and drafts.most_chains < 2:
        drafts = replace(drafts, num_branches=2)  # so that a step has room for a second chain
    config = replace(
        config,
        speculative_config=drafts,
        max_num_seqs=max(*batches, 1),
        max_model_len=config.max_model_len or 512 + generate,
    )
    llm = load_llm(model, config, needs=None if acceptances else "texts")
    with progress_bar() as bar:
        result = run_bench(
            llm,
            str(model or "smollm2-135m"),
            chosen,
            batches,
            acceptances,
            generate,
            repetitions,
            bar.update,
            chances[0] if chances else None,
        )
    _print(result, output)
    if not result.passed:
        print_error("drafts have changed answers, which must never happen: please report this")
        return FAILED
    return 0


def _parse_parts(name: str, text: str) -> list[float]:
    """ "0.5,0.8" -> [0.5, 0.8]."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1.0]
    if not all(0 <= part <= 1 for part in found):
        raise InvalidArgumentError(
            f"{name} is {text!r}; expected numbers from 0 to 1, as in {name} 0.5"
        )
    return found


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.task,
        str(row.batch),
        f"{row.acceptance:.2f}" if row.num_drafts else "-",
        f"{row.tokens_per_step:.2f}",
        f"{row.plain_speed:.1f}",
        f"{row.speed:.1f}",
        f"{row.speed_up:.2f}",
        "-" if row.foretold is None else f"{row.foretold:.2f}",
        "equal" if row.equal else "DIFFER",
    )


def _print(result: SpecResult, output: str) -> None:
    from octavo.progress import stdout_console
    from octavo.tables import Figures

    if output == "json":
        print(json.dumps(result.to_json(), indent=2))
        return
    if output == "md":
        print("| " + " | ".join(_HEADINGS) + " |")
        print("|" + " --- |" + " ---: |" * (len(_HEADINGS) - 2) + " --- |")
        for row in result.rows:
            print("| " + " | ".join(_cells(row)) + " |")
        return
    styles = [None if row.equal else "red" for row in result.rows]
    rows = [*map(_cells, result.rows)]
    stdout_console().print(
        Figures(_HEADINGS, rows, ("task", "answers"), ("tokens/step", "foretold"), styles=styles)
    )
