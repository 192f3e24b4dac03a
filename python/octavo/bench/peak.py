"""The machine's limits, measured, in the arithmetic that a model's format is computed with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from octavo.bench.cases import Peak
from octavo.config import RuntimeOptions
from octavo.models.spec import WeightFormat

Arithmetic = Literal["f32", "bf16", "int16", "int8"]
"""What a matrix product multiplies: float32 numbers; pairs of bf16; the 16-bit or 8-bit whole
numbers of activations with the 8-bit ones of weights (two sums, or one, where only bytes multiply).
"""

WORDS = {
    "f32": "float32 multiply-adds",
    "bf16": "bf16 dot products",
    "int16": "whole-number products, activations of 16 bits",
    "int8": "whole-number products, activations of 8 bits",
}

# How many operations an instruction of each set does, in those of a float32 multiply-add of the
# same registers, both started once a cycle and unit: VDPBF16PS two, VPDPBUSD four (and two passes
# for 16 bits), PMADDWD two. Missing: as float32. What an instruction set adds is in its name.
_TIMES_FLOAT32: dict[str, dict[Arithmetic, int]] = {
    "avx2": {"int16": 2, "int8": 2},
    "avx2_vnni": {"int16": 2, "int8": 4},
    "avx512": {"int16": 2, "int8": 2},
    "avx512_vnni": {"int16": 2, "int8": 4},
    "avx512_bf16": {"bf16": 2, "int16": 2, "int8": 4},
    "amx": {"bf16": 16, "int16": 16, "int8": 32},
}


def arithmetic_of(
    format: WeightFormat | None, dtype: str, grouped_activations: str = "whole"
) -> Arithmetic:
    """What a matrix kept in `format` is multiplied with; None: in dtype, "f32" or "bf16".

    grouped_activations: "whole" or "bf16", as `_native.grouped_activations` tells of an
    instruction set.
    """
    kind = dtype if format is None else format.dtype
    if format is not None and format.is_grouped and grouped_activations == "bf16":
        return "bf16"
    if kind in ("int8", "int4"):
        return "int8" if format is not None and format.activation_bits == 8 else "int16"
    return "bf16" if kind == "bf16" else "f32"


def layers_arithmetic(
    options: RuntimeOptions, grouped_activations: str = "whole"
) -> set[Arithmetic]:
    """The arithmetic of the layers' matrices; embedding and head are apart."""
    layers = [format for name, format in options.formats.items() if name.startswith("layers.")]
    found = {arithmetic_of(format, options.dtype, grouped_activations) for format in layers}
    return found or {arithmetic_of(None, options.dtype)}


def operations_per_second(float32: float, isa: str, arithmetic: Collection[Arithmetic]) -> float:
    """The peak of the fastest of `arithmetic` in an instruction set.

    float32: operations a second of its float32 multiply-adds, measured. A format that mixes
    several cannot be faster than its fastest one.
    """
    factors = _TIMES_FLOAT32.get(isa, {})
    return float32 * max(factors.get(kind, 1) for kind in arithmetic)


def measure(options: RuntimeOptions, num_threads: int, seconds: float | None = None) -> Peak:
    """Both limits, by octavo's own threads; seconds: for each of them (None: the native default).

    Memory is measured, and so are float32 multiply-adds in the instruction set in use; other
    arithmetic is counted from those.
    """
    from octavo import _native

    isa = str(_native.build_info()["isa"]) if options.isa == "auto" else options.isa
    # Multiply-adds are those of the set that an extension extends.
    base = "avx512" if isa == "amx" else isa.split("_")[0]
    arithmetic = layers_arithmetic(options, _native.grouped_activations(isa))
    given = () if seconds is None else (seconds,)
    bandwidth = _native.measure_bandwidth(num_threads, *given)
    float32 = _native.measure_flops(num_threads, base, *given)
    flops = operations_per_second(float32, isa, arithmetic)
    words = " and ".join(WORDS[kind] for kind in sorted(arithmetic))
    return Peak(bandwidth, flops, words, float32)


def measure_cuda() -> Peak:
    """Both limits of the GPU: its memory, and bf16 products by the instruction octavo uses."""
    from octavo import _native

    flops = _native.measure_flops(device="cuda")
    return Peak(_native.measure_bandwidth(device="cuda"), flops, "bf16 products (mma.sync)")
