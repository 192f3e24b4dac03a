"""Which op makes a tap, where each side implements it, and what usually goes wrong there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_HF = "transformers: models/llama/modeling_llama.py"
_ELEMENTWISE = "csrc/cpu/backend.cpp, csrc/cpu/kernels/elementwise.h"
_LINEAR = "csrc/cpu/linear.cpp, csrc/cpu/kernels/linear.h"
_HF_LOADING = f"{_HF} (and its loading of the weights)"
_CUDA = MappingProxyType(
    {
        "embed": "csrc/cuda/elementwise/embed.cu",
        "norm": "csrc/cuda/elementwise/norm.cu",
        "add_norm": "csrc/cuda/elementwise/norm.cu, csrc/core/decoder.cpp",
        "linear": "csrc/cuda/products/linear.cu (which names the kernels), csrc/core/decoder.cpp",
        "rope_and_store": "csrc/cuda/elementwise/rope.cu, csrc/core/weights.cpp (cosines, sines)",
        "attention": "csrc/cuda/attention/attention.cu (which names the kernels)",
        "gated_activation": "csrc/cuda/elementwise/elementwise.cu",
    }
)


@dataclass(frozen=True)
class Op:
    """An op and where to look for it.

    name: as in `reference/ops.py` and `csrc/core/backend.h`. hint: one sentence.
    """

    name: str
    reference: str
    native: str
    hugging_face: str
    hint: str

    def files(self, kind: str) -> str:
        """Where a side of this kind ("reference", "native", "cuda", "hf") implements the op."""
        places = {"reference": self.reference, "native": self.native, "cuda": _CUDA[self.name]}
        return places.get(kind, self.hugging_face)


def _op(name: str, native: str, hint: str, hugging_face: str = _HF) -> Op:
    return Op(name, f"reference/ops.py ({name})", native, hugging_face, hint)


_NORM_HINT = (
    "Usually epsilon (its value, or outside the square root), the mean taken over the wrong "
    "width, or the weight left out."
)
_ADD_NORM_HINT = "Usually the residual dropped or added twice, or epsilon outside the square root."
_NORM = _op("norm", _ELEMENTWISE, _NORM_HINT)
_ADD_NORM = _op("add_norm", f"{_ELEMENTWISE}, csrc/core/decoder.cpp", _ADD_NORM_HINT)
_PROJECTION = _op(
    "linear",
    f"{_LINEAR}, csrc/core/decoder.cpp",
    "Usually the weights: a wrong entry in the weight map, a transposed matrix, GGUF's order of "
    "q and k rows, a bias left out, or q, k and v packed in another order.",
    _HF_LOADING,
)
_ROPE = _op(
    "rope_and_store",
    "csrc/cpu/attention.cpp, csrc/core/weights.cpp (cosines and sines)",
    "Usually the halves (element i turns with i + head_dim/2, first half minus), positions off "
    "by one, or a rope scaling that was not read.",
)

OP_SOURCES: Mapping[str, Op] = MappingProxyType(
    {
        "embed": _op(
            "embed",
            "csrc/cpu/linear.cpp",
            "Usually token ids off by one, a table loaded wrongly, or learned positions left out.",
            _HF_LOADING,
        ),
        "attn_norm": _NORM,
        "q": _PROJECTION,
        "k": _PROJECTION,
        "v": _PROJECTION,
        "q_rope": _ROPE,
        "k_rope": _ROPE,
        "attn": _op(
            "attention",
            "csrc/cpu/attention.cpp, csrc/cpu/kernels/attention.h",
            "Usually the scale, the mapping of query heads to KV heads, the causal mask or window "
            "off by one, or keys and values read from the wrong slot; by a few thousandths alone, "
            "what is rounded over a bf16 cache.",
        ),
        "attn_out": _op(
            "linear",
            f"{_LINEAR}, csrc/core/decoder.cpp",
            "Usually the heads laid out in another order than the o matrix expects, or its bias.",
            _HF_LOADING,
        ),
        "mlp_norm": _ADD_NORM,
        "gate": _op(
            "linear",
            f"{_LINEAR}, csrc/core/decoder.cpp",
            "Usually gate and up loaded or packed the other way round.",
            _HF_LOADING,
        ),
        "up": _op(
            "linear",
            f"{_LINEAR}, csrc/core/decoder.cpp",
            "Usually gate and up loaded or packed the other way round.",
            _HF_LOADING,
        ),
        "act": _op(
            "gated_activation",
            _ELEMENTWISE,
            "Usually gate and up swapped (the activation belongs to gate), or another activation.",
        ),
        "mlp_out": _op(
            "linear",
            f"{_LINEAR}, csrc/core/decoder.cpp",
            "Usually the down matrix (transposed, another layer's), or its bias.",
            _HF_LOADING,
        ),
        "out": _ADD_NORM,
        "final_norm": _NORM,
        "logits": _op(
            "linear",
            f"{_LINEAR}, csrc/core/decoder.cpp",
            "Usually a head that should be tied to the embedding and is not, or the reverse.",
            _HF_LOADING,
        ),
    }
)
