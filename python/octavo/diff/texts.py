"""What the terminal report and the page both say: numbers, table cells, sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.diff.result import DecodeResult, DiffResult, Finding, GreedyResult, TapResult


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


def tap_fields(tap: TapResult) -> dict[str, Any]:
    """What the JSON and the page's script both have of a tap."""
    return {
        "name": tap.name,
        "layer": tap.layer,
        "part": tap.part,
        "position": tap.position,
        "relative": tap.relative,
        "growth": tap.growth,
        "tolerance": tap.tolerance,
        "own_left": tap.own[0],
        "own_right": tap.own[1],
        "own_tolerance_left": tap.own_tolerances[0],
        "own_tolerance_right": tap.own_tolerances[1],
    }


def more_taps(finding: Finding) -> str:
    """At how many taps besides the first a finding shows."""
    return f" and at {len(finding.taps) - 1} more taps" if len(finding.taps) > 1 else ""


def finding_lines(finding: Finding) -> dict[str, str]:
    """What was measured, where to look, and what it may be."""
    return {"measured": finding.evidence, "look at": finding.files, "hint": finding.hint}


@dataclass(frozen=True)
class Check:
    """What a check of the whole runs showed.

    state: "good", "bad", "note" (bad, but explained) or "plain" (neither). figure: the result in
    a word or a number.
    """

    name: str
    state: str
    figure: str
    sentence: str


def checks(result: DiffResult) -> list[Check]:
    """Logits, greedy tokens, prefill against decode, and who rounds more, as far as looked at."""
    logits = result.logits
    sentence = (
        f"max abs error {number(logits.max_abs)} over {logits.positions} positions (tolerance "
        f"{number(logits.tolerance)}); same first choice at {logits.same_choice}"
    )
    found = [Check("logits", _state(logits.ok), number(logits.max_abs), sentence)]
    if (greedy := result.greedy) is not None:
        count = len(greedy.left)
        same = count if greedy.parted_at is None else greedy.parted_at
        state = "note" if greedy.tie else _state(greedy.ok)
        sentence = _greedy_sentence(result, greedy)
        found.append(Check("greedy", state, f"{same} of {count} the same", sentence))
    if (decode := result.decode) is not None:
        figure = "bit-identical" if decode.different == 0 else number(decode.max_abs)
        sentence = _decode_sentence(result, decode)
        found.append(Check("decode", _state(decode.ok), figure, sentence))
    if (judge := result.judge) is not None:
        left, right = number(judge.logits_left), number(judge.logits_right)
        taps = [number(max(worst.values())) for worst in (judge.left, judge.right)]
        sentence = (
            f"against {judge.description}: {result.names[0]} is off by {taps[0]} at the worst tap "
            f"and {left} in the logits, {result.names[1]} by {taps[1]} and {right}"
        )
        found.append(Check("judge", "plain", f"{left} and {right}", sentence))
    return found


def _state(ok: bool) -> str:
    return "good" if ok else "bad"


def _greedy_sentence(result: DiffResult, greedy: GreedyResult) -> str:
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


def _decode_sentence(result: DiffResult, decode: DecodeResult) -> str:
    """What prefill against token-by-token decode showed, of the left one."""
    count = f"{decode.positions} position{'s' * (decode.positions != 1)}"
    who = f"{result.names[0]}'s last {count}, one token at a time"
    if decode.different == 0:
        promise = ", as it promises on the CPU" if decode.promised else ""
        return f"{who}: bit-identical to prefill{promise}"
    broken = "; it promises equality in every bit" if decode.promised else ""
    largest = number(decode.max_abs)
    return f"{who}: {decode.different} differ from prefill, by {largest} at most{broken}"
