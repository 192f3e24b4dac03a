"""`octavo eval`: perplexity on a text, and how far quantized or rounded weights lead astray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.common import (
    DeviceOption,
    DTypeOption,
    KeepEmbeddingOption,
    LoadFormatOption,
    NumThreadsOption,
    QuantizeOption,
)

_TEXT, _OUT = "What to score", "Output"


def eval(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Name of a pulled model, a folder with a Hugging Face model, or a GGUF file. Left "
            "out: smollm2-135m, fetched on first use.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="What to compare its distributions with: same (this model unquantized in f32), "
            "another MODEL, or none. Left out: same, unless it runs in f32 or is stored quantized.",
            metavar="same|none|MODEL",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file in UTF-8. Left out: chapters I to VI of Alice's Adventures in "
            "Wonderland.",
            show_default=False,
            readable=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            help="So many random tokens in place of a text, as for --load-format dummy.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens that go through the model together. Left out: 512, or the model's limit.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window's beginning to the next one's. Left out: half the window.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many windows. Left out: the whole text.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = None,
    keep_embedding: KeepEmbeddingOption = False,
    device: DeviceOption = "auto",
    num_threads: NumThreadsOption = 0,
    load_format: LoadFormatOption = "auto",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object instead of tables.", rich_help_panel=_OUT
        ),
    ] = False,
) -> None:
    """Measure how well a model predicts a text, and what its number format costs.

    Perplexity is the exponential of the mean surprise a token; lower is better. Every token is
    scored once, from at least `window - stride` tokens of context wherever the text has them.
    Against another model: the KL divergence of each prediction from the other's, in nats, and how
    often both think the same token the most probable.
    """
    from octavo.cli.stage_bar import StageBar
    from octavo.config import EngineConfig, read_environment
    from octavo.eval.evaluation import EvalRequest, evaluate
    from octavo.eval.report import print_report

    config = EngineConfig(
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # EngineConfig checks it
        quantize=quantize,  # type: ignore[arg-type]
        keep_embedding=keep_embedding,
        load_format=load_format,  # type: ignore[arg-type]
        num_threads=num_threads,
    )
    request = EvalRequest(
        model=model,
        config=config,
        against=against,
        text=text,
        random=random,
        window=window,
        stride=stride,
        max_windows=max_windows,
    )
    with StageBar.with_time_left() as bar:
        result = evaluate(request, read_environment(), bar.update)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        print_report(result)
