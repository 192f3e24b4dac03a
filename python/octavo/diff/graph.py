"""Which tap is computed from which: the data flow of a `ModelSpec`, in the names of the taps."""

from __future__ import annotations

from octavo.models.spec import ModelSpec, tap_names

# Parts of a layer in the order of execution, for tables and heat maps.
LAYER_PARTS = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn", "attn_out",
    "mlp_norm", "gate", "up", "act", "mlp_out", "out",
)  # fmt: skip


def split_tap(name: str) -> tuple[int | None, str]:
    """("layers.3.q") -> (3, "q"); ("embed") -> (None, "embed")."""
    if not name.startswith("layers."):
        return None, name
    _, index, part = name.split(".")
    return int(index), part


def residual_before(layer: int) -> str:
    """The tap that holds the residual stream entering a layer."""
    return f"layers.{layer - 1}.out" if layer else "embed"


def tap_inputs(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """For every tap, in execution order, the taps that its op reads (weights left aside)."""
    inputs: dict[str, tuple[str, ...]] = {}
    for name in tap_names(spec):
        layer, part = split_tap(name)
        inputs[name] = (
            _global_inputs(spec, part) if layer is None else _layer_inputs(spec, layer, part)
        )
    return inputs


def _global_inputs(spec: ModelSpec, part: str) -> tuple[str, ...]:
    if part == "final_norm":
        return (residual_before(len(spec.layers)),)
    return ("final_norm",) if part == "logits" else ()


def _layer_inputs(spec: ModelSpec, index: int, part: str) -> tuple[str, ...]:
    prefix = f"layers.{index}."
    rotated = "_rope" if spec.layers[index].rope is not None else ""
    own = {
        "q": ("attn_norm",),
        "k": ("attn_norm",),
        "v": ("attn_norm",),
        "q_rope": ("q",),
        "k_rope": ("k",),
        "attn": (f"q{rotated}", f"k{rotated}", "v"),
        "attn_out": ("attn",),
        "mlp_norm": ("attn_out",),
        "gate": ("mlp_norm",),
        "up": ("mlp_norm",),
        "act": ("gate", "up") if spec.layers[index].gated else ("up",),
        "mlp_out": ("act",),
        "out": ("attn_out", "mlp_out"),
    }
    names = tuple(prefix + name for name in own.get(part, ()))
    reads_residual = part in ("attn_norm", "mlp_norm", "out")
    return (residual_before(index), *names) if reads_residual else names
