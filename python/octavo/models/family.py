"""What a model family is: its configuration, and where each of its weights lies in a checkpoint.

A family is a table of names and a reader of configurations. Numbers and names only: reading the
tensors is the work of `octavo/weights/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from octavo.models.layer import Weight, model_nodes, split_tap
from octavo.models.spec import ModelSpec

# How a tensor is changed while it is read. "plus_one": 1 is added, in float32 (norms that store
# their difference from 1). "transpose": a matrix is stored as (inputs, outputs). "unpermute": rows
# 2i and 2i + 1 of each head become rows i and i + head_dim/2, see models/llama_gguf.py.
Transform = Literal["plain", "plus_one", "transpose", "unpermute"]


@dataclass(frozen=True)
class WeightSource:
    """Where a weight of the model lies in a checkpoint.

    tensor: its name in the checkpoint. shape: of the weight. rows: of a fused tensor (first, of how
    many), counted after a transposition; None: the whole tensor. head_dim: for "unpermute".
    """

    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transform: Transform = "plain"
    head_dim: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        shape = self.shape if self.rows is None else (self.rows[1], *self.shape[1:])
        return shape[::-1] if self.transform == "transpose" else shape

    @property
    def module(self) -> str:
        """The name without ".weight" or ".bias"."""
        return self.tensor.rpartition(".")[0]


def group_by_tensor(weight_map: Mapping[str, WeightSource]) -> dict[str, list[str]]:
    """The checkpoint's name of every tensor -> octavo's weights in it, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for name, source in weight_map.items():
        found.setdefault(source.tensor, []).append(name)
    for names in found.values():
        names.sort(key=lambda name: weight_map[name].rows or (0, 0))
    return found


@dataclass(frozen=True)
class TensorNames:
    """The names of tensors in a family's checkpoints, without ".weight" and ".bias".

    modules: their name -> octavo's part ("q"), or several ("q k v"), whose rows lie one after the
    other in one tensor. "{layer}" stands for the number of the layer, "{expert}" for that of an
    expert, in octavo's parts too: "experts.{expert}.gate"; where the tensor's name lacks it, the
    rows of all experts lie one after the other in it. transforms: by octavo's part.
    """

    modules: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)

    def weight_map(self, spec: ModelSpec) -> dict[str, WeightSource]:
        """octavo's name of every weight that the spec needs -> where it lies, in order."""
        weights = {each.name: each for node in model_nodes(spec) for each in node.weights()}
        places = {
            part: (module, parts.split())
            for module, parts in self.modules.items()
            for part in parts.split()
        }

        def source(weight: Weight) -> WeightSource:
            owner, _, ending = weight.name.rpartition(".")
            layer, own = split_tap(owner)
            expert = own.split(".")[1] if own.startswith("experts.") else None
            part = own.replace(f".{expert}.", ".{expert}.")
            module, parts = places[part]
            name = f"{module}.{ending}".format(layer=layer, expert=expert)
            before = owner.removesuffix(own)
            sizes = [
                weights[f"{before}{each.format(expert=expert)}.{ending}"].shape[0] for each in parts
            ]
            place = parts.index(part)
            rows = (sum(sizes[:place]), sum(sizes)) if len(parts) > 1 else None
            moe = spec.layers[layer or 0].moe
            if expert is not None and moe is not None and "{expert}" not in module:
                rows = (int(expert) * sizes[0], moe.num_experts * sizes[0])
            transform = self.transforms.get(part, "plain")
            if ending == "bias" and transform != "unpermute":
                transform = "plain"
            return WeightSource(
                name,
                weight.shape,
                rows,
                transform,
                spec.layers[layer or 0].head_dim if transform == "unpermute" else 0,
            )

        return {name: source(weight) for name, weight in weights.items()}

    def tensor(self, part: str) -> str:
        """The weight of a part outside the layers: tensor("embed")."""
        return next(module for module, parts in self.modules.items() if parts == part) + ".weight"


# The names of tensors that Llama's checkpoints introduced and most families kept.
LLAMA_TENSORS = {
    "model.embed_tokens": "embed",
    "model.layers.{layer}.input_layernorm": "attn_norm",
    "model.layers.{layer}.self_attn.q_proj": "q",
    "model.layers.{layer}.self_attn.k_proj": "k",
    "model.layers.{layer}.self_attn.v_proj": "v",
    "model.layers.{layer}.self_attn.o_proj": "o",
    "model.layers.{layer}.post_attention_layernorm": "mlp_norm",
    "model.layers.{layer}.mlp.gate_proj": "gate",
    "model.layers.{layer}.mlp.up_proj": "up",
    "model.layers.{layer}.mlp.down_proj": "down",
    "model.norm": "final_norm",
    "lm_head": "lm_head",
}

# Of families that normalize queries and keys.
HEAD_NORMS = {
    "model.layers.{layer}.self_attn.q_norm": "q_norm",
    "model.layers.{layer}.self_attn.k_norm": "k_norm",
}


def expert_tensors(block: str, gate: str, up: str, down: str) -> dict[str, str]:
    """The names of a layer's experts and their router. block: the module in the layer.

    gate, up, down: the names of an expert's matrices.
    """
    module = f"model.layers.{{layer}}.{block}"
    parts = {gate: "gate", up: "up", down: "down"}
    names = {
        f"{module}.experts.{{expert}}.{theirs}": f"experts.{{expert}}.{ours}"
        for theirs, ours in parts.items()
    }
    return {f"{module}.gate": "router", **names}


# Old checkpoints carry the rope frequencies as buffers; they follow from the configuration.
LLAMA_IGNORED = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    source: the file, for messages. shapes: of all tensors, outermost axis first. constants: the
    values of the family's `constants` that the file has.
    """

    source: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp's converter writes a family, and its form as a Hugging Face config."""

    architecture: str  # in the metadata, general.architecture
    read_config: Callable[[GgufHeader], dict[str, Any]]  # without token ids and architecture
    tensors: TensorNames
    constants: tuple[str, ...] = ()  # tensors that belong to the configuration
    has_experts: bool = False  # of two families of one architecture, the one with experts


@dataclass(frozen=True)
class Family:
    """How to read one architecture of Hugging Face; names that are left out are Llama's."""

    architecture: str  # in the field `architectures` of config.json
    model_type: str  # in its field `model_type`
    read_spec: Callable[[Mapping[str, Any]], ModelSpec]
    tensors: TensorNames = TensorNames(LLAMA_TENSORS)
    ignored: tuple[str, ...] = LLAMA_IGNORED  # patterns of other names that a checkpoint may hold
    default_eos_token_id: int | None = None  # where config.json has no such field
    gguf: GgufFamily | None = None
    aliases: tuple[str, ...] = ()  # names of the architecture without its head
    # What checkpoints of the model without its head leave out of the names.
    base_prefix: str = "model."
