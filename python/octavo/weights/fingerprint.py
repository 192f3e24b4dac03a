"""A short digest that tells whether two directories or GGUF files hold the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.folder import Folder
from octavo.weights.files import open_weight_files
from octavo.weights.gguf_folder import GgufFolder

_SAMPLE_BYTES = 4096
# What decides how a text becomes tokens, what is computed with them, and where an answer ends.
_TEXT_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def model_digest(folder: Folder, load_format: str = "auto") -> str:
    """16 hexadecimal digits that another model, or another version of it, does not share.

    They cover the files of the configuration, the tokenizer and the chat template byte for byte,
    and of the weights the name, type, shape and 4 KiB from the middle of every tensor: training
    changes all of a tensor, and reading 4 KiB of each costs milliseconds where reading all costs as
    much as loading. Where the model lies, and how the tensors are spread over files, does not
    matter. load_format "dummy" opens no weights. Raises WeightsError as `open_weight_files`.
    """
    digest = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        # With the lengths, so that nothing can pass from one piece to the next unseen.
        digest.update(f"{name!r} {len(content)}\n".encode())
        digest.update(content)

    for name in _TEXT_FILES:
        file = folder / name
        if file.is_file():
            add(name, file.read_bytes())
    if load_format == "dummy":
        add("dummy weights", b"")
    else:
        for described, data in _tensors(folder):
            start = max(0, (data.size - _SAMPLE_BYTES) // 2)
            add(described, data[start : start + _SAMPLE_BYTES].tobytes())
    return digest.hexdigest()[:16]


def _tensors(folder: Folder) -> Iterator[tuple[str, Any]]:
    """(name, type and shape; bytes) of every tensor, in the order of their names."""
    if isinstance(folder, GgufFolder):
        parts = folder.parts
        for name, tensor in sorted(parts.tensors.items()):
            yield f"{name} {tensor.kind} {tensor.shape}", parts.read_bytes(name)
        return
    source = open_weight_files(Path(str(folder)))
    for name, info in sorted(source.infos.items()):
        yield f"{name} {info.dtype} {info.shape}", source.read_bytes(name)
