"""Which files of a directory hold the weights, and what a tied pair of them means."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from octavo.errors import WeightsError
from octavo.weights.safetensors import (
    INDEX,
    SINGLE,
    SafetensorsFile,
    ShardedSafetensors,
    numbered_shards,
)
from octavo.weights.tensor import Tensor

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK = 1 << 26  # bytes compared in one go


def open_weight_files(path: Path) -> SafetensorsFile | ShardedSafetensors:
    """The safetensors of a directory; WeightsError says what to do where there are none.

    Where there are several kinds: model.safetensors, else the shards of the index (in that order
    as transformers), else NAME-0000K-of-0000N.safetensors if they are all there.
    """
    if (path / SINGLE).is_file():
        return SafetensorsFile(path / SINGLE)
    if (path / INDEX).is_file():
        return ShardedSafetensors(path / INDEX)
    names = sorted(entry.name for entry in path.iterdir())
    shards = numbered_shards(names, str(path))
    if shards:
        return ShardedSafetensors(path / INDEX, shards)
    wanted = f"{path} holds neither {SINGLE} nor {INDEX}"
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise WeightsError(
            f"{wanted}, nor shards named NAME-00001-of-0000N.safetensors. It holds "
            f"{', '.join(others[:8])}: fetch the model in its Hugging Face form, or, where that "
            f"file is the whole model in this form, name it {SINGLE}"
        )
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        raise WeightsError(f"{wanted}. It holds a GGUF file: name that, {path / gguf[0]}")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise WeightsError(
            f"{wanted}. It holds {', '.join(pickles[:3])}: pickle files run code when they are "
            "opened, so octavo never opens them. Where you trust the file, convert it: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) of transformers "
            "writes safetensors"
        )
    raise WeightsError(f"{wanted}. Fetch the model again")


def head_differs(path: Path, head: str, table: str) -> bool:
    """Whether a directory's weights hold a head of their own beside the embedding `table`.

    False where either is missing, they are equal in every bit, or no weights can be read (opening
    them tells why).
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
