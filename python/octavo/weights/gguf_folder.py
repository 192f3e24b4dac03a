"""A GGUF model as a Hugging Face directory in memory; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from octavo.folder import MemoryFolder
from octavo.models.family import GgufHeader
from octavo.models.fields import Fields
from octavo.models.registry import find_gguf_family
from octavo.weights.gguf_parts import GgufParts, OutputDType
from octavo.weights.gguf_tokenizer import Vocabulary, find_ends, make_config, make_tokenizer

_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class GgufFolder(MemoryFolder):
    """config.json, generation_config.json and the tokenizer's files; `parts` has the weights."""

    def __init__(self, path: Path, dtype: OutputDType = "auto") -> None:
        """The files of the model at `path`.

        dtype: of the weights, see `GgufParts`. "codes" is the same as "auto" there, and here says
        that `open_checkpoint` gives codes for the matrices for which octavo has such.

        Raises WeightsError for a damaged file, UnsupportedModelError for one that octavo cannot
        run. The tokenizer is converted, or TokenizerError raised, when one of its files is read.
        """
        self.parts = parts = GgufParts(path, dtype)
        self.as_codes = dtype == "codes"
        family, self.family = find_gguf_family(parts.metadata, str(parts.path))
        shapes = {name: info.shape for name, info in parts.infos.items()}
        constants = {
            name: parts.exact(name).to_float32().reshape(-1)
            for name in self.family.constants
            if name in shapes
        }
        self.config = self.family.read_config(
            GgufHeader(str(parts.path), parts.metadata, shapes, constants)
        )
        counts = dict.fromkeys(_TORCH_NAMES, 0)
        for name, info in parts.infos.items():
            counts[info.dtype] += 0 if name in constants else info.num_elements
        self.config |= {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self._token_id("eos"),
            "pad_token_id": self._token_id("padding"),
            "torch_dtype": _TORCH_NAMES[max(counts, key=lambda kind: counts[kind])],
        }
        super().__init__(
            parts.path,
            {
                "config.json": lambda: _json(self.config),
                "generation_config.json": lambda: _json(self._generation_config()),
                "tokenizer.json": lambda: self._make_tokenizer().to_str(pretty=True),
                "tokenizer_config.json": self._tokenizer_config,
            },
            self._make_tokenizer,
        )

    def _token_id(self, kind: str) -> int | None:
        fields = Fields(self.parts.metadata, str(self.parts.path))
        name = f"tokenizer.ggml.{kind}_token_id"
        return fields.optional_integer(name, 0, self.config["vocab_size"] - 1)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.parts.metadata, self.config["vocab_size"])

    def _make_tokenizer(self) -> Any:
        return make_tokenizer(self._vocabulary)

    def _tokenizer_config(self) -> str:
        return _json(make_config(self._vocabulary, self.config["max_position_embeddings"]))

    def _generation_config(self) -> dict[str, Any]:
        named = map(self._token_id, ("eos", "eot", "eom"))  # of a text, a turn, a message
        found = (*named, *find_ends(self.parts.metadata))
        ends = list(dict.fromkeys(token for token in found if token is not None))
        values = {
            "bos_token_id": self.config["bos_token_id"],
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.config["pad_token_id"],
        }
        return {name: value for name, value in values.items() if value is not None}


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
