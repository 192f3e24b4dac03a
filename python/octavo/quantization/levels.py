"""Sixteen levels for 4-bit codes that are not evenly spaced.

Weights of a group are nearly normally distributed: most are small. Levels that are closer together
near 0 than at the ends, as `NONUNIFORM_LEVELS`, then leave less error than evenly spaced ones.

They were computed by the method of Lloyd (1982) and Max (1960), with one more unknown
(`fit_levels` in tests/helpers/fit_levels.py). No model's weights were used. Since a scale may have
either sign, the longer side of a group can always use the longer side of the levels, so the levels
are not symmetric about 0.
"""

from __future__ import annotations

# Whole numbers, so that products with activations stay exact sums.
NONUNIFORM_LEVELS = (
    *(-127, -100, -78, -61, -47, -33, -21, -9),
    *(2, 14, 25, 37, 50, 65, 83, 106),
)
