"""What the terminal report and the page both say: numbers, table cells, sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from octavo.diff.result import (
    DecodeResult,
    DiffResult,
    Finding,
    GreedyResult,
    JudgeResult,
    TapResult,
)


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


def growth(taps: Sequence[TapResult]) -> str:
    """How much larger a relative error is than that of the op's inputs: "×1.7".

    "new" where a tap has an error and its inputs have none.
    """
    if any(tap.growth is None and tap.relative > 0 for tap in taps):
        return "new"
    largest = max((tap.growth for tap in taps if tap.growth is not None), default=None)
    return "-" if largest is None else f"×{largest:.3g}"


def figures(taps: Sequence[TapResult]) -> dict[str, str]:
    """The cells of a row of the table, by their heads: of one tap, or the worst of a layer's."""
    return {
        "max abs": number(max(tap.max_abs for tap in taps)),
        "relative": number(max(tap.relative for tap in taps)),
        "cosine": cosine(max(tap.cosine_gap for tap in taps)),
        "growth": growth(taps),
    }


def own_error(taps: Sequence[TapResult], index: int) -> str:
    """The largest own error of the left (0) or the right one (1)."""
    return number(max((own for tap in taps if (own := tap.own[index]) is not None), default=None))


def more_taps(finding: Finding) -> str:
    """At how many taps besides the first a finding shows."""
    return f" and at {len(finding.taps) - 1} more taps" if len(finding.taps) > 1 else ""


def finding_lines(finding: Finding) -> dict[str, str]:
    """What was measured, where to look, and what it may be."""
    return {"measured": finding.evidence, "look at": finding.files, "hint": finding.hint}


def logits_sentence(result: DiffResult) -> str:
    """How far the logits lie apart."""
    logits = result.logits
    return (
        f"max abs error {number(logits.max_abs)} over {logits.positions} positions (tolerance "
        f"{number(logits.tolerance)}); same first choice at {logits.same_choice}"
    )


def greedy_sentence(result: DiffResult, greedy: GreedyResult) -> str:
    """What greedy decoding showed."""
    step, count = greedy.parted_at, len(greedy.left)
    if step is None:
        shown = f": {result.greedy_texts[0]!r}" if result.greedy_texts[0] else ""
        return f"{count} tokens, all the same{shown}"
    left, right = result.names
    rounding = "; margins this small are within bf16's rounding" if greedy.tie else ""
    return (
        f"the same for {step} of {count} tokens, then {left} takes {greedy.left[step]} (top-2 "
        f"margin {number(greedy.left_margin)}), {right} {greedy.right[step]} (margin "
        f"{number(greedy.right_margin)}){rounding}"
    )


def decode_sentence(result: DiffResult, decode: DecodeResult) -> str:
    """What prefill against token-by-token decode showed, of the left one."""
    count = f"{decode.positions} position{'s' * (decode.positions != 1)}"
    who = f"{result.left_name}'s last {count}, one token at a time"
    if decode.different == 0:
        promise = ", as it promises on the CPU" if decode.promised else ""
        return f"{who}: bit-identical to prefill{promise}"
    broken = "; it promises equality in every bit" if decode.promised else ""
    largest = number(decode.max_abs)
    return f"{who}: {decode.different} differ from prefill, by {largest} at most{broken}"


def judge_sentence(result: DiffResult, judge: JudgeResult) -> str:
    """Who rounds more, against the model without rounding."""
    left, right = max(judge.left.values()), max(judge.right.values())
    return (
        f"against {judge.description}: {result.left_name} is off by {number(left)} at the worst "
        f"tap and {number(judge.logits_left)} in the logits, {result.right_name} by "
        f"{number(right)} and {number(judge.logits_right)}"
    )
