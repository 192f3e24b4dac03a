"""From the taps that are over a tolerance to the ops to look at."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.diff.culprits import CULPRITS
from octavo.diff.numbers import number
from octavo.diff.result import Finding, TapResult
from octavo.diff.sides import Side

_AGREED = (
    "Both sides depart from the definition here and agree with one another: suspect the "
    "definition, reference/ops.py, or how it reads the configuration."
)


def find_culprits(
    taps: tuple[TapResult, ...],
    left: Side,
    right: Side,
    mistakes: tuple[Mapping[str, str | None], Mapping[str, str | None]],
) -> tuple[Finding, ...]:
    """The ops to look at, in the order of execution.

    An op that is wrong in many layers has one entry. mistakes: by side, then by part of a layer,
    what a broken op was recognized as. Where the runs part and no op is wrong by itself, one
    entry says that.
    """
    findings: list[Finding] = []
    for index, side in enumerate((left, right)):
        wrong = [tap for tap in taps if (tap.left_broken, tap.right_broken)[index]]
        groups: dict[tuple[str, str | None], list[TapResult]] = {}
        for tap in wrong:
            # q_rope and k_rope, say, are one op: with the same mistake they are one entry.
            mistake = mistakes[index].get(tap.part)
            key = CULPRITS[tap.part].name if mistake else tap.part
            groups.setdefault((key, mistake), []).append(tap)
        for (_, mistake), names in groups.items():
            findings.append(_broken(names, index, side, mistake))
    order = {tap.name: place for place, tap in enumerate(taps)}
    findings.sort(key=lambda finding: order[finding.tap])
    parted = next((tap for tap in taps if tap.parted), None)
    if parted is not None and not findings:
        findings.append(_unexplained(parted, left, right))
    return tuple(findings)


def _broken(taps: list[TapResult], index: int, side: Side, mistake: str | None) -> Finding:
    """The entry of one op of one side; taps: all the places where it is wrong."""
    first = taps[0]
    own, limit = (
        (first.own_left, first.own_tolerance_left),
        (first.own_right, first.own_tolerance_right),
    )[index]
    op = CULPRITS[first.part]
    agreed = first.left_broken and first.right_broken and not first.parted
    return Finding(
        side=side.name,
        tap=first.name,
        taps=tuple(tap.name for tap in taps),
        op=op.name,
        files=_files(first.part, side),
        evidence=f"given the same inputs, its result is {number(own)} from the definition's "
        f"(tolerance {number(limit)})",
        mistake=mistake,
        hint=_AGREED if agreed else op.hint,
    )


def _files(part: str, side: Side) -> str:
    op = CULPRITS[part]
    if side.op_files == "reference":
        return op.reference
    return f"{op.reference}; {op.files(side.op_files)}"


def _unexplained(tap: TapResult, left: Side, right: Side) -> Finding:
    op = CULPRITS[tap.part]
    unjudged = (tap.own_left is None and not left.is_definition) or (
        tap.own_right is None and not right.is_definition
    )
    return Finding(
        side="",
        tap=tap.name,
        taps=(tap.name,),
        op=op.name,
        files=_files(tap.part, left),
        evidence=f"the runs are {number(tap.relative)} apart here "
        f"(tolerance {number(tap.tolerance)}), "
        + (
            "and the op could not be judged by itself: an input is not among the taps"
            if unjudged
            else "though each op is right on its own inputs: rounding has added up, or the "
            "tolerance asked for is too tight"
        ),
        mistake=None,
        hint=op.hint,
    )
