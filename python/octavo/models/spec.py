"""A model in numbers: the contract between the Hugging Face configuration and the core.

A family file (`models/llama.py`) translates a Hugging Face `config.json` into a `ModelSpec`; the
NumPy reference and the native core both run from it. It holds numbers only, no arithmetic.

Weight names are octavo's own and the same for every family. Matrices are (outputs, inputs), as in
PyTorch's `nn.Linear`; `models/layer.py` lists them, and what a layer does with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from octavo.errors import UnsupportedModelError

NormKind = Literal["rms", "layer", "none"]
QkNorm = Literal["none", "head", "row"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


UNIFORM_LEVELS = tuple(range(-8, 8))


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix (outputs, inputs) is stored: plain numbers, or codes with scales.

    int8: codes -128 to 127; one scale an output, or one for each group of `group_size` inputs:
    weight = code * scale.
    int4: codes 0 to 15, which stand for `levels`; one scale, and with has_zeros one zero point in
    units of a level, for each group: weight = (level - zero) * scale.

    The activations of a quantized matrix are rounded to whole numbers of `activation_bits` with a
    scale a row; `octavo.reference.quantization` defines the product.
    """

    dtype: Literal["f32", "bf16", "int8", "int4"]
    group_size: int = 0  # a multiple of 32; 0: one scale an output (int8)
    has_zeros: bool = False
    levels: tuple[int, ...] = UNIFORM_LEVELS  # 16 whole numbers from -127 to 127
    scale_dtype: Literal["bf16", "f16", "f32"] = "bf16"  # how the scales of groups are stored
    activation_bits: Literal[8, 16] = 16  # 8: with int8 of one scale an output only

    def num_groups(self, inputs: int) -> int:
        """Scales a row of `inputs` weights has."""
        return -(-inputs // self.group_size) if self.is_grouped else 1

    @property
    def is_grouped(self) -> bool:
        """Whether a scale is that of a group of inputs, and not of a whole output."""
        return self.group_size > 0


@dataclass(frozen=True)
class NormSpec:
    """A normalization over the last axis. kind "rms": Zhang & Sennrich 2019; "layer": Ba 2016.

    kind "none": what goes in comes out, and there is no weight (OLMo 2 has it before a sublayer).
    """

    kind: NormKind = "rms"
    eps: float = 1e-5
    bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding, in numbers; `models/rope.py` has the formulas.

    The first 2 * len(frequencies) elements of a head rotate, element i together with element
    i + len(frequencies); the rest stays as it is (partial rotary).
    """

    frequencies: tuple[float, ...] = field(repr=False)  # float32 values, radians a position
    attention_factor: float = 1.0  # multiplies cosines and sines
    # For messages: the kind of scaling, by how much the context is stretched, the base.
    kind: str = "default"
    factor: float = 1.0
    theta: float = 10000.0
    # LongRoPE and dynamic: a sequence of more than original_length tokens turns by
    # long_frequencies, from its first position on; see `rope.for_length` and `rope.at_length`.
    long_frequencies: tuple[float, ...] = field(default=(), repr=False)
    original_length: int = 0


@dataclass(frozen=True)
class MoeSpec:
    """A sparse mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv 1701.06538).

    Each token goes through the `experts_per_token` experts whose router logits are the largest.
    Their outputs are added with the softmax of the logits as weights: over all experts, or with
    `normalize` over the chosen ones, so that the weights' sum is 1.
    """

    num_experts: int
    experts_per_token: int
    normalize: bool = True


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: norm, attention, residual add, norm, MLP, residual add.

    norm: before each of the two sublayers. output_norm: of each sublayer's output, before it is
    added to the residual stream (Gemma 2, OLMo 2). qk_norm: queries and keys are normalized before
    rope, "head" each head by itself, with one weight of head_dim (Qwen3; Dehghani et al. 2023,
    arXiv 2302.05442), "row" all heads of a token together (OLMo 2); see `qk_norm_spec`.
    """

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
    attention_softcap: float = 0.0  # a score s becomes cap * tanh(s / cap); 0: stays (Gemma 2)
    output_norm: NormSpec | None = None
    qk_norm: QkNorm = "none"
    residual_multiplier: float = 1.0  # of a sublayer's output when it is added (Granite)
    # Experts of width intermediate_size, gated and without biases; None: one MLP for all tokens.
    moe: MoeSpec | None = None

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

    @property
    def qk_norm_spec(self) -> NormSpec:
        """The norm of queries and keys where `qk_norm` is not "none": rms, with the layer's eps."""
        return NormSpec("rms", self.norm.eps)


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder-only model.

    The rows of the embedding are multiplied by `embed_multiplier`. With x = `logits_multiplier` *
    head(final norm), the logits are x, or cap * tanh(x / cap) where `logits_softcap` is not 0.
    """

    architecture: str  # the Hugging Face name, for messages
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_word_embeddings: bool
    learned_positions: bool = False  # True: a table `positions.weight` is added in embed
    embed_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float = 0.0
    # Of a rank's part of a model (models/shards.py): which of how many parts of the head it has.
    head_part: int = 0
    head_parts: int = 1

    @property
    def rope_switch(self) -> int:
        """Sequences of more tokens turn by their ropes' `long_frequencies`; 0: none has any."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None]
        lengths = {rope.original_length for rope in ropes if rope.long_frequencies}
        if len(lengths) > 1:
            raise UnsupportedModelError(
                f"ropes change their frequencies beyond {sorted(lengths)} tokens; expected one "
                f"original_max_position_embeddings for all layers"
            )
        return max(lengths, default=0)

    @property
    def longest_sequence(self) -> int:
        """The most tokens of a sequence: with dynamic rope more than the model's own positions."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None]
        factors = [rope.factor for rope in ropes if rope.kind == "dynamic"]
        return int(self.max_position_embeddings * max([1.0, *factors]))

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
