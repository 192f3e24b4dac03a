"""Small models in every quantized format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from weights_helpers import random_weights, tiny_config, write_model

from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory

# Widths 96 (divided by 32 alone) and 160, more than one panel of outputs, rows that fill none.
CONFIG: dict[str, Any] = tiny_config(
    vocab_size=67,
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)

SCHEMES = {
    "int8": Scheme("int8"),
    "int4": Scheme("int4"),
    "int4-rtn": Scheme("int4", method="rtn"),
    "int4-asymmetric": Scheme("int4", symmetric=False),
    "int4-asymmetric-rtn": Scheme("int4", symmetric=False, method="rtn"),
    "int4-128": Scheme("int4", group_size=128),
    "int4-nonuniform": Scheme("int4-nonuniform"),
    "int4-mixed": Scheme("int4", int8=("layers.0.?", "layers.0.down")),
}


def write_float_model(path: Path, dtype: str = "BF16", **changes: Any) -> Path:
    """A random model whose weights are not centred, so that zero points have work to do."""
    config = {**CONFIG, **changes}
    weights = random_weights(config, seed=3)
    for name, values in weights.items():
        if values.ndim == 2:
            shift = np.linspace(-0.03, 0.05, values.shape[1], dtype=np.float32)
            weights[name] = values + shift
    write_model(path, config, weights=weights, dtype=dtype)
    return path


def write_quantized_model(tmp_path: Path, scheme: str, **changes: Any) -> tuple[Path, Path]:
    """(float model, quantized directory)."""
    source = write_float_model(tmp_path / "float", **changes)
    target = tmp_path / scheme
    quantize_directory(source, target, SCHEMES[scheme])
    return source, target
