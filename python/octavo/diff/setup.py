"""From the words of a command line to two implementations, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from octavo.config import LOAD_FORMATS, QUANTIZE, Environment, check_choice
from octavo.diff.comparison import Comparison, DiffOptions, chunk_size_for
from octavo.diff.hugging_face import HuggingFaceImplementation, import_hugging_face
from octavo.diff.implementations import Implementation, Int32, ReferenceImplementation
from octavo.diff.native import load_native
from octavo.diff.result import DiffResult
from octavo.errors import InsufficientMemoryError, InvalidArgumentError
from octavo.files import expand_home
from octavo.folder import MemoryFolder
from octavo.machine import available_memory
from octavo.models.adapter import Adapter
from octavo.models.layer import weight_shapes
from octavo.models.rope import at_length, for_length
from octavo.models.spec import ModelSpec
from octavo.progress import StageProgress
from octavo.quantization.apply import dequantized, quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.reference.llama import ReferenceModel
from octavo.text.stream import StreamDecoder
from octavo.text.tokenizer import Tokenizer
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.hub import DEFAULT_MODEL, resolve_model
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.pooling import lacks_head, without_head

AGAINST = ("reference", "hf")
DTYPES = ("f32", "bf16")
# Words, digits, code, accents, Chinese, an emoji: what breaks tends to break on one of them.
DEFAULT_PROMPT = (
    "The capital of France is Paris, and 12 * 34 = 408.\n"
    "def square(x):\n    return x ** 2\n"
    "Ça va très bien à Zürich; 你好，世界! 🙂 Once upon a time, there was a"
)
RANDOM_TOKENS = 64  # where a model has no tokenizer and nothing was asked for


@dataclass(frozen=True)
class DiffRequest:
    """What to compare; see `octavo diff --help`. An InvalidArgumentError names what is wrong.

    A quantized model, by `quantize` or in its files, is compared as bf16 is: what meets a
    quantized matrix is rounded, as octavo's instruction set rounds it (`grouped_activations` in
    octavo.reference.quantization), and two right runs differ as far as that takes them.
    """

    model: str | None = None
    against: str = "reference"
    dtype: str = "f32"
    quantize: str | None = None
    prompt: str | None = None
    random: int | None = None
    device: str = "cpu"
    adapter: Path | None = None
    load_format: str = "auto"
    judge: bool = False
    seed: int = 0
    num_threads: int = 0
    options: DiffOptions = field(default_factory=DiffOptions)

    def __post_init__(self) -> None:
        check_choice("--against", self.against, AGAINST)
        check_choice("--dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            check_choice("--quantize", self.quantize, QUANTIZE)
        check_choice("--load-format", self.load_format, LOAD_FORMATS)
        if self.prompt is not None and self.random is not None:
            raise InvalidArgumentError("--prompt and --random were both given; expected one")
        if self.prompt is not None and not self.prompt:
            raise InvalidArgumentError("the prompt is empty; expected some text")
        if self.random is not None and self.random < 1:
            raise InvalidArgumentError(f"--random is {self.random}; expected 1 or more tokens")
        if self.options.steps < 0:
            raise InvalidArgumentError(f"--steps is {self.options.steps}; expected 0 or more")
        tolerance = self.options.tolerance
        if tolerance is not None and not 0 <= tolerance < float("inf"):
            raise InvalidArgumentError(
                f"--tolerance is {tolerance}; expected a relative error, such as 1e-4"
            )


def compare(request: DiffRequest, environment: Environment, progress: StageProgress) -> DiffResult:
    """Open the model, cut the text into tokens, load both implementations, and run them.

    Raises OctavoError of every kind for what the user can put right.
    """
    path = resolve_model(request.model, environment)
    files = read_model(path)
    headless = request.load_format != "dummy" and lacks_head(files)
    files = _with_head(files) if headless else files
    token_ids, tokenizer = _tokens(request, files)
    _check_length(files.spec, len(token_ids), request.options.steps)
    max_tokens = len(token_ids) + max(request.options.steps, 1)
    num_tokens = len(token_ids) + request.options.steps
    _check_rope(for_length(files.spec, num_tokens), len(token_ids))
    files = replace(files, spec=at_length(files.spec, num_tokens))
    checkpoint = quantize_checkpoint(
        open_checkpoint(files, request.load_format, request.seed),
        files.spec,
        None if request.quantize is None else Scheme(request.quantize),
    )
    if checkpoint.formats:
        if request.against == "hf":
            raise InvalidArgumentError(
                "Hugging Face runs other numbers than a quantized model; expected --against "
                "reference. `octavo eval` measures what quantizing costs"
            )
        request = replace(request, dtype="bf16")
    _check_memory(request, checkpoint)
    folder = request.adapter
    adapter = None if folder is None else read_adapter(folder, files, checkpoint)
    if request.against == "hf":  # where it is missing, that is said before anything is loaded
        import_hugging_face(with_peft=adapter is not None)
    options = request.options
    left = load_native(
        files,
        checkpoint,
        device=request.device,
        dtype=request.dtype,
        max_tokens=max_tokens,
        chunk_size=min(options.chunk_size or chunk_size_for(files.spec), len(token_ids)),
        num_threads=request.num_threads,
        adapter=adapter,
        progress=partial(progress, "loading octavo"),
    )
    definition = ReferenceModel(
        files.spec,
        _float32_weights(files.spec, checkpoint, progress),
        dtype=request.dtype,
        kv_dtype=request.dtype,
        formats=checkpoint.formats,
        grouped_activations=left.grouped_activations,
        adapter=adapter,
    )
    if headless:
        left.description += ", the embedding as head"
    # What transformers cannot load as octavo does: what is made up, or decoded from GGUF.
    given = headless or request.load_format == "dummy" or isinstance(files.folder, MemoryFolder)
    weights = checkpoint if given else None
    right = _load_right(request, files, weights, definition, num_tokens, progress)
    del weights
    del checkpoint  # quantized weights take memory, and all of them are loaded by now
    truth = _truth(request, definition, adapter)
    comparison = Comparison(left, right, definition, token_ids, options, truth, progress)

    def decode(ids: list[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)

    name = request.model or DEFAULT_MODEL
    title = path.resolve().name if path == expand_home(name) else name
    texts = _token_texts(token_ids, tokenizer)
    return comparison.run(title, texts, decode, judged=request.judge)


def _with_head(files: ModelFiles) -> ModelFiles:
    """An embedding model without a head, whose embedding is taken for one.

    So its hidden states are compared up to the final norm, and a product with them besides.
    """
    config = {**files.config, "tie_word_embeddings": True}
    return replace(without_head(files), config=config)


def _tokens(request: DiffRequest, files: ModelFiles) -> tuple[Int32, Tokenizer | None]:
    """The tokens to run, int32 (count,), and the model's tokenizer if it is there."""
    has_tokenizer = (files.folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer(files.folder) if has_tokenizer or request.prompt is not None else None
    if request.random is not None or tokenizer is None:
        generator = np.random.default_rng(request.seed)
        count = request.random or RANDOM_TOKENS
        return generator.integers(0, files.spec.vocab_size, count).astype(np.int32), tokenizer
    ids = tokenizer.encode(DEFAULT_PROMPT if request.prompt is None else request.prompt)
    if not ids:
        raise InvalidArgumentError("the prompt has no tokens; expected some text")
    return np.array(ids, dtype=np.int32), tokenizer


def _token_texts(token_ids: Int32, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """What each token adds to the text; "·" where a character is not whole yet."""
    if tokenizer is None:
        return tuple(f"#{token} " for token in token_ids)
    stream = StreamDecoder(tokenizer, skip_special_tokens=False)
    return tuple(stream.push(int(token)) or "·" for token in token_ids)


def _check_length(spec: ModelSpec, count: int, steps: int) -> None:
    limit = spec.max_position_embeddings
    if count + steps > limit:
        ways = [f"take at most {limit - steps} tokens"] if steps < limit else []
        ways += [f"lower --steps to {limit - count}"] if count <= limit else []
        raise InvalidArgumentError(
            f"{count} tokens and {steps} greedy steps make {count + steps}; the model has room "
            f"for {limit}: {', or '.join(ways) or 'take fewer of both'}"
        )


def _check_rope(spec: ModelSpec, count: int) -> None:
    """Prompt and steps must have one set of rope frequencies."""
    switch = spec.rope_switch
    if count <= switch:
        raise InvalidArgumentError(
            f"sequences of more than {switch} tokens have other rope frequencies, and the greedy "
            f"steps go beyond, from {count}: lower --steps to {switch - count}, or take a prompt "
            f"of more than {switch} tokens"
        )


def _check_memory(request: DiffRequest, checkpoint: Checkpoint) -> None:
    """Each holds the weights once more; better to say so than to be killed half-way."""
    parameters = checkpoint.num_parameters
    size = 4 if request.dtype == "f32" else 2
    rounding = 4 if request.dtype == "bf16" else 0  # while the reference's are rounded
    hugging_face = size * parameters if request.against == "hf" else 0
    needed = (4 + rounding + size) * parameters + hugging_face  # the reference's, octavo's
    available = available_memory()
    if needed > available:
        fits = hugging_face and needed - hugging_face <= available
        raise InsufficientMemoryError(
            f"comparing holds the weights several times, {needed / 2**30:.1f} GiB in all; "
            f"{available / 2**30:.1f} GiB are available",
            [{"against": "reference"}] if fits else [],
        )


def _float32_weights(
    spec: ModelSpec, checkpoint: Checkpoint, progress: StageProgress
) -> Mapping[str, np.ndarray]:
    """All weights as float32, by octavo's names; codes as the numbers that they stand for."""
    weights: dict[str, np.ndarray] = {}
    names = weight_shapes(spec)
    for index, name in enumerate(names):
        progress("reading weights", index, len(names))
        weights[name] = dequantized(checkpoint, name)
    return weights


def _load_right(
    request: DiffRequest,
    files: ModelFiles,
    weights: Checkpoint | None,
    definition: ReferenceModel,
    max_tokens: int,
    progress: StageProgress,
) -> Implementation:
    """weights: what transformers is given in place of what it loads."""
    if request.against == "reference":
        return ReferenceImplementation(definition)
    _, transformers = import_hugging_face()
    transformers.utils.logging.disable_progress_bar()  # ours is running
    progress("loading Hugging Face", 0, 1)
    return HuggingFaceImplementation(
        files,
        request.dtype,
        weights=weights,
        adapter=request.adapter,
        sequence_length=max_tokens,
    )


def _truth(
    request: DiffRequest, definition: ReferenceModel, adapter: Adapter | None
) -> Implementation | None:
    """The model without rounding: what bf16 is measured by, and what --judge compares with.

    The weights are those of `definition` (rounded to bf16 if it is so), the activations are not
    rounded; arithmetic is float64 when judging, else float32.
    """
    if not request.judge and request.dtype == "f32":
        return None
    compute = np.float64 if request.judge else np.float32
    model = ReferenceModel(  # no formats
        definition.spec, definition.weights, adapter=adapter, compute=compute
    )
    arithmetic = "float64" if request.judge else "float32"
    kind = "quantized" if definition.formats else request.dtype
    description = f"the same {kind} weights, activations not rounded, {arithmetic}"
    return ReferenceImplementation(model, name="exact", description=description)
