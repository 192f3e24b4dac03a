"""A directory with random weights in a model's shape, which octavo, vLLM and transformers all read.

    python benchmarks/write_model.py benchmarks/shapes/gemma-3-1b FOLDER/gemma-3-1b

The matrices are those of `--load-format dummy`. Weights of norms and biases vary, so that a system
that leaves one out computes something else. write_gguf.py writes the same model for llama.cpp. A
folder that is there already stays as it is.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import numpy as np
from common import make_parser
from write_gguf import stored_tensors

from octavo.config import read_environment
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model
from octavo.weights.safetensors import SINGLE, make_header
from octavo.weights.tensor import float32_to_bf16


def write_model(shape: Path, target: Path) -> None:
    """The folder in bf16, made whole or not at all. shape: a folder with a config.json."""
    files = read_model(shape)
    sources = files.family.tensors.weight_map(files.spec)
    shapes = {source.tensor: source.stored_shape for source in sources.values()}
    header, _ = make_header({name: ("BF16", shape) for name, shape in shapes.items()})
    unfinished = target.with_name(target.name + ".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    shutil.copy(files.path / "config.json", unfinished)
    with (unfinished / SINGLE).open("wb") as file:
        file.write(header)
        for name, values in stored_tensors(open_checkpoint(files, "dummy"), sources):
            if values.ndim == 1:
                generator = np.random.default_rng(zlib.crc32(name.encode()))
                values = values + generator.uniform(-0.1, 0.1, values.shape).astype(np.float32)
            file.write(float32_to_bf16(values).data)
    unfinished.rename(target)


def main() -> None:
    """Write one folder."""
    parser = make_parser(__doc__)
    parser.add_argument("shape", help="a folder of shapes/, or a model as octavo takes it")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if not arguments.output.is_dir():
        write_model(resolve_model(arguments.shape, read_environment()), arguments.output)


if __name__ == "__main__":
    main()
