"""What `octavo bench spec` does: the same requests with drafts and without, in turn, on one model.

Two kinds of measurement. Tasks: real questions, drafts as the configuration says. Constructed: the
answers are known from a run without drafts, and each draft is made right with a given probability.
Their speed-up can be foretold (Leviathan et al. 2023): with k drafts that are right with
probability a, a step brings (1 - a^(k + 1)) / (1 - a) tokens. It takes `step_ratio` times as long
as a plain step, which is measured with drafts that are all wrong. A second chain, whose first draft
is right with probability b where the first chain's is wrong, brings b (1 - a^k) tokens more.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from octavo.bench.spec_tasks import conversations
from octavo.draft_tree import Ranks
from octavo.engine.outputs import EngineStats, RequestOutput
from octavo.engine.request import Sequence as EngineSequence
from octavo.errors import InvalidArgumentError
from octavo.llm import LLM
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.speculation.source import DraftSource
from octavo.speculation.speculator import Speculator


@dataclass(frozen=True)
class Row:
    """One measurement. Speeds are tokens a second after the first token, medians of the runs.

    acceptance: the part of the drafts that was right. tokens_per_step: of one sequence, in a step.
    speed_up: the median over pairs of runs. step_ratio, foretold: of constructed drafts. equal:
    whether the answers were the same to the token in all runs.
    """

    task: str
    batch: int
    num_drafts: int
    acceptance: float
    tokens_per_step: float
    plain_speed: float
    speed: float
    speed_up: float
    equal: bool
    step_ratio: float | None = None
    foretold: float | None = None


@dataclass(frozen=True)
class SpecResult:
    """All rows, and what they were measured with."""

    model: str
    speculative_config: dict[str, Any]
    num_tokens: int
    repetitions: int
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no answer was changed by drafts."""
        return all(row.equal for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class KnownAnswers(DraftSource):
    """Drafts from answers that are known, each right with probability `acceptance`.

    second_guess: of a second chain, the probability that its first draft is right where that of the
    first chain is wrong; the drafts behind it are right as any.
    """

    is_free = True
    num_places = 1

    def __init__(
        self,
        answers: dict[tuple[int, ...], tuple[int, ...]],
        acceptance: float,
        second_guess: float = 0.0,
    ) -> None:
        self._answers, self._acceptance = answers, acceptance
        self._second_guess = second_guess
        self._rng = random.Random(1)

    def draft(self, wanted: Sequence[tuple[EngineSequence, Any, int]]) -> Sequence[Sequence[int]]:
        """The answer's next tokens; in place of a wrong one stands the token after it, plus 1."""
        return [self._draft(sequence, count) for sequence, _, count in wanted]

    def draft_trees(
        self, wanted: Sequence[tuple[EngineSequence, Any, Sequence[Ranks]]]
    ) -> Sequence[Sequence[Sequence[int]]]:
        """Two chains, of which one may begin with the right token."""
        trees = []
        for sequence, _, paths in wanted:
            first = self._draft(sequence, len(paths[0]))
            others: list[list[int]] = []
            for path in paths[1:2]:
                other, known = self._draft(sequence, len(path)), self._known(sequence, 1)
                is_right = first[:1] != known and self._rng.random() < self._second_guess
                wrong = [token - 2 if token > 2 else token + 3 for token in known]
                others.append([*(known if is_right else wrong), *other[1:]])
            trees.append([first, *others, *[[]] * (len(paths) - 2)])
        return trees

    def _known(self, sequence: EngineSequence, count: int) -> list[int]:
        answer = self._answers.get(tuple(sequence.token_ids[: sequence.num_prompt_tokens]), ())
        return list(answer[sequence.num_output_tokens :][:count])

    def _draft(self, sequence: EngineSequence, count: int) -> list[int]:
        known = self._known(sequence, count)
        is_right = [self._rng.random() < self._acceptance for _ in known]
        return [
            t if right else max(t - 1, 0) or 1 for t, right in zip(known, is_right, strict=True)
        ]


class SpecBench:
    """Measures one model. llm: with a speculative_config; repetitions: pairs of runs."""

    def __init__(self, llm: LLM, num_tokens: int, repetitions: int) -> None:
        drafter = llm.engine.drafter
        if not isinstance(drafter, Speculator):
            raise InvalidArgumentError("the model has no speculative_config; nothing to measure")
        if repetitions < 1 or num_tokens < 2:
            raise InvalidArgumentError(
                f"-r is {repetitions} and -n is {num_tokens}; expected 1 and 2, or more"
            )
        self._llm, self._drafter = llm, drafter
        self._num_tokens, self._repetitions = num_tokens, repetitions

    def measure_task(self, task: str, batch: int) -> Row:
        """A task, `batch` conversations at a time."""
        prompts = [self._llm.encode_chat(talk) for talk in conversations(task, batch)]
        return self._measure(task, batch, prompts, SamplingParams(max_tokens=self._num_tokens))

    def measure_constructed(
        self, acceptances: Sequence[float], batch: int, second_guess: float | None = None
    ) -> list[Row]:
        """Drafts whose acceptance is set, of random prompts; beside what the formula foretells.

        second_guess: with a second chain, see `KnownAnswers`; None: without.
        """
        size = self._llm.engine.vocab_size
        rng = random.Random(0)
        prompts = [
            EncodedPrompt(None, [rng.randrange(size) for _ in range(32)]) for _ in range(batch)
        ]
        params = SamplingParams(max_tokens=self._num_tokens, ignore_eos=True, temperature=0.0)
        depth, usual = self._drafter.depth, self._drafter.settings
        num_branches = 1 if second_guess is None else 2
        known = {
            output.prompt_token_ids: output.outputs[0].token_ids
            for output in self._run(prompts, params, paused=True)[0]
        }
        rows: list[Row] = []
        try:
            for acceptance in (0.0, *acceptances):
                chance = second_guess or 0.0 if rows else 0.0  # at first all are wrong
                drafts = KnownAnswers(known, acceptance, chance)
                self._drafter.use(drafts, depth, adaptive=False, num_branches=num_branches)
                row = self._measure(f"{acceptance:g} right", batch, prompts, params)
                ratio = rows[0].step_ratio if rows else 1 / row.speed_up
                rows.append(_with_formula(row, acceptance, depth, ratio or 1.0, chance))
        finally:
            self._drafter.use(**usual)
        return rows

    def _measure(
        self, name: str, batch: int, prompts: Sequence[EncodedPrompt], params: SamplingParams
    ) -> Row:
        params = SamplingParams(
            max_tokens=params.max_tokens, ignore_eos=params.ignore_eos, temperature=0.0
        )
        expected, _, _ = self._run(prompts, params, paused=True)  # the prompts are cached now
        self._run(prompts, params, paused=False)  # and step times known
        plain, drafted, equal = [], [], True
        counts = [0, 0, 0, 0]  # of drafts: times, tokens, accepted; of all tokens
        for _ in range(self._repetitions):
            outputs, speed, _ = self._run(prompts, params, paused=True)
            plain.append(speed)
            outputs, speed, added = self._run(prompts, params, paused=False)
            drafted.append(speed)
            equal &= [o.outputs for o in outputs] == [o.outputs for o in expected]
            counts = [before + more for before, more in zip(counts, added, strict=True)]
        num_drafts, num_draft_tokens, num_accepted, num_tokens = counts
        return Row(
            task=name,
            batch=batch,
            num_drafts=num_drafts,
            acceptance=num_accepted / max(1, num_draft_tokens),
            tokens_per_step=num_tokens / max(1, num_tokens - num_accepted),
            plain_speed=statistics.median(plain),
            speed=statistics.median(drafted),
            speed_up=statistics.median([d / p for d, p in zip(drafted, plain, strict=True)]),
            equal=equal,
        )

    def _run(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, *, paused: bool
    ) -> tuple[list[RequestOutput], float, tuple[int, int, int, int]]:
        """Outputs, tokens a second, and the counts of `_measure`."""
        self._drafter.is_paused = paused
        before = self._llm.engine.stats()
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in prompts], params, progress=False
        )
        after = self._llm.engine.stats()
        first = min(output.metrics.first_token_time or 0.0 for output in outputs)
        last = max(output.metrics.finished_time for output in outputs)
        num_tokens = sum(output.metrics.num_output_tokens - 1 for output in outputs)
        added = (*_counts(before, after), num_tokens)
        return outputs, num_tokens / max(last - first, 1e-9), added


def _counts(before: EngineStats, after: EngineStats) -> tuple[int, int, int]:
    return (
        after.num_drafts - before.num_drafts,
        after.num_draft_tokens - before.num_draft_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )


def tokens_of_step(acceptance: float, num_drafts: int) -> float:
    """Tokens that a step brings if each draft, after right ones, is right with this probability."""
    return sum(acceptance**place for place in range(num_drafts + 1))


def _with_formula(
    row: Row, acceptance: float, num_drafts: int, step_ratio: float, second_guess: float
) -> Row:
    tokens = tokens_of_step(acceptance, num_drafts)
    tokens += (1 - acceptance) * second_guess * tokens_of_step(acceptance, num_drafts - 1)
    return Row(**{**asdict(row), "step_ratio": step_ratio, "foretold": tokens / step_ratio})


def bench_spec(
    llm: LLM,
    model: str,
    tasks: Sequence[str],
    batches: Sequence[int],
    acceptances: Sequence[float],
    num_tokens: int,
    repetitions: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    second_guess: float | None = None,
) -> SpecResult:
    """Every task, or every acceptance if there are any, at every batch size."""
    bench = SpecBench(llm, num_tokens, repetitions)
    rows: list[Row] = []
    for number, batch in enumerate(batches):
        if acceptances:
            progress(f"batch {batch}", number, len(batches))
            rows += bench.measure_constructed(acceptances, batch, second_guess)
        for place, task in enumerate(() if acceptances else tasks):
            progress(
                f"{task}, batch {batch}", number * len(tasks) + place, len(batches) * len(tasks)
            )
            rows.append(bench.measure_task(task, batch))
    config = llm.config.speculative_config
    return SpecResult(
        model,
        dict(vars(config)) if config is not None else {},
        num_tokens,
        repetitions,
        tuple(rows),
    )
