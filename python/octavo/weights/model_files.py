"""Reading a model's configuration, from a directory or from the header of a GGUF file.

Weights are opened in two cases only: a GGUF file, whose header is the configuration, and a model
whose head may not be tied although the configuration says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ModelNotFoundError, WeightsError
from octavo.folder import Folder, MemoryFolder
from octavo.models.family import Family, WeightSource
from octavo.models.fields import Fields, describe, read_json_object
from octavo.models.registry import find_family
from octavo.models.spec import ModelSpec
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.gguf_parts import OutputDType, find_gguf
from octavo.weights.quantization_config import read_quantization, with_quantization
from octavo.weights.safetensors import open_weight_files
from octavo.weights.stored import StoredMatrix
from octavo.weights.tensor import Tensor

_CHUNK = 1 << 26  # bytes compared in one go


@dataclass(frozen=True)
class ModelFiles:
    """A model whose configuration has been read and found usable.

    folder: the files beside the weights: of the directory, or made from a GGUF file.
    config: config.json unchanged, except for a tie that the weights contradict, and a
    quantization_config that lies elsewhere.
    """

    folder: Folder
    config: dict[str, Any]
    spec: ModelSpec
    family: Family
    eos_token_ids: tuple[int, ...]  # any of these ends a text; may be empty
    generation_config: dict[str, Any]  # generation_config.json; empty where there is none
    # Matrices that are not stored as plain numbers, by octavo's name without ".weight".
    quantized: Mapping[str, StoredMatrix] = field(default_factory=dict)

    @cached_property
    def weight_map(self) -> dict[str, WeightSource]:
        """octavo's names -> where a Hugging Face directory of the family holds the weights."""
        return self.family.tensors.weight_map(self.spec)

    @property
    def path(self) -> Path:
        """The directory, or the GGUF file."""
        return self.folder.path if isinstance(self.folder, MemoryFolder) else self.folder


def read_model(path: Path, gguf_dtype: OutputDType = "codes") -> ModelFiles:
    """Read the configuration of a Hugging Face model directory, or of a GGUF file.

    gguf_dtype: what the weights of a GGUF file are read as, see `GgufFolder`.

    A directory without config.json that holds one GGUF model stands for that model.
    Raises ModelNotFoundError where there is neither; UnsupportedModelError with the field and value
    that octavo cannot run; WeightsError for a damaged GGUF file.
    """
    path = Path(path)
    gguf = find_gguf(path)
    if gguf is not None:
        return read_folder(GgufFolder(gguf, gguf_dtype))
    if not path.is_dir():
        raise ModelNotFoundError(
            f"{path} is not a directory, nor a GGUF file; expected a Hugging Face model "
            "directory (config.json, tokenizer.json, model.safetensors). `octavo pull` fetches one"
        )
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{path} holds no config.json; expected a Hugging Face model directory "
            "(config.json, tokenizer.json, model.safetensors), or a GGUF file"
        )
    return read_folder(path)


def read_folder(folder: Folder) -> ModelFiles:
    """Read config.json and generation_config.json; UnsupportedModelError as `read_model`."""
    config = with_quantization(read_json_object(folder / "config.json"), folder)
    family = find_family(config)
    spec = family.read_spec(config)
    if spec.tie_word_embeddings and isinstance(folder, Path):
        head, table = family.tensors.tensor("lm_head"), family.tensors.tensor("embed")
        tables = (table, table.removeprefix(family.base_prefix))
        if any(_head_differs(folder, head, name) for name in tables):
            warnings.warn(
                f"{folder}: config.json has tie_word_embeddings true, but the weights hold an "
                f"{head} that differs from {table}. It is used as a head of its own, as "
                "transformers does; set tie_word_embeddings to false",
                stacklevel=3,
            )
            config["tie_word_embeddings"] = False
            spec = family.read_spec(config)
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    return ModelFiles(
        folder=folder,
        config=config,
        spec=spec,
        family=family,
        eos_token_ids=_eos_token_ids(config, generation, family, spec.vocab_size),
        generation_config=generation,
        quantized=read_quantization(config, spec, family.tensors),
    )


def _head_differs(path: Path, head: str, table: str) -> bool:
    """Whether a directory's weights hold a head that differs from the embedding `table`.

    False where either is missing, where they are equal in every bit, or where no weights can be
    read (opening the checkpoint reports why).
    """
    try:
        source = open_weight_files(path)
        one, other = source.infos.get(head), source.infos.get(table)
        if one is None or other is None:
            return False
        return one != other or not _equal(source.read(head), source.read(table))
    except (WeightsError, OSError):
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same type and shape have the same bytes."""
    left, right = (tensor.data.reshape(-1).view(np.uint8) for tensor in (one, other))
    return all(
        np.array_equal(left[start : start + _CHUNK], right[start : start + _CHUNK])
        for start in range(0, left.size, _CHUNK)
    )


def _eos_token_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], family: Family, vocab_size: int
) -> tuple[int, ...]:
    """Which tokens end a text: generation_config.json's, else config.json's, else the family's.

    A null in config.json means that there are none; a missing field means the family's default, as
    in transformers.
    """
    source, value = "generation_config.json", generation.get("eos_token_id")
    if value is None:
        source, value = "config.json", config.get("eos_token_id", family.default_eos_token_id)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise Fields({}, source).error(
                "eos_token_id", value, "a token id (0 or more), a list of them, or null"
            )
    outside = [token for token in ids if token >= vocab_size]
    if outside and "eos_token_id" in (*config, *generation):
        warnings.warn(
            f"{source}: eos_token_id {describe(outside)} lies outside the vocabulary of "
            f"{vocab_size} tokens, so it never ends a text",
            stacklevel=4,
        )
    return tuple(dict.fromkeys(token for token in ids if token < vocab_size))
