"""GGUF files of Qwen2 and Qwen2.5: rows of q and k are in Hugging Face's order."""

from __future__ import annotations

from typing import Any

from octavo.models.family import GgufFamily, GgufHeader, TensorNames
from octavo.models.gguf_reading import GGUF_TENSORS, read_common, read_rope_scaling


def read_qwen2(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    entries, config = read_common(header, "qwen2")
    return {**config, "hidden_act": "silu", "rope_scaling": read_rope_scaling(entries)}


QWEN2 = GgufFamily("qwen2", read_qwen2, TensorNames(GGUF_TENSORS))
