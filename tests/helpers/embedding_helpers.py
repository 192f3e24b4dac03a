"""Small embedding models as sentence-transformers saves them, and their vectors by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from quantization_helpers import CONFIG
from text_helpers import byte_level_directory
from weights_helpers import random_weights, write_model

from octavo.models.pooling import Pooling
from octavo.reference import ops
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model
from octavo.weights.pooling import without_head

SWITCHES = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
SWITCHES |= {"first": "pooling_mode_cls_token"}
NEWER = "sentence_transformers.sentence_transformer.modules"
LIMITS: dict[str, Any] = {
    **{"dtype": "f32", "device": "cpu", "num_threads": 1, "max_model_len": 128},
    **{"max_num_seqs": 8, "max_num_batched_tokens": 64},
}


def write_modules(
    folder: Path, kind: str = "last", normalize: bool = True, *, size: int = 96, newer: bool = False
) -> None:
    """modules.json and the files of its modules, in one of two spellings."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    prefix = NEWER if newer else "sentence_transformers.models"
    modules = [
        {
            **{"idx": index, "name": str(index), "path": f"{index}_{name}" if index else ""},
            "type": f"{prefix}.{name.lower()}.{name}" if newer else f"{prefix}.{name}",
        }
        for index, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    config: dict[str, Any] = {"word_embedding_dimension": size, "include_prompt": True}
    if newer:
        modes = {"last": "lasttoken", "mean": "mean", "first": "cls"}
        config = {"embedding_dimension": size, "pooling_mode": modes[kind]}
    else:
        config |= {name: name == SWITCHES[kind] for name in SWITCHES.values()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def write_embedding_model(
    folder: Path,
    kind: str = "last",
    normalize: bool = True,
    *,
    headless: bool = False,
    tokenizer: bool = False,
    modules: bool = True,
    dtype: str = "F32",
    **changes: Any,
) -> Path:
    """A random Llama or Mistral; headless: as transformers saves the model without its head."""
    config = {**CONFIG, "max_position_embeddings": 128, **changes}
    if tokenizer:
        config["vocab_size"] = 512
        byte_level_directory(folder)
    weights = random_weights({**config, "sliding_window": None}, seed=3)
    if headless:
        name = config["architectures"][0].replace("ForCausalLM", "Model")
        config["architectures"] = [name]
        weights.pop("lm_head.weight")
        weights = {name.removeprefix("model."): each for name, each in weights.items()}
    write_model(folder, config, weights=weights, dtype=dtype)
    if modules:
        write_modules(folder, kind, normalize)
    return folder


WINDOWED = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 21}


def prompts(*lengths: int, vocab_size: int = 67) -> list[list[int]]:
    """Random tokens; the longer ones begin as the shorter ones do."""
    most = np.random.default_rng(9).integers(3, vocab_size, max(lengths)).tolist()
    return [[*most[: length // 2], *most[length // 2 : length][::-1]] for length in lengths]


def vectors_by_hand(folder: Path, texts: list[list[int]], pooling: Pooling) -> list[np.ndarray]:
    """From the reference's states, in float64."""
    files = without_head(read_model(folder))
    weights = {name: each.to_float32() for name, each in open_checkpoint(files).items()}
    reference, norm = ReferenceModel(files.spec, weights), files.spec.final_norm
    found = []
    for tokens in texts:
        taps: dict[str, Any] = {}
        reference.forward(np.array(tokens), taps=taps)
        residual = taps[f"layers.{len(files.spec.layers) - 1}.out"]
        states = ops.norm(residual, weights["final_norm.weight"], None, norm.eps, norm.kind)
        wide = states.astype(np.float64)
        vector = {"last": wide[-1], "first": wide[0], "mean": wide.mean(axis=0)}[pooling.kind]
        found.append(vector / np.linalg.norm(vector) if pooling.normalize else vector)
    return found
