"""Whether a model gives embeddings, and how: from the files of sentence-transformers beside it.

    modules.json                  the parts of the model, in order: Transformer, Pooling, Normalize
    1_Pooling/config.json         which states become the vector
    sentence_bert_config.json     the longest text; newer: tokenizer_config.json
    config_sentence_transformers.json   texts that are put before a query or a document

What would make another vector than octavo computes is refused by name, never left out in silence:
other kinds of pooling, further layers (Dense), attention in both directions, code of the model's
own. Beside a GGUF file there are none of these; its metadata say the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError, UnsupportedModelError
from octavo.files import write_durably
from octavo.models.fields import Fields, Limit, describe, read_json_object
from octavo.models.pooling import Pooling, PoolingKind
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.model_files import ModelFiles
from octavo.weights.safetensors import open_weight_files

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

MODULE_CONFIGS = "[0-9]_*/config.json"
"""A pattern of the files of sentence-transformers' modules, which lie in folders of their own."""

_KINDS: dict[str, PoolingKind] = {"lasttoken": "last", "mean": "mean", "cls": "first"}
_SUPPORTED = "lasttoken, mean or cls, one of them"
# The older spelling: a field for each kind.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODULES = ("Transformer", "Pooling", "Normalize")
# llama.cpp's numbers of the kinds in a GGUF file's metadata; 0: none.
_GGUF_KINDS: dict[int, PoolingKind] = {1: "mean", 2: "first", 3: "last"}


def find_pooling(files: ModelFiles, runner: str = "auto") -> Pooling | None:
    """How the model's vectors are made; None for a model that makes texts.

    runner: "auto" goes by the files: sentence-transformers', or an architecture without a head
    (`Qwen3Model`). "pooling" takes any model as one of embeddings: without such files the last
    token's state, normalized. "generate" takes it as one that makes texts.
    Raises UnsupportedModelError, with the field or module, for what octavo does not compute.
    """
    try:
        return None if runner == "generate" else _find_pooling(files, runner)
    except UnsupportedModelError as error:
        if runner != "auto":
            raise
        raise UnsupportedModelError(
            f"{error}. With runner='generate', or --runner generate, it makes texts"
        ) from error


def _find_pooling(files: ModelFiles, runner: str) -> Pooling | None:
    pooling = Pooling(files.spec.hidden_size)
    if isinstance(files.folder, GgufFolder):
        kind = _gguf_kind(files.folder)
        if kind is None and runner == "auto":
            return None
        return replace(pooling, kind=kind or "last")
    if not isinstance(files.folder, Path):
        return pooling if runner == "pooling" else None
    has_modules = (files.folder / "modules.json").is_file()
    if not has_modules and runner == "auto" and not is_headless(files):
        return None
    _refuse_own_code(files.config)
    return _read_modules(files.folder, pooling) if has_modules else pooling


def is_headless(files: ModelFiles) -> bool:
    """Whether the architecture is that of the model without its head, such as `Qwen3Model`."""
    names = files.config.get("architectures") or []
    return any(name in files.family.aliases for name in names)


def lacks_head(files: ModelFiles) -> bool:
    """Whether the weights of what may be an embedding model hold no head, and it is not tied.

    The architecture does not say: a `Qwen3ForCausalLM` may be saved without its head, and beside a
    `LlamaModel` one may be stored. Raises what opening the weights raises.
    """
    folder = files.folder
    if files.spec.tie_word_embeddings or not isinstance(folder, Path):
        return False
    if not is_headless(files) and not (folder / "modules.json").is_file():
        return False
    head = files.family.tensors.tensor("lm_head").removesuffix("weight")
    return not any(name.startswith(head) for name in open_weight_files(folder).infos)


def without_head(files: ModelFiles) -> ModelFiles:
    """The model as one that needs no head: vectors come from before it, so none is loaded."""
    return replace(files, spec=replace(files.spec, tie_word_embeddings=True))


def for_runner(
    files: ModelFiles, runner: str, *, has_weights: bool = True
) -> tuple[ModelFiles, Pooling | None]:
    """A model as it is run, and how its vectors are made; None for one that makes texts.

    has_weights: a model of texts without a head is an UnsupportedModelError. Otherwise as
    `find_pooling`.
    """
    pooling = find_pooling(files, runner)
    if pooling is not None:
        return without_head(files), pooling
    if has_weights:
        refuse_headless(files)
    return files, None


def open_headless(files: ModelFiles) -> Checkpoint:
    """As `open_checkpoint`, also of an embedding model whose weights hold no head."""
    return open_checkpoint(without_head(files) if lacks_head(files) else files)


def write_modules(files: ModelFiles, target: Path) -> None:
    """Write what the metadata of a GGUF file say of vectors as sentence-transformers' files.

    Nothing for a directory, whose own files are copied, and for a model that makes texts.
    """
    pooling = find_pooling(files) if isinstance(files.folder, GgufFolder) else None
    if pooling is None:
        return
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": index, "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(paths.items())
    ]
    mode = next(name for name, kind in _KINDS.items() if kind == pooling.kind)
    config = {"word_embedding_dimension": pooling.dimensions, "pooling_mode": mode}
    (target / paths["Pooling"]).mkdir()
    for name, values in (("modules.json", modules), ("1_Pooling/config.json", config)):
        write_durably(target / name, (json.dumps(values, indent=2) + "\n").encode())


def pooling_notes(files: ModelFiles, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """What the user of an embedding model should know: what sentence-transformers would add."""
    notes = []
    folder = files.folder
    prompts = _read_optional(folder, "config_sentence_transformers.json")
    name = prompts.get("default_prompt_name")
    if name is not None:
        notes.append(
            f"{files.path.name}: config_sentence_transformers.json names the default prompt "
            f"{describe(name)}; octavo puts nothing before a text: write it there"
        )
    if tokenizer is not None and tokenizer.config.get("add_eos_token") is True:
        end = tokenizer.token_id(tokenizer.eos_token)
        if end is not None and tokenizer.encode("a")[-1] != end:
            notes.append(
                f"{files.path.name}: tokenizer_config.json has add_eos_token true, but "
                "tokenizer.json, which octavo follows, adds no end of text: save the tokenizer "
                f"anew, or end each text with {tokenizer.eos_token}"
            )
    return tuple(notes)


_VECTORS = "`octavo embed` has its vectors, `octavo serve` at /v1/embeddings"


def refuse_embeddings(files: ModelFiles, runner: str, instead: str = _VECTORS) -> None:
    """InvalidArgumentError for an embedding model in a command that makes texts, or scores them.

    instead: what to do.
    """
    if find_pooling(files, runner) is not None:
        raise InvalidArgumentError(
            f"{files.path.name} gives embeddings and makes no texts: {instead}. --runner generate "
            "takes it as a model of texts"
        )


def refuse_texts(files: ModelFiles, runner: str) -> None:
    """InvalidArgumentError for a model that makes texts in a command that makes vectors."""
    if find_pooling(files, runner) is None:
        raise InvalidArgumentError(
            f"{files.path.name} makes texts and gives no embeddings: name a model that does, or "
            "take this one's last hidden state with --runner pooling"
        )


def refuse_headless(files: ModelFiles) -> None:
    """UnsupportedModelError for a model that is to make texts and has nothing to make them with."""
    if lacks_head(files):
        raise UnsupportedModelError(
            f"{files.path} holds no head, and config.json has tie_word_embeddings false; expected "
            "runner='pooling', since it gives embeddings and no texts"
        )


def _read_modules(folder: Path, pooling: Pooling) -> Pooling:
    """The modules of modules.json, which must be those that octavo has, in their order."""
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise UnsupportedModelError(f"{path} holds {describe(modules)}; expected a list of objects")
    names = [str(each.get("type", "")).rpartition(".")[2] for each in modules]
    other = next((name for name in names if name not in _MODULES), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{path}: the module {other!r} is not computed by octavo; supported: "
            f"{', '.join(_MODULES)}"
        )
    if names not in (list(_MODULES), list(_MODULES[:2])):
        raise UnsupportedModelError(
            f"{path}: the modules are {', '.join(names) or 'none'}; supported: Transformer, "
            "Pooling, and perhaps Normalize, in this order"
        )
    place = modules[0].get("path")
    if place not in (None, "", "."):
        raise UnsupportedModelError(
            f"{path}: the Transformer lies in {describe(place)}; supported: the model's own folder"
        )
    kind = _read_kind(folder / str(modules[1].get("path", "1_Pooling")) / "config.json", pooling)
    own = Fields(_read_optional(folder, "sentence_bert_config.json"), "sentence_bert_config.json")
    own.refuse_unless("do_lower_case", (False,), "false (texts are taken as they are)")
    longest = own.optional_integer("max_seq_length", 1, Limit.POSITIONS)
    if longest is None:  # newer ones keep it in the tokenizer; 1e30 stands for no limit
        given = _read_optional(folder, "tokenizer_config.json").get("model_max_length")
        is_limit = isinstance(given, int) and 1 <= given <= Limit.POSITIONS
        longest = given if is_limit and not isinstance(given, bool) else None
    return replace(pooling, kind=kind, normalize=len(names) == 3, max_tokens=longest)


def _read_kind(path: Path, pooling: Pooling) -> PoolingKind:
    """The kind of pooling that the configuration of the module names, in either spelling."""
    values = read_json_object(path)
    fields = Fields(values, f"{path.parent.name}/{path.name}")
    for name in ("word_embedding_dimension", "embedding_dimension"):
        fields.refuse_unless(
            name, (pooling.dimensions,), f"{pooling.dimensions}, the model's hidden_size"
        )
    given = values.get("pooling_mode")
    if given is None:
        given = [kind for name, kind in _SWITCHES.items() if values.get(name)] or "mean"
    kinds = [given] if isinstance(given, str) else given
    if not isinstance(kinds, list) or len(kinds) != 1 or kinds[0] not in _KINDS:
        raise fields.error("pooling_mode", given, _SUPPORTED)
    kind = _KINDS[kinds[0]]
    if kind != "last":  # the last token is none of the prompt before a text
        fields.refuse_unless("include_prompt", (True,), "true (all tokens count)")
    return kind


def _refuse_own_code(config: Mapping[str, Any]) -> None:
    """Attention of some models is changed by code beside the weights, which octavo does not run."""
    own = config.get("auto_map")
    name = own.get("AutoModel") if isinstance(own, dict) else None
    if name is not None:
        raise UnsupportedModelError(
            f"config.json: auto_map names code of the model's own, {describe(name)}, which may "
            "compute other vectors (with attention in both directions, as gte-Qwen2's); supported: "
            "models of transformers. Take the field out if the code changes nothing"
        )


def _gguf_kind(folder: GgufFolder) -> PoolingKind | None:
    """What the metadata of a GGUF file say; None for a model that makes texts."""
    metadata = folder.parts.metadata
    prefix = metadata.get("general.architecture")
    fields = Fields(metadata, str(folder.path))
    fields.refuse_unless(f"{prefix}.attention.causal", (True,), "true (causal attention)")
    name = f"{prefix}.pooling_type"
    number = fields.optional_integer(name, 0, 2**31)
    if number in (None, 0):
        return None
    if number not in _GGUF_KINDS:
        raise fields.error(name, number, "1 (mean), 2 (first) or 3 (last)")
    return _GGUF_KINDS[number]


def _read_optional(folder: Any, name: str) -> dict[str, Any]:
    path = folder / name
    return read_json_object(path) if path.is_file() else {}
