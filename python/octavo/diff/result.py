"""What a comparison found: plain data, for the terminal, for JSON and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from octavo.diff.measure import Float64, RowErrors
from octavo.models.layer import Node


@dataclass(frozen=True)
class TapResult:
    """One tap over all positions. Errors are of the worst row (token).

    relative, max_abs, cosine_gap: left against right, see measure.RowErrors. position: the row of
    the worst relative error. growth: relative over the largest relative of the tap's inputs; None
    where those are 0 or unknown. own: of the left and the right one, its op against the definition
    on the inputs that it had; None where not checked. The tolerances are those of tolerance.py.
    """

    node: Node
    relative: float
    max_abs: float
    cosine_gap: float
    position: int
    growth: float | None
    own: tuple[float | None, float | None]
    tolerance: float
    own_tolerances: tuple[float, float]

    @property
    def name(self) -> str:
        return self.node.tap

    @property
    def layer(self) -> int | None:
        return self.node.layer

    @property
    def part(self) -> str:
        return self.node.part

    @property
    def broken(self) -> list[bool]:
        """Whether the op is wrong, left and right."""
        pairs = zip(self.own, self.own_tolerances, strict=True)
        return [own is not None and not own <= limit for own, limit in pairs]

    @property
    def differs(self) -> bool:
        """The two runs do not agree here."""
        return not self.relative <= self.tolerance

    @property
    def ok(self) -> bool:
        return not (self.differs or any(self.broken))


@dataclass(frozen=True)
class TapRows:
    """The heat map's figures of one tap, float64 (positions,) each."""

    errors: RowErrors
    own: tuple[Float64 | None, Float64 | None]


@dataclass(frozen=True)
class Finding:
    """One op that is wrong, or the place where two right-looking runs differ.

    side: the name of whose op it is, or "" where neither is wrong by itself. title: the finding in
    a few words. taps: all taps where it shows. evidence: what was measured. mistake: what the op
    seems to do instead, if that was recognized.
    """

    side: str
    title: str
    tap: str
    taps: tuple[str, ...]
    op: str
    files: str
    evidence: str
    mistake: str | None
    hint: str


@dataclass(frozen=True)
class LogitsResult:
    """Logits at every position. same_choice: positions where both have the same largest one."""

    positions: int
    max_abs: float
    worst_position: int
    same_choice: int
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.max_abs <= self.tolerance


@dataclass(frozen=True)
class GreedyResult:
    """Greedy decoding by both.

    parted_at: first step with different tokens, None if there is none. left_margin, right_margin:
    top logit minus the second one at that step, by each. tie: both margins are within what
    rounding explains (bf16 only; float32 promises the same tokens).
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    parted_at: int | None
    left_margin: float | None
    right_margin: float | None
    tie: bool

    @property
    def ok(self) -> bool:
        return self.parted_at is None or self.tie


@dataclass(frozen=True)
class DecodeResult:
    """The left one's prefill against its own token-by-token decode, on the last positions.

    promised: it promises equality in every bit. different: rows that differ in any bit.
    """

    positions: int
    different: int
    max_abs: float
    promised: bool
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.different == 0 if self.promised else self.max_abs <= self.tolerance


@dataclass(frozen=True)
class JudgeResult:
    """Both against the same model without rounding (float64, or float32 for bf16).

    left, right: relative error of the worst row, by tap. logits_*: largest absolute error.
    """

    description: str
    left: Mapping[str, float]
    right: Mapping[str, float]
    logits_left: float
    logits_right: float


@dataclass(frozen=True)
class DiffResult:
    """All of a comparison."""

    model: str
    names: tuple[str, str]  # of the two implementations, left and right
    descriptions: tuple[str, str]
    dtype: str
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    taps: tuple[TapResult, ...]
    rows: Mapping[str, TapRows]
    missing: tuple[str, ...]  # taps that one of the two does not give
    logits: LogitsResult
    greedy: GreedyResult | None
    greedy_texts: tuple[str, str]
    decode: DecodeResult | None
    judge: JudgeResult | None
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def checked(self) -> list[int]:
        """Which ones' ops were checked by their definition: 0 the left, 1 the right."""
        return [index for index in (0, 1) if any(tap.own[index] is not None for tap in self.taps)]

    def layers(self) -> list[list[TapResult]]:
        """The taps of each layer; those outside of any layer by themselves."""
        groups = groupby(self.taps, lambda tap: tap.name if tap.layer is None else tap.layer)
        return [list(taps) for _, taps in groups]

    @property
    def first_bad(self) -> TapResult | None:
        """The first tap, in the order of execution, that is over a tolerance."""
        return next((tap for tap in self.taps if not tap.ok), None)

    @property
    def ok(self) -> bool:
        checks = (self.logits, self.greedy, self.decode)
        return self.first_bad is None and all(check is None or check.ok for check in checks)
