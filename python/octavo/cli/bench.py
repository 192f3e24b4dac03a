"""`octavo bench`: prefill and decode in tokens a second, beside the machine's limits."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli.common import (
    FAILED,
    DeterministicOption,
    DeviceOption,
    DTypeOption,
    EnforceEagerOption,
    KeepEmbeddingOption,
    KVDTypeOption,
    LoadFormatOption,
    NumThreadsOption,
    QuantizeOption,
    print_error,
)
from octavo.errors import InvalidArgumentError

_WHAT, _OUT = "What to measure", "Output"


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Name of a pulled model, a GGUF file, or a folder with a Hugging Face model; with "
            "--load-format dummy its config.json is enough. Left out: smollm2-135m, fetched on "
            "first use.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            "-p",
            "--n-prompt",
            help="Prompt lengths for prefill, in tokens. 0: none.",
            metavar="N,N,…",
            rich_help_panel=_WHAT,
        ),
    ] = "512",
    generate: Annotated[
        str,
        typer.Option(
            "-n",
            "--n-gen",
            help="Numbers of tokens to decode. 0: none.",
            metavar="N,N,…",
            rich_help_panel=_WHAT,
        ),
    ] = "128",
    batch: Annotated[
        str,
        typer.Option(
            "-b",
            "--batch",
            help="Numbers of sequences that decode together.",
            metavar="N,N,…",
            rich_help_panel=_WHAT,
        ),
    ] = "1",
    depth: Annotated[
        str,
        typer.Option(
            "-d",
            "--n-depth",
            help="Tokens in each sequence's cache before decoding.",
            metavar="N,N,…",
            rich_help_panel=_WHAT,
        ),
    ] = "0",
    repetitions: Annotated[
        int,
        typer.Option("-r", "--repetitions", help="Timed runs of each test.", rich_help_panel=_WHAT),
    ] = 5,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(help="Tokens of a prompt that go into one step.", rich_help_panel=_WHAT),
    ] = 512,
    dtype: DTypeOption = "auto",
    kv_dtype: KVDTypeOption = "auto",
    quantize: QuantizeOption = None,
    keep_embedding: KeepEmbeddingOption = False,
    device: DeviceOption = "auto",
    deterministic: DeterministicOption = False,
    enforce_eager: EnforceEagerOption = False,
    num_threads: NumThreadsOption = 0,
    load_format: LoadFormatOption = "auto",
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="Form of the result.",
            metavar="table|md|json|csv",
            rich_help_panel=_OUT,
        ),
    ] = "table",
) -> int:
    """Measure how fast a model runs, and how near that is to what the machine can do.

    First the machine itself is measured: bytes read from memory and float32 operations a second.
    Each test then has a gate before it is timed: a sequence's logits must have the same bits alone
    and in the batch (on a GPU without --deterministic: nearly the same numbers). A test that fails
    it gets no figure. Exit code: 0 all gates passed, 1 not.

    A server is measured by [bold]octavo bench serve[/bold].
    """
    from octavo.bench.benchmark import bench as run_bench
    from octavo.bench.cases import make_cases
    from octavo.bench.report import OUTPUTS, print_result
    from octavo.cli.stage_bar import StageBar
    from octavo.config import EngineConfig, read_environment

    if output not in OUTPUTS:
        raise InvalidArgumentError(f"--output is {output!r}; expected one of {', '.join(OUTPUTS)}")
    cases = make_cases(
        parse_numbers("-p", prompt),
        parse_numbers("-n", generate),
        parse_numbers("-b", batch),
        parse_numbers("-d", depth),
    )
    config = EngineConfig(
        device=device,
        deterministic=deterministic,
        enforce_eager=enforce_eager,
        dtype=dtype,  # type: ignore[arg-type]  # EngineConfig checks it
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        quantize=quantize,  # type: ignore[arg-type]
        keep_embedding=keep_embedding,
        load_format=load_format,  # type: ignore[arg-type]
        num_threads=num_threads,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    with StageBar.with_time_left() as bar:
        result = run_bench(model, config, cases, repetitions, read_environment(), bar.update)
    print_result(result, output)
    if not result.passed:
        print_error("a gate failed: logits depend on what else is in the batch. `octavo diff`")
        return FAILED
    return 0


def parse_numbers(name: str, text: str) -> list[int]:
    """ "1,4,16" -> [1, 4, 16]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InvalidArgumentError(f"{name} is {text!r}; expected numbers, as in {name} 1,4,16")
    return [int(part) for part in parts]
