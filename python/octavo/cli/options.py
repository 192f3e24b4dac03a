"""Options that several commands share, written once, and how a command takes them.

`engine_options` gives a command all that says how a model is loaded, and hands it `config`, an
EngineConfig; `sampling_options.py` does the same for SamplingParams. `grouped` puts further options
of a command into dataclasses. An option without a panel is a common one, which `--help` shows;
those with a panel stand in `--help-all` (help.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from octavo.cli import completion
from octavo.cli.log_place import AUTO, new_log
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError
from octavo.files import check_writable
from octavo.sampling_params import SamplingParams

Command = Callable[..., Any]
MODEL, SAMPLING, STOP, BATCHING = "Model", "Sampling", "Where to stop", "Batching and memory"


def option(help: str, *names: str, panel: str | None = None, **details: Any) -> Any:
    """An option of a command, for Annotated.

    help: its first sentence stands alone in `--help`. names: as in "--quiet", "-q"; by default the
    parameter's own. panel: None for a common option. A metavar like cpu|cuda completes in a shell.
    """
    if "|" in details.get("metavar", ""):
        details.setdefault("autocompletion", completion.words(details["metavar"].split("|")))
    # readable: octavo's own message about a file says more than typer's.
    return typer.Option(*names, help=help, rich_help_panel=panel, readable=False, **details)


def argument(help: str, metavar: str | None = None, **details: Any) -> Any:
    """An argument of a command, for Annotated."""
    return typer.Argument(help=help, metavar=metavar, readable=False, **details)


def _log_to_write(path: Path | None) -> Path | None:
    """The event log to write, tried; AUTO becomes a new file in octavo's own folder."""
    if path == Path(AUTO):
        return new_log()
    if path is not None:
        check_writable(path, "the event log")
    return path


def tried(what: str, metavar: str = "FILE") -> dict[str, Any]:
    """Details of an option or argument: a file to write, tried before anything else is done.

    what: it, as in "the event log". Raises FileError.
    """

    def check(path: Path | None) -> Path | None:
        if path is not None:
            check_writable(path, what)
        return path

    return {"callback": check, "metavar": metavar}


MODEL_NAMES = (
    "A pulled model, ORG/NAME, a folder, or a GGUF file. `octavo list` shows the pulled ones; "
    "ORG/NAME is a model of the Hugging Face Hub; the folder has Hugging Face's layout. Left out: "
    "smollm2-135m, fetched on first use."
)
ModelOption = Annotated[
    str | None,
    option(MODEL_NAMES, "--model", "-m", metavar="MODEL", autocompletion=completion.models),
]
ModelArgument = Annotated[
    str | None, argument(MODEL_NAMES, "MODEL", autocompletion=completion.models)
]
ChatOption = Annotated[
    bool | None,
    option(
        "Answer the prompt, or continue it as a text. --chat wraps it in the model's chat "
        "template, --raw gives it as it is. Left out: --chat for a model that has a chat template.",
        "--chat/--raw",
    ),
]
SystemOption = Annotated[
    str | None,
    option('How it should behave, as in "You are a pirate."', metavar="TEXT"),
]
AdapterOption = Annotated[
    str | None,
    option(
        "Answer with this LoRA adapter. It is a folder that PEFT's save_pretrained wrote.",
        metavar="PATH",
        panel=MODEL,
        autocompletion=completion.adapters,
    ),
]
AdaptersOption = Annotated[
    list[str] | None,
    option(
        "A LoRA adapter, which requests name as their model. It is a folder that PEFT wrote; may "
        "be given several times.",
        "--adapter",
        metavar="NAME=PATH",
        autocompletion=completion.adapters,
    ),
]
EventLogOption = Annotated[
    Path | None,
    option(
        "Write every decision of the scheduler to this file. `octavo explain`, `trace` and "
        "`replay` read it. auto: a new file in octavo's own folder, where they look for the newest "
        "one.",
        panel="Event log",
        metavar="FILE|auto",
        callback=_log_to_write,
    ),
]

_model = partial(option, panel=MODEL)
_batching = partial(option, panel=BATCHING)


class _Engine:
    """How a model is loaded; fields of EngineConfig."""

    device: Annotated[
        str,
        option("Where to compute. auto takes a GPU if there is one.", metavar="auto|cpu|cuda"),
    ]
    dtype: Annotated[
        str,
        _model(
            "Number format of the weights: f32 (exact, slower), bf16 (half the memory), f16 (GPUs "
            "only), or auto: on the CPU bf16 for a bf16 model, else f32; on a GPU f16 for an f16 "
            "model, else bf16.",
            metavar="auto|f32|bf16|f16",
        ),
    ]
    quantize: Annotated[
        str | None,
        option(
            "Round the weights while loading. int8 takes half the memory of bf16, with next to no "
            "loss; w8a8 rounds activations too (faster, more loss); int4 takes about a third, with "
            "some loss; int4-nonuniform has half of int4's loss.",
            metavar="int8|w8a8|int4|int4-nonuniform",
        ),
    ]
    keep_embedding: Annotated[
        bool,
        _model(
            "Keep embedding and head of a quantized model in --dtype instead of int8.",
            "--keep-embedding",
        ),
    ]
    kv_dtype: Annotated[
        str,
        _model(
            "Number format of the KV cache, the memory of the conversation: f32, bf16, f16 (GPUs "
            "only), int8 (a little over half of bf16), or auto: as the weights' --dtype.",
            metavar="auto|f32|bf16|f16|int8",
        ),
    ]
    max_model_len: Annotated[
        int | None,
        _model(
            "Longest prompt and answer together, in tokens. Left out: the model's own limit. A "
            "smaller one needs less memory.",
            metavar="N",
        ),
    ]
    num_threads: Annotated[
        int,
        _model(
            "CPU threads of each process. 0: OCTAVO_NUM_THREADS, else one for each physical core, "
            "or of a divided model for each of its share of them."
        ),
    ]
    tensor_parallel_size: Annotated[
        int,
        _model(
            "How many GPUs of this machine the model is divided among; on the CPU, how many "
            "processes, each with a share of the cores.",
            *("--tensor-parallel-size", "-tp"),
            metavar="N",
        ),
    ]
    load_format: Annotated[
        str,
        _model(
            "auto reads the weights; dummy makes random ones from config.json alone, to measure "
            "speed (the text is nonsense).",
            metavar="auto|dummy",
        ),
    ]
    deterministic: Annotated[
        bool,
        _model(
            "On a GPU, compute so that an answer's bits do not depend on what else is computed "
            "with it. On the CPU they never do.",
            "--deterministic",
        ),
    ]
    enforce_eager: Annotated[
        bool,
        _model(
            "On a GPU, launch each kernel by itself instead of replaying recorded steps (CUDA "
            "graphs): slower, easier to debug.",
            "--enforce-eager",
        ),
    ]
    speculative_config: Annotated[
        str | None,
        _model(
            "Guess how answers go on, and check several tokens in one step: the same answers, "
            'sooner. As in \'{"method": "ngram", "num_speculative_tokens": 7}\'.',
            metavar="JSON",
        ),
    ]


class _Batching:
    """How steps are filled; further fields of EngineConfig, for the commands that name them."""

    runner: Annotated[
        str,
        _model(
            "What the model is for: generate (texts), pooling (embeddings), or auto, by its files.",
            metavar="auto|generate|pooling",
        ),
    ]
    max_num_seqs: Annotated[
        int,
        _batching("Most answers computed at a time. More is faster in all, and needs more memory."),
    ]
    max_num_batched_tokens: Annotated[
        int,
        _batching(
            "Most tokens in a step. Smaller: long prompts disturb running answers less. Larger: "
            "long prompts are done sooner."
        ),
    ]
    num_kv_blocks: Annotated[
        int | None,
        _batching(
            "Size of the KV cache, in blocks of 16 tokens. Left out: by --kv-memory-fraction."
        ),
    ]
    kv_memory_fraction: Annotated[
        float, _batching("Fraction of the free memory that the KV cache may take.")
    ]
    enable_prefix_caching: Annotated[
        bool,
        option("Keep computed prompts, for later ones that begin alike.", panel="Prefix cache"),
    ]
    max_adapters: Annotated[
        int,
        _model(
            "Most LoRA adapters in memory. One more takes the place of the one that was used "
            "longest ago, if no request uses it."
        ),
    ]
    max_waiting_requests: Annotated[
        int | None,
        option("Most requests in the queue; one more gets status 429.", panel="Limits"),
    ]
    max_waiting_tokens: Annotated[
        int | None,
        option("Most prompt tokens in the queue. Left out: any number.", panel="Limits"),
    ]
    seed: Annotated[
        int, option("For random choices of requests that name no seed.", panel=SAMPLING)
    ]


def engine_options(
    *more: str, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Give a command all that says how a model is loaded; `config` becomes an EngineConfig.

    more: fields of _Batching that it takes besides. without: fields that it does not take.
    defaults: in place of EngineConfig's.
    """
    options = chosen(_Engine, without, _Batching, more)
    return gathered("config", EngineConfig, options, vars(EngineConfig()) | defaults)


def chosen(
    usual: type, without: Sequence[str], further: type, more: Sequence[str]
) -> dict[str, Any]:
    """Name -> annotation of the fields of `usual` but `without`, and of `more` of `further`."""
    left = get_type_hints(usual, include_extras=True)
    asked = get_type_hints(further, include_extras=True)
    options = {name: kind for name, kind in left.items() if name not in without}
    return options | {name: kind for name, kind in asked.items() if name in more}


def gathered(
    parameter: str,
    make: Callable[..., Any],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Callable[[Command], Command]:
    """What puts options in the place of a command's parameter, which is made of them."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    expanded = [
        # A list that is left out is None here; for typer a tuple would be a default to be shown.
        inspect.Parameter(
            name,
            keyword,
            annotation=kind,
            default=None if isinstance(defaults[name], tuple) else defaults[name],
        )
        for name, kind in options.items()
    ]

    def decorate(command: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        for each in inspect.signature(command, eval_str=True).parameters.values():
            parameters += expanded if each.name == parameter else [each.replace(kind=keyword)]

        @functools.wraps(command)
        def gathered(**given: Any) -> Any:
            value = make(**{name: given.pop(name) for name in options})
            return command(**given, **{parameter: value})

        # These two are what typer reads.
        gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        gathered.__annotations__ = {each.name: each.annotation for each in parameters}
        return gathered

    return decorate


def grouped(command: Command) -> Command:
    """Give a command the options of each parameter that is a dataclass of them.

    The fields of the dataclass are annotated as parameters are, and the command gets an object of
    it. EngineConfig and SamplingParams are for `engine_options` and `sampling_options`.
    """
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        is_group = isinstance(kind, type) and is_dataclass(kind)
        if is_group and kind not in (EngineConfig, SamplingParams):
            options = get_type_hints(kind, include_extras=True)
            defaults = {each.name: each.default for each in fields(kind)}
            command = gathered(parameter.name, kind, options, defaults)(command)
    return command


def refuse_unused(options: object, names: str, are_used: bool, needed: str) -> None:
    """Raise InvalidArgumentError for one of a group's options that was given and would do nothing.

    options: the group's values, a dataclass with defaults. names: of its fields, between spaces.
    needed: with or without what they would do something.
    """
    for name in names.split():
        value = getattr(options, name)
        if not are_used and value != getattr(type(options)(), name):
            raise InvalidArgumentError(
                f"--{name.replace('_', '-')} is {value}, which does nothing here; expected it "
                f"{needed}, or not at all"
            )
