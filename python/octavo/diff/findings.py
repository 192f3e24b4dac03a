"""From the taps that are over a tolerance to the ops to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from octavo.diff.implementations import Implementation
from octavo.diff.op_sources import files_of, hint_for
from octavo.diff.result import Finding, TapResult
from octavo.diff.texts import number

_NOT_OCTAVOS = (
    "Usually octavo reads the model wrongly (config.json, the family's file in "
    "python/octavo/models, the order of the weights): its native core and its reference would "
    "share that mistake."
)


def find_ops(
    taps: Sequence[TapResult],
    implementations: tuple[Implementation, Implementation],
    mistakes: tuple[Mapping[str, str | None], Mapping[str, str | None]],
) -> tuple[Finding, ...]:
    """The ops to look at, in the order of execution.

    An op that is wrong in many layers has one entry. implementations: left and right. mistakes: of
    each, by part of a layer, what a broken op was recognized as. Where the runs differ and no op
    is wrong by itself, one entry says that.
    """
    findings: list[Finding] = []
    for index, implementation in enumerate(implementations):
        groups: dict[tuple[str, str | None], list[TapResult]] = {}
        for tap in taps:
            if tap.broken[index]:
                # q_rope and k_rope, say, are one op: with the same mistake they are one entry.
                mistake = mistakes[index].get(tap.part)
                key = tap.node.op if mistake else tap.part
                groups.setdefault((key, mistake), []).append(tap)
        for (_, mistake), wrong in groups.items():
            # Both ops are off, and yet the two runs agree.
            alike = all(wrong[0].broken) and not wrong[0].differs
            if not alike:
                findings.append(_broken(wrong, index, implementation, mistake))
            elif index == 0:
                findings.append(_suspect_definition(wrong, implementations))
    order = {tap.name: place for place, tap in enumerate(taps)}
    findings.sort(key=lambda finding: order[finding.tap])
    first = next((tap for tap in taps if tap.differs), None)
    if first is not None and not findings:
        findings.append(_unexplained(first, implementations))
    return tuple(findings)


def _finding(taps: list[TapResult], title: str, evidence: str, files: str, hint: str) -> Finding:
    """An entry that blames neither implementation. taps: all that show it."""
    first = taps[0]
    names = tuple(tap.name for tap in taps)
    return Finding("", title, first.name, names, first.node.op, files, evidence, None, hint)


def _broken(
    taps: list[TapResult], index: int, implementation: Implementation, mistake: str | None
) -> Finding:
    """The entry of one op of one implementation; taps: all the places where it is wrong."""
    first, name = taps[0], implementation.name
    octavos = implementation.op_files in ("reference", "native", "cuda")
    finding = _finding(
        taps,
        f"{name}'s {first.node.op} is {'wrong' if octavos else 'not as octavo defines it'}",
        f"given the same inputs, its result is {number(first.own[index])} from the definition's "
        f"(tolerance {number(first.own_tolerances[index])})",
        files_of(first.node.op, implementation.op_files),
        hint_for(first.node) if octavos else _NOT_OCTAVOS,
    )
    return replace(finding, side=name, mistake=mistake)


def _suspect_definition(
    taps: list[TapResult], implementations: tuple[Implementation, Implementation]
) -> Finding:
    """The entry of an op that both compute alike, and the definition otherwise."""
    first, (left, right) = taps[0], implementations
    return _finding(
        taps,
        f"the definition of {first.node.op} stands alone",
        f"{left.name} and {right.name} agree with one another here (to "
        f"{number(first.relative)}), and both are {number(first.own[0])} from the definition",
        files_of(first.node.op, "reference"),
        "Suspect the definition, or how octavo reads the model's configuration: both runs "
        "are checked by octavo's reading of it.",
    )


def _unexplained(tap: TapResult, implementations: tuple[Implementation, Implementation]) -> Finding:
    unchecked = any(
        own is None and not implementation.is_definition
        for own, implementation in zip(tap.own, implementations, strict=True)
    )
    return _finding(
        [tap],
        "the runs differ",
        f"the runs are {number(tap.relative)} apart here (tolerance {number(tap.tolerance)}), "
        + (
            "and the op could not be checked by itself: an input is not among the taps"
            if unchecked
            else "though each op is right on its own inputs: rounding has added up, or the "
            "tolerance asked for is too tight"
        ),
        files_of(tap.node.op, implementations[0].op_files),
        hint_for(tap.node),
    )
