"""LoRA adapters that PEFT makes on small models, and octavo's reading of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from octavo.models.adapter import Adapter
from octavo.reference.llama import ReferenceModel
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

SETTINGS = {"r": 5, "lora_alpha": 12, "task_type": "CAUSAL_LM", "init_lora_weights": False}


def adapted_by_peft(model: Any, directory: Path, **options: Any) -> PeftModel:
    """Writes the model and a random adapter to `directory`; returns PEFT's own of both.

    options: of LoraConfig, beside SETTINGS.
    """
    model.save_pretrained(directory / "model")
    torch.manual_seed(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tied head: merging it is octavo's matter
        adapted = get_peft_model(model, LoraConfig(**{**SETTINGS, **options})).eval()
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:  # so that A x has the size of x, and B A x a third of it
                    weight.copy_(torch.randn_like(weight) * max(weight.shape[1], 12) ** -0.5)
        adapted.save_pretrained(directory / "adapter")
    return adapted


def trained_numbers(adapted: PeftModel) -> int:
    """How many numbers PEFT trains."""
    return sum(w.numel() for name, w in adapted.named_parameters() if "lora_" in name)


def read_definition(directory: Path, name: str = "model") -> ReferenceModel:
    """The definition of the model in a folder of `directory`."""
    files = read_model(directory / name)
    weights = {name: tensor.to_float32() for name, tensor in open_checkpoint(files).items()}
    return ReferenceModel(files.spec, weights)


def read_adapted(directory: Path) -> tuple[Adapter, ReferenceModel, ReferenceModel]:
    """The adapter, and the definition with it and without."""
    files = read_model(directory / "model")
    checkpoint = open_checkpoint(files)
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    adapter = read_adapter(directory / "adapter", files, checkpoint)
    with_it = ReferenceModel(files.spec, weights, adapter=adapter)
    return adapter, with_it, ReferenceModel(files.spec, weights)
