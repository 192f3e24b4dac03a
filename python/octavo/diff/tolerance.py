"""Every tolerance of `octavo diff`, with the reason for it. docs/diff.md has the measurements.

Two questions are asked of every tap, and each has its own tolerance.

*Is this op right?* (the "own error": the op against its definition on the run's own inputs).
Float32 rounds with u = 2^-24, and n roundings in a sum wander off by about sqrt(n) u, whatever
their order. Two right orders were measured to lie at most 1 sqrt(n) u apart over SmolLM2 (row by
row, Euclidean norm); 8 leaves room for sums that cancel. Attention was measured at 3 sqrt(n) u, n
the head's width plus the context, since the exponential makes the absolute error of a score (some
tens) a relative one: three times the room. All this is as sharp for octavo's bf16 as for float32,
because rounding to bf16 is part of the definition: equal inputs are rounded equally, and only the
sums differ.

There is one exception. Attention over a bf16 cache rounds its weights, which come of float32 scores
whose last bits are not defined: a weight in the middle of two bfloat16 numbers, to within those
bits, may be rounded to either. That happens to one of some ten thousand, and it moves the output by
a step, 2^-7 of the weight at most, times the weight's share of the sum: where a token looks at one
other alone, by 8e-3 of the result. A tolerance of 8e-3 for all of attention would pass weights that
are not rounded at all (SmolLM2: off by 1e-3 at the median token, 3e-3 at the worst). So the weights
that are so near to a middle are found, one by one (ties.py), and what they can do to a row is taken
off its error; what is left is held to float32.

*Do the two runs still agree?* (the relative error of the tap). Here earlier errors add up and
the model magnifies them, by an amount that no theory gives, so the figures come from measurement.
"""

from __future__ import annotations

import math

from octavo.models.layer import Node
from octavo.models.spec import ModelSpec

UNIT_F32 = 2.0**-24
UNIT_BF16 = 2.0**-8
STEP_BF16 = 2 * UNIT_BF16  # between neighbours, of the smaller one, at most

# Largest relative error of a row. Right float32 runs (reference, Hugging Face) over 1,561 tokens
# of SmolLM2 differ by 5e-5 at the worst tap of the worst token; four times that.
RUN_F32 = 2e-4
# In bf16 the measure is the other implementation's own rounding, taken in the same run: its
# distance from the same model computed without rounding activations, at the worst tap of the
# layer. If octavo rounds no more than that, the two are at most twice that apart.
RUN_BF16_FACTOR = 2.0
# ... but never more than this: beyond it something is wrong, not rounded (Hugging Face's bf16 was
# measured 0.35 away from exact at the worst tap, a wrong op 1 or more).
RUN_BF16_CAP = 0.5
# Logits, absolute, at every position: octavo's promise for float32 (issue: "within 1e-3").
LOGITS_F32 = 1e-3
# In bf16 greedy tokens may differ where the leading logits are this close, in standard deviations
# of what the other implementation's rounding adds. In float32 they may not differ at all.
TIE_DEVIATIONS = 3.0
# Hugging Face's bf16 rounds what every op returns (by u = 2^-8 at most), a norm and a residual
# add twice; its attention also rounds scores and weights inside (measured 6.6 u).
OWN_BF16_OUTPUT = 4 * UNIT_BF16
OWN_BF16_ATTENTION = 16 * UNIT_BF16
# It rounds a router's weights too, which octavo does not (measured 7 u, of two logits).
OWN_BF16_ROUTER = 16 * UNIT_BF16

# Within a mixture of experts activations are rounded to bf16 or to whole numbers, and a float32 sum
# in the middle of two such numbers may be rounded to either. One such step of one of w activations
# moves a row by about u / sqrt(w); room for a large one.
EXPERT_STEPS = 8 * UNIT_BF16

SUM_FACTOR = 8.0
ATTENTION_FACTOR = 24.0
SHORTEST_SUM = 64  # exp, division and products round too, even where little is summed


def own_tolerance(spec: ModelSpec, node: Node, context: int, *, rounds_output: bool) -> float:
    """Largest own error (relative, any row) of a right op.

    context: tokens that attention sums over at most. rounds_output: the implementation keeps its
    activations in bf16 (Hugging Face's bf16 does, octavo does not).
    """
    is_attention = node.op == "attention"
    if rounds_output and any(matrix.is_router for matrix in node.matrices):
        return OWN_BF16_ROUTER
    if rounds_output:
        return OWN_BF16_ATTENTION if is_attention else OWN_BF16_OUTPUT
    terms = max(SHORTEST_SUM, _terms(spec, node, context))
    return (ATTENTION_FACTOR if is_attention else SUM_FACTOR) * math.sqrt(terms) * UNIT_F32


def _terms(spec: ModelSpec, node: Node, context: int) -> int:
    """How many numbers are summed for one element of a tap; 1 also stands for a few."""
    if node.op == "attention":
        return spec.layers[node.layer or 0].head_dim + context
    if node.op == "linear":
        return node.matrix.inputs
    if node.op == "moe":
        return sum(matrix.inputs for matrix in (node.matrices[0], node.matrices[-1]))
    return 1 if node.norm is None else node.group or node.width


def run_tolerance(dtype: str, yardstick: float | None) -> float:
    """Largest relative error (any row) of a tap between two right runs.

    yardstick: for bf16, how far rounding alone takes the other implementation at this tap.
    """
    if dtype == "f32":
        return RUN_F32
    measured = RUN_BF16_CAP if yardstick is None else RUN_BF16_FACTOR * yardstick
    # No less than one rounding: a tap before any product, say the first norm, has yardstick 0.
    return min(RUN_BF16_CAP, max(measured, UNIT_BF16))
