"""Limits of numbers in JSON schemas, to the last digit."""

from __future__ import annotations

import pytest
from grammar_helpers import follows, grammars_of_style

from octavo.grammar.compiler import Grammars
from octavo.structured_outputs import StructuredOutputs

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    return grammars_of_style("byte_level", tmp_path_factory.mktemp("numbers"))[1]


@pytest.mark.parametrize("whole", [6, -24, 0, 1000])
@pytest.mark.parametrize("width", [0.25, 0.5, 1, 3])
@pytest.mark.parametrize("above", [True, False])
def test_a_number_is_never_its_exclusive_limit(
    grammars: Grammars, whole: int, width: float, above: bool
) -> None:
    low, high = ("exclusiveMinimum", "maximum") if above else ("exclusiveMaximum", "minimum")
    far = whole + width if above else whole - width
    near = whole + 0.125 if above else whole - 0.125
    for schema in (
        {low: whole, high: far, "type": "number"},
        {"allOf": [{low: float(whole)}, {high: far}], "type": "number"},
    ):
        wanted = StructuredOutputs(json=schema)
        for text in (f"{whole}", f"{whole}.0", f"{whole}.00"):
            assert not follows(grammars, wanted, text)
        assert follows(grammars, wanted, f"{near}")


@pytest.mark.parametrize("edge", [2**53 + 1, 2**60 + 3, -(2**53) - 1, -(2**62) - 5])
@pytest.mark.parametrize("prefix", ["", "exclusive"])
def test_no_number_is_beyond_a_limit_that_is_no_float64(
    grammars: Grammars, edge: int, prefix: str
) -> None:
    """llguidance has the nearest float64 as the limit; a few numbers inside are left out."""
    low, high = (f"exclusiveM{name}" if prefix else f"m{name}" for name in ("inimum", "aximum"))
    schema = {"type": "integer", low: edge, high: edge + 4096}
    wanted = StructuredOutputs(json=schema)
    first, last = (edge + 1, edge + 4095) if prefix else (edge, edge + 4096)
    for beyond in (first - 1, first - 2, last + 1, last + 2):
        assert not follows(grammars, wanted, str(beyond))
    for inside in (first + 1024, last - 1024):
        assert follows(grammars, wanted, str(inside))


def test_the_limits_of_64_bits(grammars: Grammars) -> None:
    wanted = StructuredOutputs(json={"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1})
    assert follows(grammars, wanted, str(2**63 - 1))
    assert follows(grammars, wanted, str(-(2**63) + 1024))
    assert not follows(grammars, wanted, str(2**63))
    assert not follows(grammars, wanted, str(-(2**63) - 1))
    lenient = StructuredOutputs(json={"type": "integer", "enum": [1, 2**53 + 1]}, strict=False)
    assert follows(grammars, lenient, str(2**53 + 1))  # no enum is left
