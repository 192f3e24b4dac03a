"""`octavo eval`: perplexity on a text, and how far quantized or rounded weights lead astray."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli import completion
from octavo.cli.common import progress_bar
from octavo.cli.options import AdapterOption, ModelArgument, engine_options, option
from octavo.config import EngineConfig, read_environment

_text = partial(option, panel="What to score")


@engine_options("runner", without=("max_model_len", "speculative_config"))
def eval(
    *,
    model: ModelArgument = None,
    adapter: AdapterOption = None,
    against: Annotated[
        str | None,
        option(
            "Model to compare its predictions with. same: this model unquantized in f32; none: no "
            "comparison. Left out: same, unless it runs in f32 or is stored quantized.",
            autocompletion=completion.models,
            metavar="same|none|MODEL",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        option(
            "A text file in UTF-8. Left out: chapters I to VI of Alice's Adventures in Wonderland.",
            metavar="FILE",
        ),
    ] = None,
    random: Annotated[
        int | None,
        _text("Score this many random tokens instead of a text; for --load-format dummy."),
    ] = None,
    window: Annotated[
        int | None,
        option("Tokens in a window. Left out: 512, or the model's limit.", metavar="N"),
    ] = None,
    stride: Annotated[
        int | None,
        _text("Tokens from the start of one window to the next. Left out: half the window."),
    ] = None,
    max_windows: Annotated[
        int | None,
        option("Stop after this many windows. Left out: the whole text.", metavar="N"),
    ] = None,
    config: EngineConfig,
    as_json: Annotated[bool, option("Print one JSON object instead of tables.", "--json")] = False,
) -> None:
    """Measure how well a model predicts a text, and what its number format costs.

    Perplexity is the exponential of the mean surprise per token; lower is better. Every token is
    scored once, from at least `window - stride` tokens of context wherever the text has them.
    Against another model: the KL divergence of each prediction from the other's, in nats, and how
    often both have the same most probable token.

    [bold]octavo eval smollm2-135m --quantize int4[/bold]
    """
    from octavo.eval.evaluation import EvalRequest, evaluate
    from octavo.eval.report import print_report

    request = EvalRequest(
        model=model,
        config=config,
        against=against,
        text=text,
        random=random,
        window=window,
        stride=stride,
        max_windows=max_windows,
        adapter=None if adapter is None else Path(adapter),
    )
    with progress_bar() as bar:
        result = evaluate(request, read_environment(), bar.update)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        print_report(result)
