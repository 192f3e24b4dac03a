"""A GGUF model as the Hugging Face directory that it stands for, without writing one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from octavo.folder import MemoryFolder
from octavo.weights.gguf_llama import GgufLlamaSource, OutputDType, end_of_text_ids, read_config
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.gguf_tokenizer import convert_tokenizer

_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class GgufFolder(MemoryFolder):
    """config.json, generation_config.json and the tokenizer's files; `source` has the weights."""

    def __init__(self, path: Path, dtype: OutputDType = "auto") -> None:
        """dtype: of the weights, see `GgufLlamaSource`.

        Raises WeightsError for a damaged file, UnsupportedModelError for what octavo cannot run.
        The tokenizer is converted when one of its files is read: TokenizerError comes then.
        """
        self.parts = GgufParts(path)
        self.config = read_config(self.parts)
        self.source = GgufLlamaSource(self.parts, self.config, dtype)
        counts = dict.fromkeys(_TORCH_NAMES, 0)
        for info in self.source.infos.values():
            counts[info.dtype] += info.num_elements
        self.config["torch_dtype"] = _TORCH_NAMES[max(counts, key=lambda kind: counts[kind])]
        super().__init__(
            self.parts.path,
            {
                "config.json": lambda: _json(self.config),
                "generation_config.json": lambda: _json(self._generation_config()),
                "tokenizer.json": lambda: self._tokenizer["tokenizer.json"],
                "tokenizer_config.json": lambda: self._tokenizer["tokenizer_config.json"],
            },
        )

    @cached_property
    def _tokenizer(self) -> dict[str, str]:
        return convert_tokenizer(
            self.parts.metadata, self.config["vocab_size"], self.config["max_position_embeddings"]
        )

    def _generation_config(self) -> dict[str, Any]:
        ends = end_of_text_ids(self.parts, self.config["vocab_size"])
        values = {
            "bos_token_id": self.config["bos_token_id"],
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.config["pad_token_id"],
        }
        return {name: value for name, value in values.items() if value is not None}


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
