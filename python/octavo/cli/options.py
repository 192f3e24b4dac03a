"""Options that several commands share, written once, and how a command takes them.

`engine_options` and `sampling_options` give a command their options and hand it what was made of
them: `config`, an EngineConfig, and `params`, a SamplingParams.
"""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from octavo.config import EngineConfig
from octavo.files import check_writable
from octavo.sampling_params import SamplingParams

Command = Callable[..., Any]
MODEL, SAMPLING, STOP, BATCHING = "Model", "Sampling", "Where to stop", "Batching and memory"
RARE = "Sampling, rarely needed (docs/sampling.md)"


def option(help: str, *names: str, panel: str | None = None, **details: Any) -> Any:
    """An option of a command, for Annotated. names: as in "--quiet", "-q"; by default its own."""
    # readable: octavo's own message about a file says more than typer's.
    return typer.Option(*names, help=help, rich_help_panel=panel, readable=False, **details)


def argument(help: str, metavar: str | None = None, **details: Any) -> Any:
    """An argument of a command, for Annotated."""
    return typer.Argument(help=help, metavar=metavar, readable=False, **details)


def tried(what: str, metavar: str = "FILE") -> dict[str, Any]:
    """Details of an option or argument: a file to write, tried before anything else is done.

    what: it, as in "the event log". Raises FileError.
    """

    def check(path: Path | None) -> Path | None:
        if path is not None:
            check_writable(path, what)
        return path

    return {"callback": check, "metavar": metavar}


_NAMES = (
    "Name of a pulled model (smollm2-135m), ORG/NAME, a folder with a Hugging Face model, or a "
    "GGUF file. Left out: smollm2-135m, fetched on first use."
)
ModelOption = Annotated[str | None, option(_NAMES, "--model", "-m", panel=MODEL)]
ModelArgument = Annotated[str | None, argument(_NAMES, "MODEL")]
ChatOption = Annotated[
    bool | None,
    option(
        "--chat wraps a bare prompt in the model's chat template, so that it is answered; --raw "
        "gives it as it is, so that it is continued. Left out: --chat for a model that has a chat "
        "template.",
        "--chat/--raw",
    ),
]
SystemOption = Annotated[
    str | None, option('System message: how the model should behave, as in "You are a pirate."')
]
AdapterOption = Annotated[
    str | None,
    option(
        "Answer with this LoRA adapter: a folder that PEFT's save_pretrained wrote.",
        metavar="PATH",
        panel=MODEL,
    ),
]
AdaptersOption = Annotated[
    list[str] | None,
    option(
        "A LoRA adapter that PEFT wrote, which requests name as their model; may be given several "
        "times.",
        "--adapter",
        metavar="NAME=PATH",
        panel=MODEL,
    ),
]
EventLogOption = Annotated[
    Path | None,
    option(
        "Write every decision of the scheduler to this file, for `octavo explain`, `trace` and "
        "`replay`.",
        **tried("the event log"),
    ),
]

_model = partial(option, panel=MODEL)
_sampling = partial(option, panel=SAMPLING)
_rare = partial(option, panel=RARE)
_stop = partial(option, panel=STOP)
_batching = partial(option, panel=BATCHING)


class _Engine:
    """How a model is loaded; fields of EngineConfig."""

    device: Annotated[
        str,
        _model("Where to compute. auto takes a GPU if there is one.", metavar="auto|cpu|cuda"),
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
        _model(
            "Round the weights while loading: int8 (half the memory of bf16, next to no loss), "
            "w8a8 (activations too: faster, more loss), int4 (about a third, with some loss) or "
            "int4-nonuniform (half of int4's loss).",
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
            "smaller one needs less memory."
        ),
    ]
    num_threads: Annotated[
        int, _model("CPU threads. 0: OCTAVO_NUM_THREADS, else one for each physical core.")
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
    seed: Annotated[int, _sampling("For random choices of requests that name no seed.")]


class _Sampling:
    """How answers are drawn and where they end; fields of SamplingParams."""

    max_tokens: Annotated[
        int, _stop("Longest answer, in tokens (a word is one or two).", "--max-tokens", "-n")
    ]
    min_tokens: Annotated[int, _stop("Shortest answer, in tokens.")]
    stop: Annotated[
        list[str] | None, _stop("End the answer before this text. May be given several times.")
    ]
    stop_token_ids: Annotated[
        list[int] | None,
        _stop("End the answer at this token id. May be given several times.", "--stop-token-id"),
    ]
    include_stop_str_in_output: Annotated[
        bool, _stop("Keep the --stop text at the end of the answer.", "--include-stop")
    ]
    ignore_eos: Annotated[
        bool,
        _stop(
            "Do not stop at the model's end of text, only at --max-tokens. For measuring speed.",
            "--ignore-eos",
        ),
    ]
    temperature: Annotated[
        float,
        _sampling(
            "0 always takes the most probable token, and so gives the same text every time; around "
            "1 is varied, above 1.5 wild.",
            "--temperature",
            "-t",
        ),
    ]
    top_k: Annotated[int, _sampling("Choose among the k most probable tokens only. 0: among all.")]
    top_p: Annotated[
        float,
        _sampling(
            "Choose among the most probable tokens that together reach this probability. 1: among "
            "all."
        ),
    ]
    min_p: Annotated[
        float,
        _sampling("Leave out tokens less probable than this fraction of the best one's. 0: off."),
    ]
    seed: Annotated[
        int | None,
        _sampling("A number that makes random choices repeatable: same seed, same text."),
    ]
    n: Annotated[
        int,
        _sampling(
            "How many answers to make; with a --temperature above 0 they differ.", "--answers"
        ),
    ]
    repetition_penalty: Annotated[
        float, _rare("Divide the logits of tokens that are there already. 1: off.")
    ]
    frequency_penalty: Annotated[
        float, _rare("Take this off a token's logit each time that the answer has it. 0: off.")
    ]
    presence_penalty: Annotated[
        float, _rare("Take this off the logits of all tokens that the answer has. 0: off.")
    ]
    top_n_sigma: Annotated[
        float,
        _rare(
            "Keep tokens whose logits are within so many standard deviations of the best's. 0: off."
        ),
    ]
    typical_p: Annotated[
        float,
        _rare(
            "Keep the tokens whose surprise is closest to the expected one, up to this "
            "probability. 1: off."
        ),
    ]
    xtc_probability: Annotated[
        float, _rare("How often XTC leaves out the most probable tokens. 0: never.")
    ]
    xtc_threshold: Annotated[
        float,
        _rare("The probability from which on XTC leaves a token out, but for the last of them."),
    ]
    dry_multiplier: Annotated[
        float, _rare("Take this off tokens that would go on with a repetition (DRY). 0: off.")
    ]
    dry_base: Annotated[float, _rare("DRY takes off so many times more for each further token.")]
    dry_allowed_length: Annotated[int, _rare("The shortest repetition that DRY is about.")]
    dry_penalty_last_n: Annotated[int, _rare("DRY looks at so many tokens before. -1: at all.")]
    dry_sequence_breakers: Annotated[
        list[str] | None,
        _rare(
            "A text over which no repetition reaches, in place of newline, colon, quote and star. "
            "May be given several times.",
            "--dry-sequence-breaker",
        ),
    ]
    bad_words: Annotated[
        list[str] | None,
        _rare("A word that the answer must not have. May be given several times.", "--bad-word"),
    ]


def engine_options(
    *more: str, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Give a command all that says how a model is loaded; `config` becomes an EngineConfig.

    more: fields of _Batching that it takes besides. without: fields that it does not take.
    defaults: in place of EngineConfig's.
    """
    options = get_type_hints(_Engine, include_extras=True)
    for name, kind in get_type_hints(_Batching, include_extras=True).items():
        if name in more:
            options[name] = kind
    kept = {name: kind for name, kind in options.items() if name not in without}
    return _gathered("config", EngineConfig, kept, vars(EngineConfig()) | defaults)


def sampling_options(
    *, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Give a command the options of sampling; `params` becomes a SamplingParams.

    Where words are drawn and no seed is named, it gets a random one, short enough to type again.
    """

    def make(**given: Any) -> SamplingParams:
        if given["temperature"] > 0 and given["seed"] is None:
            given["seed"] = secrets.randbelow(10**9)
        return SamplingParams(**given)

    options = get_type_hints(_Sampling, include_extras=True)
    kept = {name: kind for name, kind in options.items() if name not in without}
    return _gathered("params", make, kept, vars(SamplingParams()) | defaults)


def _gathered(
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
