"""Writing a GGUF file as an ordinary Hugging Face directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError, WeightsError
from octavo.models import llama
from octavo.models.registry import ModelFiles
from octavo.weights.checkpoint import check_weights
from octavo.weights.gguf import GgufFile
from octavo.weights.gguf_llama import GgufLlamaSource, end_of_text_ids, read_config
from octavo.weights.gguf_tokenizer import convert_tokenizer
from octavo.weights.progress import NO_PROGRESS, Progress
from octavo.weights.tensor import ITEM_SIZE, Tensor, TensorDType, float32_to_bf16

OutputDType = Literal["auto", "f32", "bf16"]
_NAMES: dict[TensorDType, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def convert_gguf(
    path: Path, directory: Path, dtype: OutputDType = "auto", progress: Progress = NO_PROGRESS
) -> None:
    """Write config.json, model.safetensors, tokenizer and generation config into `directory`.

    dtype: "f32" or "bf16" for every weight. "auto" keeps F32, F16 and BF16 as they are and rounds
    decoded block formats to bf16 (to nearest, so each weight by at most one part in 512; "f32"
    keeps the decoded values exactly).

    Raises WeightsError, UnsupportedModelError or TokenizerError before anything is written.
    """
    if dtype not in ("auto", "f32", "bf16"):
        raise InvalidArgumentError(f"dtype is {dtype!r}; expected one of auto, f32, bf16")
    file = GgufFile(path)
    config = read_config(file)
    source = GgufLlamaSource(file, config)
    spec = llama.read_spec(config)
    files = ModelFiles(
        path=path,
        config=config,
        spec=spec,
        weight_map=llama.weight_map(spec),
        eos_token_ids=(),
        generation_config={},
    )
    check_weights(source, files)
    texts = convert_tokenizer(file.metadata, spec.vocab_size, spec.max_position_embeddings)
    dtypes = {name: _output_dtype(source, name, dtype) for name in source.infos}
    counts = {kind: 0 for kind in _TORCH_NAMES}
    for name, kind in dtypes.items():
        counts[kind] += source.infos[name].num_elements
    config["torch_dtype"] = _TORCH_NAMES[max(counts, key=lambda kind: counts[kind])]
    texts["config.json"] = _json(config)
    texts["generation_config.json"] = _json(_generation_config(config, file, spec.vocab_size))
    for name, text in texts.items():
        write_file(directory / name, text.encode("utf-8"))
    _write_safetensors(directory / "model.safetensors", source, dtypes, progress)


def write_file(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _generation_config(
    config: Mapping[str, Any], file: GgufFile, vocab_size: int
) -> dict[str, Any]:
    ends = end_of_text_ids(file, vocab_size)
    values = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config["pad_token_id"],
    }
    return {name: value for name, value in values.items() if value is not None}


def _output_dtype(source: GgufLlamaSource, name: str, dtype: OutputDType) -> TensorDType:
    if dtype != "auto":
        return dtype
    kept: dict[str, TensorDType] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
    return kept.get(source.kind(name), "bf16")


def _write_safetensors(
    path: Path, source: GgufLlamaSource, dtypes: Mapping[str, TensorDType], progress: Progress
) -> None:
    """Tensor by tensor and in runs of rows, so memory stays small however big the model is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(dtypes):
        info = source.infos[name]
        end = offset + info.num_elements * ITEM_SIZE[dtypes[name]]
        header[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data then begins at a multiple of 8
    progress.start("Converting", offset)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for content in _contents(source, sorted(dtypes), dtypes):
            file.write(content.data)
            progress.advance(content.nbytes)
        file.flush()
        os.fsync(file.fileno())
    progress.finish()


def _contents(
    source: GgufLlamaSource, names: Iterable[str], dtypes: Mapping[str, TensorDType]
) -> Iterator[npt.NDArray[Any]]:
    for name in names:
        for part in source.read_parts(name):
            yield np.ascontiguousarray(_cast(part, dtypes[name], name))


def _cast(tensor: Tensor, dtype: TensorDType, name: str) -> npt.NDArray[Any]:
    if tensor.dtype == dtype:
        return tensor.data
    values = tensor.to_float32()
    if dtype == "f32":
        return values
    if dtype == "bf16":
        return float32_to_bf16(values)
    raise WeightsError(f"{name}: {tensor.dtype} is not converted to {dtype}")
