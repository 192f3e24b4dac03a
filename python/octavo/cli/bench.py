"""`octavo bench`: prefill and decode in tokens a second, beside the machine's limits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from octavo.cli import completion
from octavo.cli.common import FAILED, note, print_error, progress_bar
from octavo.cli.options import MODEL, MODEL_NAMES, argument, engine_options, option
from octavo.config import EngineConfig, check_choice, read_environment
from octavo.errors import InvalidArgumentError


def _complete(incomplete: str) -> list[str]:
    """Models, and the second words of `octavo bench serve` and `octavo bench spec`."""
    return [*completion.models(incomplete), "serve", "spec"]


_numbers = partial(option, metavar="N,N,…")


@engine_options("runner", "max_num_batched_tokens", without=("max_model_len", "speculative_config"))
def bench(
    *,
    model: Annotated[str | None, argument(MODEL_NAMES, "MODEL", autocompletion=_complete)] = None,
    prompt: Annotated[
        str, _numbers("Prompt lengths for prefill, in tokens. 0: none.", "-p", "--n-prompt")
    ] = "512",
    generate: Annotated[
        str, _numbers("Numbers of tokens to decode. 0: none.", "-n", "--n-gen")
    ] = "128",
    batch: Annotated[
        str, _numbers("Numbers of sequences that decode together.", "-b", "--batch")
    ] = "1",
    depth: Annotated[
        str, _numbers("Tokens in each cache before decoding.", "-d", "--n-depth")
    ] = "0",
    repetitions: Annotated[
        int, option("Timed runs of each test.", "-r", "--repetitions", metavar="N")
    ] = 5,
    adapter: Annotated[
        list[Path] | None,
        option(
            "Run with this LoRA adapter, a folder that PEFT wrote. Given several times, sequences "
            "have them in turn.",
            metavar="PATH",
            panel=MODEL,
            autocompletion=completion.adapters,
        ),
    ] = None,
    config: EngineConfig,
    output: Annotated[
        str,
        option("Format of the result.", "-o", "--output", metavar="table|md|json|csv"),
    ] = "table",
) -> int:
    """Measure how fast a model runs, and how near that is to what the machine can do.

    First the machine itself is measured: bytes read from memory and float32 operations a second.
    Each test then has a gate before it is timed: a sequence's logits must have the same bits alone
    and in the batch (on a GPU without --deterministic: nearly the same numbers). A test that
    fails gets no figure. Exit code: 0 all gates passed, 1 not. An embedding model decodes nothing:
    its prompts alone are measured.

    A server is measured by [bold]octavo bench serve[/bold], speculative decoding by [bold]octavo
    bench spec[/bold].

    [bold]octavo bench smollm2-135m -p 512 -n 128 -b 1,8[/bold]
    """
    from octavo.bench.benchmark import bench as run_bench
    from octavo.bench.cases import make_cases
    from octavo.bench.report import OUTPUTS, print_result

    check_choice("--output", output, OUTPUTS)
    cases = make_cases(
        parse_numbers("-p", prompt),
        parse_numbers("-n", generate),
        parse_numbers("-b", batch),
        parse_numbers("-d", depth),
    )
    with progress_bar() as bar:
        result = run_bench(
            *(model, config, cases, repetitions, read_environment(), bar.update),
            adapters=adapter or (),
        )
    print_result(result, output)
    if result.embeds and generate != "0":
        note("an embedding model decodes nothing: -n has no effect")
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
