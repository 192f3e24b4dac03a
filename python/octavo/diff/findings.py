"""From the taps that are over a tolerance to the ops to look at."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.diff.implementations import Side
from octavo.diff.numbers import number
from octavo.diff.op_sources import OP_SOURCES
from octavo.diff.result import Finding, TapResult

_NOT_OCTAVOS = (
    "Usually octavo reads the model wrongly (config.json, python/octavo/models/llama.py, the order "
    "of the weights): its native core and its reference would share that mistake."
)


def find_culprits(
    taps: tuple[TapResult, ...],
    left: Side,
    right: Side,
    mistakes: tuple[Mapping[str, str | None], Mapping[str, str | None]],
) -> tuple[Finding, ...]:
    """The ops to look at, in the order of execution.

    An op that is wrong in many layers has one entry. mistakes: by side, then by part of a layer,
    what a broken op was recognized as. Where the runs differ and no op is wrong by itself, one
    entry says that.
    """
    findings: list[Finding] = []
    for index, side in enumerate((left, right)):
        wrong = [tap for tap in taps if (tap.left_broken, tap.right_broken)[index]]
        groups: dict[tuple[str, str | None], list[TapResult]] = {}
        for tap in wrong:
            # q_rope and k_rope, say, are one op: with the same mistake they are one entry.
            mistake = mistakes[index].get(tap.part)
            key = OP_SOURCES[tap.part].name if mistake else tap.part
            groups.setdefault((key, mistake), []).append(tap)
        for (_, mistake), names in groups.items():
            if not _agreed(names[0]):
                findings.append(_broken(names, index, side, mistake))
            elif index == 0:
                findings.append(_suspect_definition(names, left, right))
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
    op = OP_SOURCES[first.part]
    return Finding(
        side=side.name,
        title=f"{side.name}'s {op.name} is "
        + ("not octavo's" if side.op_files == "hf" else "wrong"),
        tap=first.name,
        taps=tuple(tap.name for tap in taps),
        op=op.name,
        files=_files(first.part, side),
        evidence=f"given the same inputs, its result is {number(own)} from the definition's "
        f"(tolerance {number(limit)})",
        mistake=mistake,
        hint=_NOT_OCTAVOS if side.op_files == "hf" else op.hint,
    )


def _agreed(tap: TapResult) -> bool:
    """Both sides' ops are off, and yet the sides are together."""
    return tap.left_broken and tap.right_broken and not tap.parted


def _suspect_definition(taps: list[TapResult], left: Side, right: Side) -> Finding:
    """The entry of an op that both sides compute alike, and the definition otherwise."""
    first = taps[0]
    op = OP_SOURCES[first.part]
    return Finding(
        side="",
        title=f"the definition of {op.name} stands alone",
        tap=first.name,
        taps=tuple(tap.name for tap in taps),
        op=op.name,
        files=op.reference,
        evidence=f"{left.name} and {right.name} agree with one another here (to "
        f"{number(first.relative)}), and both are {number(first.own_left)} from the definition",
        mistake=None,
        hint="Suspect the definition, or how octavo reads the model's configuration: both runs "
        "are judged by octavo's reading of it.",
    )


def _files(part: str, side: Side) -> str:
    op = OP_SOURCES[part]
    if side.op_files == "reference":
        return op.reference
    return f"{op.reference}; {op.files(side.op_files)}"


def _unexplained(tap: TapResult, left: Side, right: Side) -> Finding:
    op = OP_SOURCES[tap.part]
    unjudged = (tap.own_left is None and not left.is_definition) or (
        tap.own_right is None and not right.is_definition
    )
    return Finding(
        side="",
        title="the runs differ",
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
