"""A short digest that tells whether two directories or GGUF files hold the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from octavo.folder import Folder
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.safetensors import open_weight_files

# What decides how a text becomes tokens, what is computed with them, and where an answer ends.
_TEXT_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def model_digest(folder: Folder, load_format: str = "auto") -> str:
    """16 hexadecimal digits that another model, or another version of it, does not share.

    They cover the files of the configuration, the tokenizer and the chat template byte for byte,
    and the name, type, shape and bytes of every tensor: a gigabyte takes about a second of one
    core, and a run that goes on to load the model finds it in the system's memory. Where the model
    lies, and how the tensors are spread over files, does not matter. load_format "dummy" opens no
    weights. Raises WeightsError as `open_weight_files`.
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
        tensors, read_bytes = _tensors(folder)

        def digest_of(name: str) -> bytes:
            return hashlib.sha256(read_bytes(name).data).digest()

        names = sorted(tensors)
        with ThreadPoolExecutor() as pool:  # hashing runs beside other threads
            for name, content in zip(names, pool.map(digest_of, names), strict=True):
                add(f"{name} {tensors[name]}", content)
    return digest.hexdigest()[:16]


def _tensors(folder: Folder) -> tuple[dict[str, str], Callable[[str], npt.NDArray[np.uint8]]]:
    """The type and shape of every tensor by its name, and what reads one's bytes."""
    if isinstance(folder, GgufFolder):
        parts = folder.parts
        described = {name: f"{each.kind} {each.shape}" for name, each in parts.tensors.items()}
        return described, parts.read_bytes
    source = open_weight_files(Path(str(folder)))
    return {name: f"{i.dtype} {i.shape}" for name, i in source.infos.items()}, source.read_bytes
