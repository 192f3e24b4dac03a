"""Evaluate one model, alone or against another, window by window: what `octavo eval` does."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from octavo.config import EngineConfig, Environment
from octavo.errors import InvalidArgumentError
from octavo.eval.measures import (
    Divergence,
    Int32,
    Perplexity,
    compare,
    divergence,
    perplexity,
    surprisals,
)
from octavo.eval.scorer import Scorer
from octavo.eval.windows import Window, check_window, make_windows
from octavo.files import read_text
from octavo.models.adapter import Adapter
from octavo.progress import StageProgress
from octavo.quantization.plan import describe_dtypes
from octavo.text.tokenizer import Tokenizer
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.pooling import for_runner, refuse_embeddings

DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    config: how to run the model; its window decides max_model_len, batch and cache.
    against: "same" (this model, unquantized, in f32), "none", a model as `model` takes it, or None:
        "same" where the model is rounded while it is loaded, "none" where it runs in plain f32 or
        is stored quantized.
    text: a file in UTF-8, or None for the text that octavo ships.
    random: so many random tokens in place of a text (seeded by config.seed); needs no tokenizer.
    window, stride: in tokens; None: 512 (or the model's limit, if less), and half the window.
    max_windows: how many windows to take from the text's beginning; None: all.
    adapter: the folder of a LoRA adapter for `model`, and for what it is compared with if that is
        "same".
    """

    model: str | None
    config: EngineConfig
    against: str | None = None
    text: Path | None = None
    random: int | None = None
    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class ModelRun:
    """A model as it was run. weights: what its matrices are kept in, as in "int4 and int8".

    weight_bytes: of all ranks together; what each has whole counts several times.
    adapter: the folder of its LoRA adapter, if it has one.
    """

    path: str
    weights: str
    dtype: str
    kv_dtype: str
    device: str
    weight_bytes: int
    perplexity: Perplexity
    adapter: str | None = None
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class EvalResult:
    """Everything that `octavo eval` tells; surprisals and divergences in nats."""

    model: ModelRun
    against: ModelRun | None
    divergence: Divergence | None
    text: str
    text_sha256: str  # of the token ids, as little-endian int32, where tokens are random
    num_tokens: int
    window: int
    stride: int
    num_windows: int
    num_scored: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """Tokens to be predicted, and where they came from."""

    name: str
    sha256: str
    tokens: Int32


class _Models:
    """The model in question and what it is compared with, both loaded."""

    def __init__(
        self, request: EvalRequest, environment: Environment, progress: StageProgress
    ) -> None:
        self.files = _read_texts(request.model, request.config, environment)
        self.reference_files: ModelFiles | None = None
        checkpoint = open_checkpoint(self.files, request.config.load_format, request.config.seed)
        limit = self.files.spec.max_position_embeddings
        self.window = min(DEFAULT_WINDOW, limit) if request.window is None else request.window
        check_window(self.window)  # before any weights are loaded
        against = request.against
        if against is None:
            plain = is_plain_f32(request.config, checkpoint)
            against = "none" if plain or checkpoint.formats else "same"
        reference = None
        if against != "none":
            reference = self._open_reference(against, request, checkpoint, environment)

        folder = request.adapter
        adapter = None if folder is None else read_adapter(folder, self.files, checkpoint)

        def load(
            files: ModelFiles, checkpoint: Checkpoint, config: EngineConfig, adapter: Adapter | None
        ) -> Scorer:
            stage = partial(progress, f"loading {files.path.name}")
            return Scorer(files, checkpoint, config, self.window, stage, environment, adapter)

        self.model = load(self.files, checkpoint, request.config, adapter)
        self.reference: Scorer | None = None
        self.reference_adapter: Path | None = None
        if reference is not None and self.reference_files is not None:
            plain_config = replace(request.config, dtype="f32", kv_dtype="f32", quantize=None)
            own = adapter if against == "same" else None
            self.reference = load(self.reference_files, reference, plain_config, own)
            self.reference_adapter = None if own is None else folder

    def _open_reference(
        self,
        against: str,
        request: EvalRequest,
        checkpoint: Checkpoint,
        environment: Environment,
    ) -> Checkpoint:
        formats = checkpoint.formats.keys()
        is_gguf = bool(formats) and not self.files.quantized
        if against == "same" and is_gguf and formats <= checkpoint.stored.keys():
            # A GGUF file: the numbers that it stands for.
            self.reference_files = read_model(self.files.path, "f32")
            return open_checkpoint(self.reference_files)
        if against == "same" and checkpoint.formats:
            raise InvalidArgumentError(
                f"{self.files.path} holds quantized weights, so that there is no unquantized same "
                "model to compare with; expected --against MODEL, the one it was made from"
            )
        if against == "same":
            self.reference_files = self.files
            return checkpoint
        self.reference_files = _read_texts(against, request.config, environment)
        ours, theirs = self.files.spec.vocab_size, self.reference_files.spec.vocab_size
        if ours != theirs:
            raise InvalidArgumentError(
                f"--against {against} has a vocabulary of {theirs:,} tokens and {self.files.path} "
                f"one of {ours:,}; distributions can only be compared over the same tokens"
            )
        config = request.config
        return open_checkpoint(self.reference_files, config.load_format, config.seed)


def _read_texts(model: str | None, config: EngineConfig, environment: Environment) -> ModelFiles:
    """A model that makes texts; InvalidArgumentError for one of embeddings."""
    files = read_model(resolve_model(model, environment))
    instead = (
        "it predicts no tokens, and has no perplexity. `octavo diff` compares its hidden states "
        "with another implementation's, and the vectors of `octavo embed` with and without "
        "--quantize show what a number format costs"
    )
    refuse_embeddings(files, config.runner, instead)
    return for_runner(files, config.runner, has_weights=config.load_format != "dummy")[0]


def is_plain_f32(config: EngineConfig, checkpoint: Checkpoint) -> bool:
    """Whether the model would run in f32 throughout."""
    in_f32 = checkpoint.dtype != "bf16" if config.dtype == "auto" else config.dtype == "f32"
    plain = in_f32 and config.kv_dtype in ("auto", "f32")
    return plain and config.quantize is None and not checkpoint.formats


def read_tokens(request: EvalRequest, files: ModelFiles, reference: ModelFiles | None) -> Text:
    """The tokens to score. Both models must cut the text into the same ones."""
    if request.random is not None:
        if request.text is not None:
            raise InvalidArgumentError("a text and random tokens are given; expected one of them")
        if request.random < 2:
            raise InvalidArgumentError(f"random is {request.random}; expected 2 tokens or more")
        generator = np.random.default_rng(request.config.seed)
        tokens = generator.integers(0, files.spec.vocab_size, request.random, np.int32)
        digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
        return Text(f"{request.random} random tokens", digest, tokens)
    if request.text is None:
        name = "Alice's Adventures in Wonderland (chapters I to VI)"
        text = resources.files("octavo.eval").joinpath("text.txt").read_bytes().decode("utf-8")
    else:
        name, text = str(request.text), read_text(request.text, "a text in UTF-8")
    ids = Tokenizer(files.folder).encode(text)
    other = reference is not None and reference.path != files.path
    if reference is not None and other and Tokenizer(reference.folder).encode(text) != ids:
        raise InvalidArgumentError(
            f"{reference.path} and {files.path} cut the text into different tokens; "
            "distributions can only be compared over the same tokens"
        )
    outside = max(ids, default=0)
    if outside >= files.spec.vocab_size:
        raise InvalidArgumentError(
            f"the tokenizer of {files.path} gives token {outside}; config.json has a vocabulary "
            f"of {files.spec.vocab_size}"
        )
    return Text(name, hashlib.sha256(text.encode()).hexdigest(), np.array(ids, np.int32))


def evaluate(
    request: EvalRequest, environment: Environment, progress: StageProgress = lambda *_: None
) -> EvalResult:
    """Load, score, sum up. Raises what loading raises, and InvalidArgumentError.

    Memory beside both models: the logits of one chunk, once a model, and the scored numbers.
    """
    models = _Models(request, environment, progress)
    text = read_tokens(request, models.files, models.reference_files)
    stride = max(1, models.window // 2) if request.stride is None else request.stride
    windows = make_windows(len(text.tokens), models.window, stride, request.max_windows)
    start = time.perf_counter()
    scores = score(models.model, models.reference, text.tokens, windows, progress)
    seconds = time.perf_counter() - start
    ours, adapter = perplexity(scores.surprisal), request.adapter
    against, apart = None, None
    if models.reference is not None and models.reference_files is not None:
        theirs = perplexity(scores.reference_surprisal)
        own = models.reference_adapter
        against = _describe(models.reference_files, models.reference, theirs, own)
        apart = divergence(scores.kl, scores.same_top, ours.value / theirs.value)
    return EvalResult(
        model=_describe(models.files, models.model, ours, adapter),
        against=against,
        divergence=apart,
        text=text.name,
        text_sha256=text.sha256,
        num_tokens=len(text.tokens),
        window=models.window,
        stride=stride,
        num_windows=len(windows),
        num_scored=ours.num_tokens,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Scores:
    """One entry a scored token, in order; without a reference the last three are empty."""

    surprisal: Any
    reference_surprisal: Any
    kl: Any
    same_top: Any


def score(
    model: Scorer,
    reference: Scorer | None,
    tokens: Int32,
    windows: list[Window],
    progress: StageProgress = lambda *_: None,
) -> Scores:
    """Both models over the same windows, chunk by chunk in step."""
    ours: list[Any] = []
    theirs: list[Any] = [np.empty(0)]
    kl: list[Any] = [np.empty(0)]
    same: list[Any] = [np.empty(0, np.bool_)]
    for number, window in enumerate(windows):
        progress("evaluating", number, len(windows))
        if reference is None:
            for first, logits in model.logits(tokens, window):
                ours.append(surprisals(logits, tokens[first : first + len(logits)]))
            continue
        chunks = zip(model.logits(tokens, window), reference.logits(tokens, window), strict=True)
        for (first, logits), (_, expected) in chunks:
            found = compare(logits, expected, tokens[first : first + len(logits)])
            ours.append(found.surprisal)
            theirs.append(found.reference_surprisal)
            kl.append(found.kl)
            same.append(found.same_top)
    progress("evaluating", len(windows), len(windows))
    return Scores(*(np.concatenate(parts) for parts in (ours, theirs, kl, same)))


def _describe(
    files: ModelFiles, scorer: Scorer, value: Perplexity, adapter: Path | None
) -> ModelRun:
    options = scorer.loaded.options
    return ModelRun(
        path=str(files.path),
        weights=describe_dtypes(options.formats, options.dtype),
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        device=scorer.loaded.device,
        tensor_parallel_size=scorer.loaded.options.world_size,
        weight_bytes=scorer.loaded.runtime.memory()["weights"],
        perplexity=value,
        adapter=None if adapter is None else str(adapter),
    )
