"""A short digest that tells whether two directories hold the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from octavo.weights.checkpoint import open_weight_files

_SAMPLE_BYTES = 4096
# What decides how a text becomes tokens, what is computed with them, and where an answer ends.
_TEXT_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def model_digest(directory: Path, load_format: str = "auto") -> str:
    """16 hexadecimal digits that another model, or another version of it, does not share.

    They cover the files of the configuration, the tokenizer and the chat template byte for byte,
    and of the weights the name, type, shape and 4 KiB from the middle of every tensor: training
    changes all of a tensor, and reading 4 KiB of each costs milliseconds where reading all costs as
    much as loading. Where the directory lies, and how the tensors are spread over files, does not
    matter. load_format "dummy" opens no weights. Raises WeightsError as `open_weight_files`.
    """
    digest = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        # With the lengths, so that nothing can pass from one piece to the next unseen.
        digest.update(f"{name!r} {len(content)}\n".encode())
        digest.update(content)

    for name in _TEXT_FILES:
        file = directory / name
        if file.is_file():
            add(name, file.read_bytes())
    if load_format == "dummy":
        add("dummy weights", b"")
    else:
        source = open_weight_files(directory)
        for name, info in sorted(source.infos.items()):
            data = source.read_bytes(name)
            start = max(0, (data.size - _SAMPLE_BYTES) // 2)
            sample = data[start : start + _SAMPLE_BYTES].tobytes()
            add(f"{name} {info.dtype} {info.shape}", sample)
    return digest.hexdigest()[:16]
