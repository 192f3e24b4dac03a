"""Small LoRA adapters in PEFT's form, made on the spot with chosen defects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from weights_helpers import encode, write_safetensors

from octavo.models import llama
from octavo.models.adapter import Adapter, LowRank
from octavo.models.layer import linear_nodes
from octavo.models.spec import ModelSpec

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    return {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 3, "lora_alpha": 6},
        **{
            "target_modules": list(ALL),
            "use_dora": False,
            "use_rslora": False,
            "lora_dropout": 0.1,
        },
        **{
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": None,
            "inference_mode": True,
        },
        **changes,
    }


def module_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every matrix of a Llama model -> (outputs, inputs); head last."""
    spec = llama.read_spec(config)
    weights = llama.FAMILY.tensors.weight_map(spec).values()
    shapes = {each.module: each.shape for each in weights if len(each.shape) == 2}
    return {**shapes, "lm_head": (spec.vocab_size, spec.hidden_size)}


def random_adapter(
    config: Mapping[str, Any],
    names: Sequence[str] = ALL,
    rank: int = 3,
    ranks: Mapping[str, int] | None = None,
    seed: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, np.ndarray]:
    """Tensors by PEFT's names for every matrix of the model whose name ends in one of `names`.

    ranks: of modules by their whole name, where they differ. shapes: of the model's modules, if it
    is no Llama.
    """
    generator = np.random.default_rng(seed)
    tensors = {}
    for module, (outputs, inputs) in (shapes or module_shapes(config)).items():
        if module.rpartition(".")[2] not in names:
            continue
        size = (ranks or {}).get(module, rank)
        a, b, prefix = ".lora_A.weight", ".lora_B.weight", f"base_model.model.{module}"
        if "embed" in module:
            a, b, inputs, outputs = ".lora_embedding_A", ".lora_embedding_B", outputs, inputs
        for name, shape in ((a, (size, inputs)), (b, (outputs, size))):
            tensors[prefix + name] = generator.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
    return tensors


def write_adapter(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    dtype: str = "F32",
) -> Path:
    """The directory that PEFT's save_pretrained writes."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(adapter_config() if config is None else config)
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    encoded = {name: (dtype, encode(values, dtype)) for name, values in tensors.items()}
    write_safetensors(directory / "adapter_model.safetensors", encoded, metadata={"format": "pt"})
    return directory


def random_low_ranks(
    spec: ModelSpec, names: Sequence[str], rank: int, seed: int, scale: float = 0.5
) -> Adapter:
    """An adapter of these matrices ("layers.0.q", or "*.q" for all of them, "embed", "lm_head")."""
    generator = np.random.default_rng(seed)
    shapes = {name: node.matrix.shape for name, node in linear_nodes(spec).items()}
    shapes["embed"] = (spec.hidden_size, spec.vocab_size)  # of what is added to a row
    shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    matrices = {}
    for name, (outputs, inputs) in shapes.items():
        if not any(fnmatch(name, pattern) for pattern in names):
            continue
        a = generator.normal(0, 1 if name == "embed" else inputs**-0.5, (rank, inputs))
        b = generator.normal(0, rank**-0.5, (outputs, rank))
        matrices[name] = LowRank(a.astype(np.float32), b.astype(np.float32), scale)
    return Adapter(f"random {seed}", matrices)
