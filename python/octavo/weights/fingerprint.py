"""Short digests that tell whether two directories or GGUF files hold the same model or adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from octavo.folder import Folder
from octavo.models.adapter import Adapter
from octavo.text.chat import NAMED_TEMPLATES
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.safetensors import open_weight_files

# The files that determine the tokens of a text, the computation, and the end of an answer.
_TEXT_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def model_digest(folder: Folder, load_format: str = "auto") -> str:
    """16 hexadecimal digits that differ for another model, or another version of it.

    They cover the files of the configuration, the tokenizer and the chat template byte for byte,
    and the name, type, shape and bytes of every tensor. A gigabyte takes about a second of one
    core; the files are then in the system's memory, where loading finds them. The model's place,
    and the distribution of tensors over files, do not matter. load_format "dummy" opens no weights.
    Raises WeightsError as `open_weight_files`.
    """
    digest = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        # With the lengths, so that bytes moved from one piece to the next change the digest.
        digest.update(f"{name!r} {len(content)}\n".encode())
        digest.update(content)

    templates = sorted(file.name for file in (folder / NAMED_TEMPLATES).glob("*.jinja"))
    for name in (*_TEXT_FILES, *(f"{NAMED_TEMPLATES}/{name}" for name in templates)):
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
        with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
            for name, content in zip(names, pool.map(digest_of, names), strict=True):
                add(f"{name} {tensors[name]}", content)
    return digest.hexdigest()[:16]


def adapter_digest(adapter: Adapter) -> str:
    """16 hexadecimal digits that differ for another adapter, wherever its files lie."""
    digest = hashlib.sha256()
    for name, (a, b) in sorted(adapter.native().items()):
        digest.update(f"{name!r} {a.shape} {b.shape}\n".encode())
        digest.update(np.ascontiguousarray(a).data)
        digest.update(np.ascontiguousarray(b).data)
    return digest.hexdigest()[:16]


def _tensors(folder: Folder) -> tuple[dict[str, str], Callable[[str], npt.NDArray[np.uint8]]]:
    """The type and shape of every tensor by its name, and a function that reads its bytes."""
    if isinstance(folder, GgufFolder):
        parts = folder.parts
        described = {name: f"{each.kind} {each.shape}" for name, each in parts.tensors.items()}
        return described, parts.read_bytes
    source = open_weight_files(Path(str(folder)))
    return {name: f"{i.dtype} {i.shape}" for name, i in source.infos.items()}, source.read_bytes
