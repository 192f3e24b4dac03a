"""Run two sides on the same tokens and find where they differ.

Both are fed the same chunks in lockstep, so that only one chunk's taps are held at a time however
long the text is. Three passes: taps of the prompt; greedy decoding from its end; and the left
side's decode, token by token, against its own prefill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from octavo.diff.findings import find_culprits
from octavo.diff.graph import tap_inputs
from octavo.diff.implementations import Fed, Int32, Side
from octavo.diff.local import LocalJudge, own_errors
from octavo.diff.measure import Float32, Float64, RowErrors, Trace, row_errors
from octavo.diff.result import (
    DecodeResult,
    DiffResult,
    GreedyResult,
    JudgeResult,
    LogitsResult,
    TapResult,
    TapRows,
)
from octavo.diff.suspects import find_suspect
from octavo.diff.tolerance import (
    LOGITS_F32,
    RUN_BF16_FACTOR,
    TIE_DEVIATIONS,
    own_tolerance,
    run_tolerance,
)
from octavo.models.layer import split_tap, tap_names
from octavo.models.spec import ModelSpec
from octavo.reference.llama import ReferenceModel

Progress = Callable[[str, int, int], None]  # what is being done, tokens done, tokens in all
CHUNK_BYTES = 192 << 20  # of one side's taps held at a time


@dataclass(frozen=True)
class DiffOptions:
    """steps: of greedy decoding. decode_rows: positions of prefill against decode, 0 for none.

    tolerance: replaces the table's relative error between the two runs. chunk_size: tokens fed
    at a time; None takes as many as `CHUNK_BYTES` of taps allow, at most 512.
    """

    steps: int = 16
    decode_rows: int = 64
    tolerance: float | None = None
    chunk_size: int | None = None


@dataclass
class Watch:
    """What is collected about one side: the own errors of its ops, and recognized mistakes."""

    side: Side
    judge: LocalJudge | None
    own: dict[str, Trace] = field(default_factory=dict)
    mistakes: dict[str, str | None] = field(default_factory=dict)  # by part, the first time

    def look(self, fed: Fed, token_ids: Int32, context: int) -> None:
        """Redo each op of a chunk; where one is off, try what it might be instead."""
        if self.judge is None:
            return
        for name, part, scene in self.judge.scenes(fed.taps, token_ids):
            seen = fed.taps[name]
            errors = own_errors(scene, part, seen)
            self.own.setdefault(name, Trace()).add(errors)
            limit = own_tolerance(
                self.judge.model.spec, name, context, rounds_output=self.side.rounds_output
            )
            if part not in self.mistakes and not errors.relative.max() <= limit:
                self.mistakes[part] = find_suspect(scene, part, seen, limit)


def chunk_size_for(spec: ModelSpec) -> int:
    """How many tokens at a time keep one side's taps within `CHUNK_BYTES`."""
    width = 2 * spec.hidden_size + spec.vocab_size
    for layer in spec.layers:
        width += 3 * layer.q_size + 3 * layer.kv_size + 5 * spec.hidden_size
        width += 3 * layer.intermediate_size
    return int(min(512, max(16, CHUNK_BYTES // (4 * width))))


class Comparison:
    """One run of `octavo diff`; `run` does it all.

    definition: the reference in the dtypes that the sides are held to; it judges the ops.
    truth: the same model without rounding; it sets the tolerance for bf16 and fills the judge's
    columns. None: neither.
    """

    def __init__(
        self,
        left: Side,
        right: Side,
        definition: ReferenceModel,
        token_ids: Int32,
        options: DiffOptions,
        truth: Side | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.left, self.right, self.truth = left, right, truth
        self.spec = definition.spec
        self.token_ids = np.asarray(token_ids, dtype=np.int32)
        self.options = options
        self.progress = progress or (lambda what, done, total: None)
        self.chunk_size = options.chunk_size or chunk_size_for(self.spec)
        self.watches = [
            Watch(side, None if side.is_definition else LocalJudge(definition))
            for side in (left, right)
        ]
        self.traces: dict[str, Trace] = {}
        self.truth_worst: list[dict[str, float]] = [{}, {}]
        self.truth_logits = [0.0, 0.0]
        self.truth_squares = 0.0  # of the right side's errors in the logits
        self.same_choice = 0
        self.missing: set[str] = set()
        self.kept_logits: list[Float32] = []  # the left side's, for the last positions
        self.last_fed: list[Fed] = []  # what the last chunk of the prompt gave, without its taps

    def run(
        self,
        model: str = "",
        token_texts: tuple[str, ...] = (),
        decode: Callable[[list[int]], str] | None = None,
        judged: bool = False,
    ) -> DiffResult:
        """Compare. model: its name, for the title. token_texts: one a token of the prompt.

        decode: token ids -> text, for the greedy answers. judged: report the truth's columns.
        """
        started = time.monotonic()
        self._compare_taps()
        greedy = self._compare_greedy() if self.options.steps else None
        decoded = self._compare_decode()
        taps, rows = self._summarize()
        texts = ("", "")
        if greedy is not None and decode is not None:
            texts = (decode(list(greedy.left)), decode(list(greedy.right)))
        return DiffResult(
            model=model,
            left_name=self.left.name,
            right_name=self.right.name,
            left_description=self.left.description,
            right_description=self.right.description,
            dtype=self.left.dtype,
            token_ids=tuple(int(token) for token in self.token_ids),
            token_texts=token_texts,
            taps=taps,
            rows=rows,
            missing=tuple(name for name in tap_names(self.spec) if name in self.missing),
            logits=self._logits_result(rows["logits"].errors),
            greedy=greedy,
            greedy_texts=texts,
            decode=decoded,
            judge=self._judge_result() if judged else None,
            findings=find_culprits(taps, self.left, self.right, self._mistakes()),
            seconds=time.monotonic() - started,
        )

    def _chunks(self, token_ids: Int32) -> list[Int32]:
        return [
            token_ids[start : start + self.chunk_size]
            for start in range(0, len(token_ids), self.chunk_size)
        ]

    def _compare_taps(self) -> None:
        total, done = len(self.token_ids), 0
        for side in (self.left, self.right, self.truth):
            if side is not None:
                side.reset()
        for chunk in self._chunks(self.token_ids):
            self.progress("comparing taps", done, total)
            self._compare_chunk(chunk)
            done += len(chunk)
        self.progress("comparing taps", total, total)

    def _compare_chunk(self, chunk: Int32) -> None:
        feds = [self.left.feed(chunk, taps=True), self.right.feed(chunk, taps=True)]
        for name in tap_names(self.spec):
            if all(name in fed.taps for fed in feds):
                errors = row_errors(feds[0].taps[name], feds[1].taps[name])
                self.traces.setdefault(name, Trace()).add(errors)
            else:
                self.missing.add(name)
        choices = [fed.logits.argmax(axis=1) for fed in feds]
        self.same_choice += int((choices[0] == choices[1]).sum())
        self.last_fed = [Fed(fed.logits[-1:], fed.next_token) for fed in feds]
        self.kept_logits.append(feds[0].logits[-self.options.decode_rows :].copy())
        for watch, fed in zip(self.watches, feds, strict=True):
            watch.look(fed, chunk, len(self.token_ids))
        if self.truth is None:
            return
        exact = self.truth.feed(chunk, taps=True)
        for index, fed in enumerate(feds):
            worst = self.truth_worst[index]
            for name, value in exact.taps.items():
                if name in fed.taps:
                    error = float(row_errors(fed.taps[name], value).relative.max())
                    worst[name] = max(worst.get(name, 0.0), error)
            off = fed.logits - exact.logits
            self.truth_logits[index] = max(self.truth_logits[index], float(np.abs(off).max()))
        # What shifts all logits of a row alike does not matter to which is the largest.
        centred = off - off.mean(axis=1, keepdims=True)
        self.truth_squares += float(np.square(centred, dtype=np.float64).sum())

    def _compare_greedy(self) -> GreedyResult:
        """Decode on from the prompt's end, each side by itself."""
        steps = self.options.steps
        answers: list[tuple[int, ...]] = []
        margins: list[list[float]] = []
        for index, side in enumerate((self.left, self.right)):
            fed = self.last_fed[index]  # both stand at the prompt's end
            tokens, own_margins = [fed.next_token], [_margin(fed.logits)]
            for step in range(1, steps):
                self.progress("decoding greedily", index * steps + step, 2 * steps)
                fed = side.feed(np.array(tokens[-1:], dtype=np.int32), all_logits=False)
                tokens.append(fed.next_token)
                own_margins.append(_margin(fed.logits))
            answers.append(tuple(tokens))
            margins.append(own_margins)
        self.progress("decoding greedily", 2 * steps, 2 * steps)
        pairs = enumerate(zip(*answers, strict=True))
        parted = next((step for step, (left, right) in pairs if left != right), None)
        if parted is None:
            return GreedyResult(answers[0], answers[1], None, None, None, False)
        left, right = margins[0][parted], margins[1][parted]
        # Left puts one token ahead by its margin, right the other by its own: the four logits'
        # roundings together have to make up the sum, and have twice one logit's deviation.
        tie = self.left.dtype != "f32" and left + right <= TIE_DEVIATIONS * 2 * self._deviation()
        return GreedyResult(answers[0], answers[1], parted, left, right, tie)

    def _compare_decode(self) -> DecodeResult | None:
        """The left side once more: all but the last positions at once, then one by one."""
        rows = min(self.options.decode_rows, len(self.token_ids) - 1)
        if rows < 1:
            return None
        expected = np.concatenate(self.kept_logits)[-rows:]
        self.left.reset()
        for chunk in self._chunks(self.token_ids[:-rows]):
            self.left.feed(chunk, all_logits=False)
        different, max_abs = 0, 0.0
        for index, token in enumerate(self.token_ids[-rows:]):
            self.progress("prefill against decode", index, rows)
            logits = self.left.feed(np.array([token], dtype=np.int32)).logits[0]
            different += int((logits.view(np.int32) != expected[index].view(np.int32)).any())
            max_abs = max(max_abs, float(np.abs(logits - expected[index]).max()))
        self.progress("prefill against decode", rows, rows)
        return DecodeResult(rows, different, max_abs, self.left.bit_exact, self._logits_tolerance())

    def _deviation(self) -> float:
        """Standard deviation of what rounding adds to one of the right side's logits."""
        count = len(self.token_ids) * self.spec.vocab_size
        return math.sqrt(self.truth_squares / count)

    def _logits_tolerance(self) -> float:
        """Absolute: the promise for float32, the other side's own rounding for bf16."""
        if self.left.dtype == "f32":
            return LOGITS_F32
        if self.truth is None:
            return float("inf")  # the relative tolerance of the tap "logits" still holds
        return RUN_BF16_FACTOR * self.truth_logits[1]

    def _summarize(self) -> tuple[tuple[TapResult, ...], dict[str, TapRows]]:
        context = len(self.token_ids)
        inputs = tap_inputs(self.spec)
        worst: dict[str, float] = {}
        results, rows = [], {}
        for name in tap_names(self.spec):
            if name not in self.traces:
                continue
            errors = self.traces[name].whole()
            own = [_own(watch, name) for watch in self.watches]
            worst[name] = float(errors.relative.max())
            before = max((worst.get(source, 0.0) for source in inputs[name]), default=0.0)
            layer, part = split_tap(name)
            tolerance = self.options.tolerance
            if tolerance is None:
                tolerance = run_tolerance(self.left.dtype, self._yardstick(layer, name))
            limits = [
                own_tolerance(self.spec, name, context, rounds_output=side.rounds_output)
                for side in (self.left, self.right)
            ]
            results.append(
                TapResult(
                    name=name,
                    layer=layer,
                    part=part,
                    relative=worst[name],
                    max_abs=float(errors.max_abs.max()),
                    cosine_gap=float(errors.cosine_gap.max()),
                    position=int(errors.relative.argmax()),
                    growth=worst[name] / before if before > 0 else None,
                    own_left=None if own[0] is None else float(own[0].max()),
                    own_right=None if own[1] is None else float(own[1].max()),
                    tolerance=tolerance,
                    own_tolerance_left=limits[0],
                    own_tolerance_right=limits[1],
                )
            )
            rows[name] = TapRows(errors, own[0], own[1])
        return tuple(results), rows

    def _yardstick(self, layer: int | None, name: str) -> float | None:
        """How far rounding alone takes the right side around a tap; None without a truth.

        Around: in its whole layer, since the worst row of one tap alone is a matter of luck.
        """
        if self.truth is None:
            return None
        near = (
            [name]
            if layer is None
            else [other for other in self.truth_worst[1] if split_tap(other)[0] == layer]
        )
        return max((self.truth_worst[1].get(other, 0.0) for other in near), default=None)

    def _logits_result(self, errors: RowErrors) -> LogitsResult:
        return LogitsResult(
            positions=len(self.token_ids),
            max_abs=float(errors.max_abs.max()),
            worst_position=int(errors.max_abs.argmax()),
            same_choice=self.same_choice,
            tolerance=self._logits_tolerance(),
        )

    def _judge_result(self) -> JudgeResult | None:
        if self.truth is None:
            return None
        left, right = self.truth_worst
        return JudgeResult(self.truth.description, left, right, *self.truth_logits)

    def _mistakes(self) -> tuple[Mapping[str, str | None], Mapping[str, str | None]]:
        return self.watches[0].mistakes, self.watches[1].mistakes


def _own(watch: Watch, name: str) -> Float64 | None:
    trace = watch.own.get(name)
    return None if trace is None else trace.whole().relative


def _margin(logits: Float32) -> float:
    """Largest logit minus the second largest, of (1, vocab_size)."""
    top = np.partition(logits[-1], -2)[-2:] if logits.shape[1] > 1 else np.zeros(2)
    return float(top[1] - top[0])
