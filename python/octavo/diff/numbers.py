"""Numbers as the reports print them."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """2.3e-05 -> "2.3e-5"; 0.26 -> "0.26"; 0 -> "0"; None -> "-"."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    if 0.01 <= abs(value) < 100:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def cosine(gap: float) -> str:
    """The cosine from 1 - cosine: "1-3.0e-11" where digits would all be nines."""
    return "1" if gap == 0 else f"1-{number(gap)}" if gap < 1e-4 else f"{1 - gap:.5f}"


def growth(value: float | None, relative: float) -> str:
    """How much larger a relative error is than that of the op's inputs: "x1.7".

    "new" where there is an error and the inputs have none.
    """
    if value is None:
        return "new" if relative > 0 else "-"
    return f"×{value:.3g}"
