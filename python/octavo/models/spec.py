"""A model in numbers: the contract between the Hugging Face configuration and the core.

A family file (`models/llama.py`) translates a Hugging Face `config.json` into a `ModelSpec`; the
NumPy reference and the native core both run from it. It holds numbers only, no arithmetic.

Weight names are octavo's own and the same for every family. Matrices are (outputs, inputs), as in
PyTorch's `nn.Linear`; `models/layer.py` lists them, and what a layer does with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScaling = Literal["default", "linear", "llama3"]


UNIFORM_LEVELS = tuple(range(-8, 8))


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix (outputs, inputs) is stored: plain numbers, or codes with scales.

    int8: codes -127 to 127, one scale an output: weight = code * scale.
    int4: codes 0 to 15, which stand for `levels`; one scale, and with has_zeros one zero point in
    units of a level, for each group of `group_size` inputs: weight = (level - zero) * scale.

    The activations of a quantized matrix are rounded to whole numbers of `activation_bits` with a
    scale a row; `octavo.reference.quantization` defines the product.
    """

    dtype: Literal["f32", "bf16", "int8", "int4"]
    group_size: int = 0  # int4: a multiple of 32
    has_zeros: bool = False
    levels: tuple[int, ...] = UNIFORM_LEVELS  # 16 whole numbers from -127 to 127
    scale_dtype: Literal["bf16", "f32"] = "bf16"  # int4: how scales are stored
    activation_bits: Literal[8, 16] = 16  # 8: with int8 only

    def num_groups(self, inputs: int) -> int:
        """Scales a row of `inputs` weights has."""
        return -(-inputs // self.group_size) if self.dtype == "int4" else 1


@dataclass(frozen=True)
class NormSpec:
    """A normalization over the last axis. kind "rms": Zhang & Sennrich 2019; "layer": Ba 2016."""

    kind: NormKind = "rms"
    eps: float = 1e-5
    bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), rotating element i with i + head_dim/2.

    scaling "linear" divides every frequency by `factor`; "llama3" does so for low frequencies
    only, with a smooth transition (Llama 3.1's rule).
    """

    theta: float = 10000.0
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: norm, attention, residual add, norm, MLP, residual add."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: NormSpec
    rope: RopeSpec | None  # None: positions are added in the embedding instead
    activation: Activation = "silu"
    gated: bool = True  # True: down(act(gate(x)) * up(x)); False: down(act(up(x)))
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int = 0  # a token sees at most this many positions, itself included; 0: all
    kv_group: int = 0  # which of a sequence's block tables holds this layer's keys and values
    attention_scale: float | None = None  # factor of q.k; None: 1 / sqrt(head_dim)

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (values have the same)."""
        return self.num_kv_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """The factor of q.k: `attention_scale`, or 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder-only model."""

    architecture: str  # the Hugging Face name, for messages
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_word_embeddings: bool
    learned_positions: bool = False  # True: a table `positions.weight` is added in embed

    @property
    def kv_windows(self) -> tuple[int, ...]:
        """Of each KV group (a block table of each sequence): its layers' widest window; 0: all."""
        groups: dict[int, list[int]] = {}
        for layer in self.layers:
            groups.setdefault(layer.kv_group, []).append(layer.window)
        return tuple(0 if 0 in windows else max(windows) for _, windows in sorted(groups.items()))

    def kv_elements(self, num_tokens: int) -> int:
        """Numbers (not bytes) that the KV cache holds for so many tokens, over all layers."""
        return sum(
            2 * layer.kv_size * min(layer.window or num_tokens, num_tokens) for layer in self.layers
        )
