"""`octavo plan`: whether a model fits a device, with how many sequences, and how fast it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.common import FAILED, print_error, progress_bar
from octavo.cli.options import MODEL, ModelArgument, engine_options, option
from octavo.config import EngineConfig, read_environment
from octavo.machine import format_bytes

if TYPE_CHECKING:
    from octavo.plan.check import Checked
    from octavo.plan.devices import Device
    from octavo.plan.plan import ModelToPlan, Plan, Request
    from octavo.progress import Bar
    from octavo.weights.model_files import ModelFiles

_DEVICES = (
    "As in h100; cpu is this machine's processor. Known are a100-40, a100-80, h100, h200, l40s, "
    "a10 and rtx-4090."
)
# What plans for another machine have no use for.
_UNUSED = (
    "speculative_config",
    "tensor_parallel_size",
    "device",
    "max_model_len",
    "num_threads",
    "isa",
    "deterministic",
    "enforce_eager",
)


@engine_options("runner", without=_UNUSED)
def plan(
    *,
    model: ModelArgument = None,
    gpu: Annotated[str, option(_DEVICES, "--gpu", "--device", metavar="NAME")] = "cpu",
    context: Annotated[
        int,
        option("Tokens of a sequence, prompt and answer together.", "--context", "-c", metavar="N"),
    ] = 4096,
    concurrency: Annotated[
        int, option("Sequences that run at the same time.", "--concurrency", "-b", metavar="N")
    ] = 1,
    tensor_parallel_size: Annotated[
        int,
        option(
            "Among how many GPUs, or processes on the CPU, the model is divided.",
            *("--tensor-parallel-size", "--tensor-parallel", "-tp"),
            metavar="N",
            panel=MODEL,
        ),
    ] = 1,
    config: EngineConfig,
    check: Annotated[
        bool,
        option("Also run it on this machine, and print measured beside predicted.", "--check"),
    ] = False,
    as_json: Annotated[bool, option("Print one JSON object instead of tables.", "--json")] = False,
) -> int:
    """Tell what a model needs on a device, the most sequences that fit, and how fast it should run.

    Needs no GPU, and of the model its config.json alone. Speeds are those of the roofline: bytes by
    the memory's bandwidth, operations by the arithmetic's, with the assumptions that are printed.
    Exit code: 0 it fits, 1 it does not; then the smallest changes that make it fit are printed.

    [bold]octavo plan ORG/NAME --gpu h100 -c 8192 -b 64[/bold]
    """
    from octavo.plan.devices import find_gpu
    from octavo.plan.plan import ModelToPlan, Request, make_plan

    files = _read(model)
    request = Request(context, concurrency, tensor_parallel_size)
    environment = read_environment()
    to_plan = ModelToPlan.of(files, config.runner)
    with progress_bar() as bar:
        device = find_gpu(gpu) if gpu != "cpu" else _processor(to_plan, config, request, bar)
        planned = make_plan(to_plan, config, request, device, environment)
        checked = None
        if check and planned.fits:
            checked = _check(planned, files, config, bar)
    if as_json:
        extra = {}
        if checked is not None:
            extra["measured"] = {**vars(checked), "within": checked.within(planned)}
        typer.echo(json.dumps(planned.to_json() | extra, indent=2))
    else:
        _print(planned, checked, str(files.path))
    if planned.fits:
        return 0
    if not as_json:
        print_error(_refusal(planned))
    return FAILED


def _read(model: str | None) -> ModelFiles:
    from octavo.weights.hub import resolve_model
    from octavo.weights.model_files import read_model

    return read_model(resolve_model(model, read_environment()))


def _processor(to_plan: ModelToPlan, config: EngineConfig, request: Request, bar: Bar) -> Device:
    from octavo.machine import anonymous_memory
    from octavo.plan.devices import this_processor
    from octavo.plan.plan import resolve

    bar.update("measuring this machine", 0, 1)
    _, options = resolve(to_plan, config, request, read_environment(), is_gpu=False)
    return this_processor(options, anonymous_memory() or 0, request.ranks)


def _check(planned: Plan, files: ModelFiles, config: EngineConfig, bar: Bar) -> Checked:
    from octavo.plan.check import check

    return check(planned, files, config, read_environment(), bar.update)


def _refusal(planned: Plan) -> str:
    """What is lacking, and each change that would do."""
    from octavo.plan.plan import as_options

    memory, request = planned.memory, planned.request
    each = "" if request.ranks == 1 else f" by each of {request.ranks} ranks"
    lines = [
        f"{format_bytes(memory.total)} are needed, and {format_bytes(planned.usable)} of "
        f"{planned.device.title} can be used{each}: it does not fit"
    ]
    lines += [f"  it fits with   {as_options(changes)}" for changes in planned.remedies]
    if not planned.remedies:
        gpus = ", also on several of these GPUs" if planned.device.is_gpu else ""
        lines.append(
            f"  not even one sequence of {request.context:,} tokens fits in int4 with an int8 "
            f"cache{gpus}: use a smaller model or a device with more memory"
        )
    return "\n".join(lines)


def _print(planned: Plan, checked: Checked | None, path: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from octavo.plan.check import DECODE_WITHIN, MEMORY_WITHIN

    console = Console(highlight=False, markup=False)
    request, options, device = planned.request, planned.options, planned.device
    formats = sorted({format.dtype for format in options.formats.values()})
    console.print(
        f"{path} on {device.title}"
        + _ranks(planned)
        + f": weights {' and '.join(formats) or options.dtype}, KV cache {options.kv_dtype}, "
        f"{_sequences(request.concurrency)} of {request.context:,} tokens"
    )
    title = "Memory" if request.ranks == 1 else f"Memory of each of {request.ranks} ranks"
    table = Table(title=title, title_justify="left", show_header=checked is not None)
    table.add_column("")
    table.add_column("predicted", justify="right")
    if checked is not None:
        table.add_column("measured", justify="right")
    for label, size in _memory_rows(planned):
        table.add_row(label, format_bytes(size))
    if checked is not None:
        mine = planned.memory.of_runtime
        table.add_row("weights, cache and steps", format_bytes(mine), format_bytes(checked.memory))
        if checked.resident is not None:
            process = "the process" if request.ranks == 1 else "the process of one"
            table.add_row(f"taken by {process}", "", format_bytes(checked.resident))
    console.print(table)
    console.print(f"Most sequences of that length that fit: {planned.largest:,}\n")
    speeds = Table(title="Speed, predicted", title_justify="left", show_header=checked is not None)
    speeds.add_column("")
    speeds.add_column("predicted", justify="right")
    if checked is not None:
        speeds.add_column("measured", justify="right")
    for row in _speed_rows(planned, checked):
        speeds.add_row(*row)
    console.print(speeds)
    if checked is not None:
        words = {True: "yes", False: "no (is something else running here?)"}
        within = {name: words[is_so] for name, is_so in checked.within(planned).items()}
        console.print(f"Memory within {MEMORY_WITHIN:.0%}: {within['memory']}")
        if "decode" in within:
            console.print(f"Decoding within {DECODE_WITHIN:.0%}: {within['decode']}")
        console.print()
    console.print("Assumed:")
    for text in (*device.assumptions, *_own_assumptions(planned)):
        console.print(f"  - {text}")


def _memory_rows(planned: Plan) -> list[tuple[str, int]]:
    memory = planned.memory
    is_gpu = planned.device.is_gpu
    of_gpu = [("workspace of kernels", memory.workspace), ("recorded steps", memory.graphs)]
    return [
        ("weights", memory.weights),
        ("KV cache", memory.kv_cache),
        ("activations, logits", memory.activations),
        *(of_gpu if is_gpu else []),
        ("driver and kernels" if is_gpu else "Python and libraries", memory.reserved),
        ("together", memory.total),
        ("usable", planned.usable),
    ]


def _speed_rows(planned: Plan, checked: Checked | None) -> list[tuple[str, ...]]:
    from octavo.plan.plan import prompt_tokens

    speed, request = planned.speed, planned.request
    tokens = prompt_tokens(request, embeds=planned.embeds)
    prefill = [f"{'text' if planned.embeds else 'prompt'} of {tokens:,} tokens"]
    prefill += _speed(speed.prefill, None if checked is None else checked.prefill)
    if planned.embeds:
        return [tuple(prefill)]
    step = ["one step of all sequences", f"{1000 * speed.decode_step:.2f} ms"]
    decode = [f"decode, {_sequences(request.concurrency)} at the end (bound by {speed.limit})"]
    decode += _speed(speed.decode, None if checked is None else checked.decode)
    if checked is not None and checked.decode is not None:
        seconds = request.concurrency / checked.decode
        step.append(f"{1000 * seconds:.2f} ms ({seconds / speed.decode_step - 1:+.0%})")
    return [tuple(step), tuple(decode), tuple(prefill)]


def _speed(predicted: float, measured: float | None) -> list[str]:
    cells = [f"{predicted:,.0f} tokens/s"]
    if measured is not None:
        cells.append(f"{measured:,.0f} tokens/s ({measured / predicted - 1:+.0%})")
    return cells


def _sequences(count: int) -> str:
    return f"{count:,} sequence{'' if count == 1 else 's'}"


def _ranks(planned: Plan) -> str:
    ranks = planned.request.ranks
    if ranks == 1:
        return ""
    return f" x {ranks}" if planned.device.is_gpu else f" in {ranks} processes"


def _own_assumptions(planned: Plan) -> list[str]:
    from octavo.plan.speed import EXCHANGE_SECONDS

    notes = ["every sequence is at its full length; shared prefixes take less"]
    if planned.request.ranks == 1:
        return notes
    if planned.device.is_gpu:
        notes += [
            "a layer of a rank has nine kernels, not five: the fused ones cannot exchange sums",
            f"ranks exchange their sums twice a layer, and logits once: {1e6 * EXCHANGE_SECONDS:g} "
            "us each over NVLink (assumed), and longer in prompts and over PCIe; octavo has not "
            "been run on several GPUs yet",
        ]
    else:
        notes.append(
            "ranks share memory, bandwidth and cores of this machine evenly; what they exchange "
            "takes no time (assumed)"
        )
    return notes
