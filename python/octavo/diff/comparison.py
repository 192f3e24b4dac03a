"""Run two implementations on the same tokens and find where they differ.

Both are fed the same chunks in lockstep, so that only one chunk's taps are held at a time however
long the text is. Three passes: taps of the prompt; greedy decoding from its end; and the left
one's decode, token by token, against its own prefill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from octavo.diff.definition import OpReplay, own_errors
from octavo.diff.findings import find_ops
from octavo.diff.implementations import Implementation, Int32, StepResult
from octavo.diff.measure import Float32, Float64, RowErrors, joined, row_errors
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
from octavo.models.layer import Node, model_nodes
from octavo.models.spec import ModelSpec
from octavo.progress import StageProgress
from octavo.reference.llama import ReferenceModel

CHUNK_BYTES = 192 << 20  # of one implementation's taps held at a time


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
class Run:
    """One implementation over the prompt, and what is collected about it.

    replay: does its ops once more; None for the definition itself. own: the own errors of its ops,
    by tap. mistakes: what a broken op was recognized as, by part of a layer, the first time only.
    last: what the last chunk gave, without its taps. rounding, logits_rounding: how far the run
    is from the truth: the relative error of the worst row, by tap, and the largest absolute one.
    """

    implementation: Implementation
    replay: OpReplay | None
    own: dict[str, list[Float64]] = field(default_factory=dict)
    mistakes: dict[str, str | None] = field(default_factory=dict)
    last: StepResult = field(init=False)
    rounding: dict[str, float] = field(default_factory=dict)
    logits_rounding: float = 0.0

    def tolerance(self, spec: ModelSpec, node: Node, context: int) -> float:
        """Of the own error of an op."""
        rounds_output = self.implementation.rounds_output
        return own_tolerance(spec, node, context, rounds_output=rounds_output)

    def check_ops(self, step: StepResult, token_ids: Int32, context: int) -> None:
        """Redo each op of a chunk; where one is off, try what it might be instead."""
        if self.replay is None:
            return
        for inputs in self.replay.ops(step.taps, token_ids):
            node, seen = inputs.node, step.taps[inputs.node.tap]
            errors = own_errors(inputs, seen)
            self.own.setdefault(node.tap, []).append(errors)
            limit = self.tolerance(inputs.model.spec, node, context)
            if node.part not in self.mistakes and not errors.max() <= limit:
                self.mistakes[node.part] = find_suspect(inputs, seen, limit)

    def measure_rounding(self, step: StepResult, truth: StepResult) -> Float32:
        """Note how far a chunk is from the truth; returns the errors of its logits."""
        for name, value in truth.taps.items():
            if name in step.taps:
                error = float(row_errors(step.taps[name], value).relative.max())
                self.rounding[name] = max(self.rounding.get(name, 0.0), error)
        off: Float32 = step.logits - truth.logits
        self.logits_rounding = max(self.logits_rounding, float(np.abs(off).max()))
        return off

    def own_relative(self, tap: str) -> Float64 | None:
        """The own error of a tap at every position; None where it was not checked."""
        return np.concatenate(self.own[tap]) if tap in self.own else None


def chunk_size_for(spec: ModelSpec) -> int:
    """How many tokens at a time keep one implementation's taps within `CHUNK_BYTES`."""
    width = sum(node.width for node in model_nodes(spec))
    return int(min(512, max(16, CHUNK_BYTES // (4 * width))))


class Comparison:
    """One run of `octavo diff`; `run` does it all.

    definition: the reference in the dtypes that the two are held to; it checks the ops.
    truth: the same model without rounding; it sets the tolerance for bf16 and fills the judge's
    columns. None: neither.
    """

    def __init__(
        self,
        left: Implementation,
        right: Implementation,
        definition: ReferenceModel,
        token_ids: Int32,
        options: DiffOptions,
        truth: Implementation | None = None,
        progress: StageProgress = lambda *_: None,
    ) -> None:
        self.left, self.right, self.truth = left, right, truth
        self.spec = definition.spec
        self.nodes = model_nodes(definition.spec)
        self.token_ids = np.asarray(token_ids, dtype=np.int32)
        self.options = options
        self.progress = progress
        self.chunk_size = options.chunk_size or chunk_size_for(self.spec)
        self.runs = tuple(
            Run(each, None if each.is_definition else OpReplay(definition))
            for each in (left, right)
        )
        self.errors: dict[str, list[RowErrors]] = {}
        self.squares = 0.0  # of the right one's errors in the logits, against the truth
        self.same_choice = 0
        self.kept_logits: list[Float32] = []  # the left one's, for the last positions

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
        left, right = self.runs
        texts = ("", "")
        if greedy is not None and decode is not None:
            texts = (decode(list(greedy.left)), decode(list(greedy.right)))
        return DiffResult(
            model=model,
            names=(self.left.name, self.right.name),
            descriptions=(self.left.description, self.right.description),
            dtype=self.left.dtype,
            token_ids=tuple(int(token) for token in self.token_ids),
            token_texts=token_texts,
            taps=taps,
            rows=rows,
            missing=tuple(node.tap for node in self.nodes if node.tap not in self.errors),
            logits=self._logits_result(rows["logits"]),
            greedy=greedy,
            greedy_texts=texts,
            decode=decoded,
            judge=self._judge_result() if judged else None,
            findings=find_ops(taps, (self.left, self.right), (left.mistakes, right.mistakes)),
            seconds=time.monotonic() - started,
        )

    def _chunks(self, token_ids: Int32) -> list[Int32]:
        return [
            token_ids[start : start + self.chunk_size]
            for start in range(0, len(token_ids), self.chunk_size)
        ]

    def _compare_taps(self) -> None:
        total, done = len(self.token_ids), 0
        for implementation in (self.left, self.right, self.truth):
            if implementation is not None:
                implementation.reset()
        for chunk in self._chunks(self.token_ids):
            self.progress("comparing taps", done, total)
            self._compare_chunk(chunk)
            done += len(chunk)
        self.progress("comparing taps", total, total)

    def _compare_chunk(self, chunk: Int32) -> None:
        left, right = steps = [run.implementation.feed(chunk, taps=True) for run in self.runs]
        for node in self.nodes:
            if node.tap in left.taps and node.tap in right.taps:
                errors = row_errors(left.taps[node.tap], right.taps[node.tap])
                self.errors.setdefault(node.tap, []).append(errors)
        self.same_choice += int((left.logits.argmax(axis=1) == right.logits.argmax(axis=1)).sum())
        self.kept_logits.append(left.logits[-self.options.decode_rows :].copy())
        for run, step in zip(self.runs, steps, strict=True):
            run.last = StepResult(step.logits[-1:], step.next_token)
            run.check_ops(step, chunk, len(self.token_ids))
        if self.truth is None:
            return
        exact = self.truth.feed(chunk, taps=True)
        for run, step in zip(self.runs, steps, strict=True):
            off = run.measure_rounding(step, exact)
        # What shifts all logits of a row alike does not matter to which is the largest.
        centred = off - off.mean(axis=1, keepdims=True)
        self.squares += float(np.square(centred, dtype=np.float64).sum())

    def _compare_greedy(self) -> GreedyResult:
        """Decode on from the prompt's end, each by its own choices."""
        steps = self.options.steps
        answers: list[tuple[int, ...]] = []
        margins: list[list[float]] = []
        for index, run in enumerate(self.runs):
            step = run.last  # both stand at the prompt's end
            tokens, own_margins = [step.next_token], [_margin(step.logits)]
            for done in range(1, steps):
                self.progress("decoding greedily", index * steps + done, 2 * steps)
                last = np.array(tokens[-1:], dtype=np.int32)
                step = run.implementation.feed(last, all_logits=False)
                tokens.append(step.next_token)
                own_margins.append(_margin(step.logits))
            answers.append(tuple(tokens))
            margins.append(own_margins)
        self.progress("decoding greedily", 2 * steps, 2 * steps)
        pairs = enumerate(zip(*answers, strict=True))
        differ_at = next((place for place, (left, right) in pairs if left != right), None)
        if differ_at is None:
            return GreedyResult(answers[0], answers[1], None, None, None, False)
        left, right = margins[0][differ_at], margins[1][differ_at]
        # Left puts one token ahead by its margin, right the other by its own: the four logits'
        # roundings together have to make up the sum, and have twice one logit's deviation.
        tie = self.left.dtype != "f32" and left + right <= TIE_DEVIATIONS * 2 * self._deviation()
        return GreedyResult(answers[0], answers[1], differ_at, left, right, tie)

    def _compare_decode(self) -> DecodeResult | None:
        """The left one once more: all but the last positions at once, then one by one."""
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
        """Standard deviation of what rounding adds to one of the right one's logits."""
        count = len(self.token_ids) * self.spec.vocab_size
        return math.sqrt(self.squares / count)

    def _logits_tolerance(self) -> float:
        """Absolute: the promise for float32, the other one's own rounding for bf16."""
        if self.left.dtype == "f32":
            return LOGITS_F32
        if self.truth is None:
            return float("inf")  # the relative tolerance of the tap "logits" still holds
        return RUN_BF16_FACTOR * self.runs[1].logits_rounding

    def _summarize(self) -> tuple[tuple[TapResult, ...], dict[str, TapRows]]:
        worst: dict[str, float] = {}
        results, rows = [], {}
        for node in self.nodes:
            if node.tap not in self.errors:
                continue
            errors = joined(self.errors[node.tap])
            own = [run.own_relative(node.tap) for run in self.runs]
            worst[node.tap] = relative = float(errors.relative.max())
            before = max((worst.get(source, 0.0) for source in node.inputs), default=0.0)
            tolerance = self.options.tolerance
            if tolerance is None:
                tolerance = run_tolerance(self.left.dtype, self._yardstick(node))
            limits = [run.tolerance(self.spec, node, len(self.token_ids)) for run in self.runs]
            results.append(
                TapResult(
                    node=node,
                    relative=relative,
                    max_abs=float(errors.max_abs.max()),
                    cosine_gap=float(errors.cosine_gap.max()),
                    position=int(errors.relative.argmax()),
                    growth=relative / before if before > 0 else None,
                    own=(_largest(own[0]), _largest(own[1])),
                    tolerance=tolerance,
                    own_tolerances=(limits[0], limits[1]),
                )
            )
            rows[node.tap] = TapRows(errors, (own[0], own[1]))
        return tuple(results), rows

    def _yardstick(self, node: Node) -> float | None:
        """How far rounding alone takes the right one around a tap; None without a truth.

        Around: in its whole layer, since the worst row of one tap alone is a matter of luck.
        """
        rounding = self.runs[1].rounding
        near = [
            rounding.get(other.tap, 0.0)
            for other in self.nodes
            if other is node or (other.layer == node.layer and other.layer is not None)
        ]
        return None if self.truth is None else max(near)

    def _logits_result(self, rows: TapRows) -> LogitsResult:
        return LogitsResult(
            positions=len(self.token_ids),
            max_abs=float(rows.errors.max_abs.max()),
            worst_position=int(rows.errors.max_abs.argmax()),
            same_choice=self.same_choice,
            tolerance=self._logits_tolerance(),
        )

    def _judge_result(self) -> JudgeResult | None:
        if self.truth is None:
            return None
        left, right = self.runs
        roundings = left.rounding, right.rounding, left.logits_rounding, right.logits_rounding
        return JudgeResult(self.truth.description, *roundings)


def _largest(values: Float64 | None) -> float | None:
    return None if values is None else float(values.max())


def _margin(logits: Float32) -> float:
    """Largest logit minus the second largest, of (1, vocab_size)."""
    top = np.partition(logits[-1], -2)[-2:] if logits.shape[1] > 1 else np.zeros(2)
    return float(top[1] - top[0])
