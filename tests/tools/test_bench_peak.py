"""Which peak a format is held against."""

from __future__ import annotations

import pytest

from octavo import _native
from octavo.bench.peak import (
    arithmetic_of,
    layers_arithmetic,
    measure,
    operations_per_second,
)
from octavo.config import RuntimeOptions
from octavo.models.spec import WeightFormat

INT8, W8A8 = WeightFormat("int8"), WeightFormat("int8", activation_bits=8)
INT4 = WeightFormat("int4", group_size=32)


def options(dtype: str = "bf16", isa: str = "auto", **formats: WeightFormat) -> RuntimeOptions:
    named = {name.replace("_", "."): format for name, format in formats.items()}
    return RuntimeOptions(dtype, dtype, 16, 64, 2, 32, isa=isa, formats=named)  # type: ignore[arg-type]


def test_the_arithmetic_of_a_format() -> None:
    found = [arithmetic_of(format, "bf16") for format in (None, INT8, W8A8, INT4)]
    assert found == ["bf16", "int16", "int8", "int16"]
    assert arithmetic_of(None, "f32") == arithmetic_of(WeightFormat("f32"), "bf16") == "f32"
    rounded = [arithmetic_of(format, "f32", "bf16") for format in (None, INT8, W8A8, INT4)]
    assert rounded == ["f32", "int16", "int8", "bf16"]


def test_the_head_does_not_decide() -> None:
    assert layers_arithmetic(options()) == {"bf16"}
    assert layers_arithmetic(options(embed=INT8)) == {"bf16"}
    assert layers_arithmetic(options(embed=W8A8, layers_0_q=INT4)) == {"int16"}
    mixed = options(layers_0_q=INT4, layers_1_q=W8A8, layers_1_v=WeightFormat("bf16"))
    assert layers_arithmetic(mixed) == {"bf16", "int8", "int16"}
    assert layers_arithmetic(mixed, "bf16") == {"bf16", "int8"}


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        ("scalar", (1, 1, 1, 1)),
        ("avx2", (1, 1, 2, 2)),
        ("avx2_vnni", (1, 1, 2, 4)),
        ("avx512_vnni", (1, 1, 2, 4)),
        ("avx512_bf16", (1, 2, 2, 4)),
        ("amx", (1, 16, 16, 32)),
    ],
)
def test_the_peak_in_float32_multiply_adds(isa: str, expected: tuple[int, ...]) -> None:
    """VPDPBUSD's peak is four times theirs; two passes leave half of it."""
    kinds = ("f32", "bf16", "int16", "int8")
    found = [operations_per_second(10.0, isa, {kind}) for kind in kinds]  # type: ignore[arg-type]
    assert found == [10.0 * factor for factor in expected]
    assert operations_per_second(10.0, isa, set(kinds)) == 10.0 * max(expected)  # type: ignore[arg-type]


def test_a_format_changes_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(_native, "measure_bandwidth", lambda *given: 7.0)
    monkeypatch.setattr(_native, "measure_flops", lambda *given: asked.append(given) or 3.0)
    monkeypatch.setattr(_native, "grouped_activations", {"amx": "bf16", "avx512_vnni": "whole"}.get)
    peak = measure(options(isa="avx512_vnni", layers_0_q=INT8), 2, 0.25)
    assert (peak.bandwidth, peak.flops, peak.float32_flops) == (7.0, 6.0, 3.0)
    assert peak.arithmetic == "whole-number products, activations of 16 bits"
    assert measure(options(isa="avx512_vnni", layers_0_q=W8A8), 2).flops == 12.0
    assert asked == [(2, "avx512", 0.25), (2, "avx512")]
    peak = measure(options(isa="amx", layers_0_q=INT4), 2)
    assert (peak.flops, peak.arithmetic) == (48.0, "bf16 dot products")
