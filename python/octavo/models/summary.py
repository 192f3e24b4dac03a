"""What is special about a model, in words, for `octavo info`: all that a plain Llama has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from octavo.models.spec import LayerSpec, ModelSpec


def specials(spec: ModelSpec) -> list[str]:
    """A phrase for each thing in which the model differs from Llama; empty for a Llama."""
    return [*_layers(spec), *_model(spec)]


def _layers(spec: ModelSpec) -> Iterator[str]:
    for window, where in _each(spec, lambda layer: layer.window):
        yield f"a window of {window:,} tokens {where}"
    if not spec.learned_positions:
        for _, where in _each(spec, lambda layer: layer.rope is None):
            yield f"no rope {where}"
    thetas = {layer.rope.theta for layer in spec.layers if layer.rope is not None}
    if len(thetas) > 1:
        yield f"ropes of theta {' and '.join(f'{theta:g}' for theta in sorted(thetas))}"
    for _, where in _each(spec, lambda layer: layer.norm.kind == "layer"):
        yield f"LayerNorm {where}"
    for _, where in _each(spec, lambda layer: layer.norm.kind == "none"):
        yield f"no norm before the sublayers {where}"
    for _, where in _each(spec, lambda layer: layer.output_norm is not None):
        yield f"norms after the sublayers {where}"
    kinds = {"none": "", "head": "each head by itself", "row": "all heads together"}
    for kind, where in _each(spec, lambda layer: kinds[layer.qk_norm]):
        yield f"queries and keys normalized ({kind}) {where}"
    for scale, where in _each(spec, lambda layer: layer.attention_scale or 0):
        yield f"scores multiplied by {scale:.4g} {where}"
    for cap, where in _each(spec, lambda layer: layer.attention_softcap):
        yield f"scores capped at {cap:g} {where}"
    for experts, where in _each(spec, _experts):
        yield f"{experts} {where}"
    for _, where in _each(spec, lambda layer: not layer.gated):
        yield f"no gate in the MLP {where}"
    factors = {layer.residual_multiplier for layer in spec.layers} - {1.0}
    for factor in sorted(factors):
        yield f"sublayers' outputs multiplied by {factor:g}"


def _model(spec: ModelSpec) -> Iterator[str]:
    if spec.learned_positions:
        yield "learned positions"
    if spec.embed_multiplier != 1:
        yield f"embedding multiplied by {spec.embed_multiplier:.4g}"
    if spec.logits_multiplier != 1:
        yield f"logits multiplied by {spec.logits_multiplier:.4g}"
    if spec.logits_softcap:
        yield f"logits capped at {spec.logits_softcap:g}"


def _experts(layer: LayerSpec) -> str:
    moe = layer.moe
    return "" if moe is None else f"{moe.num_experts} experts, {moe.experts_per_token} a token,"


def _each(
    spec: ModelSpec, value_of: Callable[[LayerSpec], float | str]
) -> Iterator[tuple[float | str, str]]:
    """Each value that is not 0 (or False, or empty), and in how many layers it is."""
    for value, count in Counter(map(value_of, spec.layers)).items():
        if value:
            total = len(spec.layers)
            yield value, "in every layer" if count == total else f"in {count} of {total} layers"
