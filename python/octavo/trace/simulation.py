"""An engine over a device that computes nothing but advances a clock: to try a policy on a laptop.

The real scheduler, block manager and engine run; only the device and the clock are simulated. A
cost model of three numbers gives the time of a step, and the clock advances by it. Nothing depends
on the machine or the hour: the same log and options give the same figures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.config import RuntimeOptions
from octavo.engine.adjustments import Float32, LogitAdjustments
from octavo.engine.batch import Int32
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.engine.pooling import EMBED
from octavo.engine.request import FinishReason
from octavo.engine.search import Candidates, Move
from octavo.errors import InvalidArgumentError, QueueFullError
from octavo.sampling_params import SamplingParams
from octavo.trace.log_file import Step

# Simulated tokens have a vocabulary larger than any model's, so that no two blocks are equal unless
# the log says so.
SIMULATED_VOCABULARY = 2**31 - 1
STOP = 1  # the token that ends an answer
_NAMES = ("seed", "sample_index")  # of a row of a batch: whose it is

_ROUNDING = 2e-6  # seconds: times in a log are rounded to microseconds


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step: fixed, for each token computed, and for each token attended to.

    The three are the cost of reading the weights (and of Python), of the arithmetic, and of
    attention.
    """

    fixed: float = 5e-3
    per_token: float = 1e-4
    per_attended: float = 1e-8

    def seconds(self, num_tokens: int, num_attended: int) -> float:
        """The time of a step."""
        return self.fixed + self.per_token * num_tokens + self.per_attended * num_attended


def fit_costs(steps: Sequence[Step]) -> CostModel:
    """The cost model nearest to the measured steps, by least squares, with no number below 0.

    Raises InvalidArgumentError with fewer than 8 steps. If the steps have too few sizes to separate
    the three numbers, the smallest numbers that explain the measurements are taken.
    """
    if len(steps) < 8:
        raise InvalidArgumentError(
            f"the log has {len(steps)} steps; expected at least 8 to measure costs from: give "
            f"--fixed, --per-token and --per-attended"
        )
    rows = [(1.0, step.num_tokens, step.num_attended) for step in steps]
    seconds = np.array([step.seconds for step in steps])
    # Noise grows with a step's length, so long steps are weighted down, but still count for more.
    weights = 1.0 / np.sqrt(np.maximum(seconds, 1e-6))
    costs = _non_negative_least_squares(np.array(rows) * weights[:, None], seconds * weights)
    return CostModel(*costs)


def _non_negative_least_squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[float]:
    """Least squares over every subset of columns, the best whose solution has no negative entry.

    With three columns that is seven small problems, and exact.
    """
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)
    best: tuple[float, list[float]] = (float(b @ b), [0.0] * a.shape[1])
    for chosen in range(1, 1 << a.shape[1]):
        columns = [i for i in range(a.shape[1]) if chosen >> i & 1]
        x = np.linalg.lstsq(a[:, columns] / scale[columns], b, rcond=None)[0]
        error = float(np.sum((a[:, columns] / scale[columns] @ x - b) ** 2))
        if (x >= 0).all() and error < best[0] * (1 - 1e-9):
            full = [0.0] * a.shape[1]
            for column, value in zip(columns, x / scale[columns], strict=True):
                full[column] = float(value)
            best = (error, full)
    return best[1]


class SimulatedClock:
    """Seconds since the simulation began."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedRuntime:
    """Takes a native runtime's batches and advances the clock.

    It samples token 0, and STOP where the answer `sample_index` of the request with this seed gets
    as long as stops[seed, sample_index] says, prompt and answer together.
    """

    def __init__(self, costs: CostModel, clock: SimulatedClock) -> None:
        self.stops: dict[tuple[int, int], int] = {}
        self._costs = costs
        self._clock = clock
        self._sampled: Int32 = np.empty(0, np.int32)

    def make_batch(self, **arrays: Any) -> dict[str, Any]:
        """The batch as it is."""
        return arrays

    def submit(self, batch: dict[str, Any], *, sample: bool) -> int:
        """Compute a step: advance the clock."""
        new = np.diff(batch["row_starts"]).astype(np.int64)
        before = batch["context_lens"] - new
        num_attended = int((new * before + new * (new + 1) // 2).sum())
        self._clock.now += self._costs.seconds(len(batch["token_ids"]), num_attended)
        self._sampled = self._sample(batch)
        return 0

    def _sample(self, batch: dict[str, Any]) -> Int32:
        rows, starts = batch["logit_rows"], batch["row_starts"]
        tokens = np.zeros(len(rows), np.int32)
        if self.stops:
            of_row = np.searchsorted(starts, rows, side="right") - 1
            lengths = batch["context_lens"][of_row] - (starts[of_row + 1] - 1 - rows) + 1
            names = zip(*(batch["sampling"][name].tolist() for name in _NAMES), strict=True)
            ends = np.array([self.stops.get(name, 0) for name in names])
            tokens[lengths == ends] = STOP
        return tokens

    def sample(
        self,
        ticket: int,
        masks: Int32 | None = None,
        adjustments: LogitAdjustments | None = None,
    ) -> None:
        """Nothing to do."""

    def logits(self, ticket: int, rows: Int32) -> Float32:
        """There are none, and no request that asks for them."""
        raise NotImplementedError

    def set_logits(self, ticket: int, row: int, values: Float32) -> None:
        """As `logits`."""
        raise NotImplementedError

    def copy_blocks(self, kv_group: int, pairs: Int32) -> None:
        """Nothing to do: its time is negligible."""

    def wait(self, ticket: int) -> Any:
        """What was sampled, and one candidate for each beam of a search."""
        num_rows = len(self._sampled)
        return SimpleNamespace(
            token_ids=self._sampled,
            finite=np.ones(num_rows, np.bool_),
            top_token_ids=np.zeros((num_rows, 1), np.int32),
            top_logprobs=np.zeros((num_rows, 1), np.float32),
        )


class End(NamedTuple):
    """How long an answer was, and why it ended: "stop" or "length"."""

    num_output_tokens: int
    reason: FinishReason


class RecordedSearch:
    """Beams that fork as they did in a log; see `octavo.engine.search.Search`.

    ends: of the answers; () if the log does not have them: then the beams go on by themselves until
    they have max_tokens.
    """

    num_candidates = 1

    def __init__(
        self,
        num_beams: int,
        forks: Iterable[tuple[int, ...]],
        ends: tuple[End, ...],
        max_tokens: int,
    ) -> None:
        self.num_beams = num_beams
        self._forks = deque(forks)
        self._ends = ends
        self._num_left = max_tokens

    def advance(self, rows: Sequence[Candidates]) -> Sequence[Move]:
        """The next recorded fork; beams of one parent get different tokens."""
        self._num_left -= 1
        if self._forks:
            return [Move(parent, token) for token, parent in enumerate(self._forks.popleft())]
        if self._ends or not self._num_left:
            return []
        return [Move(beam, beam) for beam in range(len(rows))]

    def results(self) -> list[tuple[Sequence[int], FinishReason, float]]:
        """Answers of the recorded lengths."""
        ends = self._ends or (End(1, "length"),) * self.num_beams
        return [((0,) * end.num_output_tokens, end.reason, 0.0) for end in ends]


@dataclass(frozen=True)
class Arrival:
    """A request to simulate: when it comes, what it asks, and the length of its answers.

    blocks: numbers of its prompt's full blocks, equal where the tokens were. num_output_tokens: the
    most that an answer may have. abort_after: seconds from arrival until the client leaves; None:
    it stays. ends: of each answer; (): all have num_output_tokens. num_beams: of a search, whose
    beams fork as `forks` says: for each of the next beams, which one's tokens it takes over.
    """

    time: float
    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    n: int = 1
    priority: int = 0
    timeout: float | None = None
    blocks: tuple[int, ...] = ()
    abort_after: float | None = None
    ends: tuple[End, ...] = ()
    num_beams: int = 0
    forks: tuple[tuple[int, ...], ...] = ()


class Simulation:
    """An engine of these options over a simulated device.

    outputs: of the requests that have ended, by id. refused: those that found the queue full.
    log_block_size: tokens in each of `Arrival.blocks`; None: options.block_size. kv_windows: of the
    model's KV groups, see `Engine`.
    """

    def __init__(
        self,
        options: RuntimeOptions,
        num_blocks: int,
        costs: CostModel,
        log_block_size: int | None = None,
        kv_windows: tuple[int, ...] = (0,),
    ) -> None:
        self.clock = SimulatedClock()
        self._runtime = runtime = SimulatedRuntime(costs, self.clock)
        self.engine = Engine(
            runtime,
            options,
            num_kv_blocks=num_blocks,
            vocab_size=SIMULATED_VOCABULARY,
            kv_windows=kv_windows,
            make_batch=runtime.make_batch,
            clock=self.clock,
        )
        self.outputs: dict[str, RequestOutput] = {}
        self.refused: list[str] = []
        self._log_block_size = log_block_size or options.block_size
        self._num_arrived = 0
        self._aborts: list[tuple[float, str]] = []  # a heap: time, and request

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """Add the requests at their times, and step until all have ended."""
        pending = deque(sorted(arrivals, key=lambda arrival: arrival.time))
        while pending or self.engine.has_unfinished_requests:
            if not self.engine.has_unfinished_requests:
                self.clock.now = max(self.clock.now, pending[0].time)
            while pending and pending[0].time <= self.clock.now + _ROUNDING:
                self._arrive(pending.popleft())
            while self._aborts and self._aborts[0][0] <= self.clock.now + _ROUNDING:
                _, request_id = heappop(self._aborts)
                if (output := self.engine.abort(request_id)) is not None:
                    self.outputs[request_id] = output
            for chunk in self.engine.step():
                if chunk.result is not None:
                    self.outputs[chunk.request_id] = chunk.result

    def _arrive(self, arrival: Arrival) -> None:
        """Queue a request, or note that it was refused."""
        self._num_arrived += 1
        size = self._log_block_size
        prompt = [block * size + i for block in arrival.blocks for i in range(size)]
        prompt = prompt[: arrival.num_prompt_tokens]
        # A block that is not full is not shared: a token from the vocabulary's other end.
        tail = SIMULATED_VOCABULARY - 1 - self._num_arrived
        prompt += [tail] * (arrival.num_prompt_tokens - len(prompt))
        params, search = self._params_of(arrival)
        # It came while the last step ran, and is noticed after it, as in a server's loop.
        now, self.clock.now = self.clock.now, arrival.time
        try:
            self.engine.add_request(
                arrival.request_id,
                prompt,
                params,
                priority=arrival.priority,
                timeout=arrival.timeout,
                search=search,
            )
        except QueueFullError:
            self.refused.append(arrival.request_id)
        else:
            if arrival.abort_after is not None:
                heappush(self._aborts, (arrival.time + arrival.abort_after, arrival.request_id))
        finally:
            self.clock.now = now

    def _params_of(self, arrival: Arrival) -> tuple[SamplingParams, RecordedSearch | None]:
        if not arrival.num_output_tokens:  # its prompt was scored, or embedded
            return replace(EMBED, n=arrival.n), None
        lengths = [end.num_output_tokens for end in arrival.ends] or [arrival.num_output_tokens]
        # No more than this cache holds, which may be smaller than the log's.
        length = arrival.num_prompt_tokens
        room = self.engine.scheduler.max_total_tokens(length, None) - length
        max_tokens = max(min(arrival.num_output_tokens, room), *lengths, 1)
        seed = self._num_arrived
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            n=arrival.n,
            ignore_eos=True,
            seed=seed,
            stop_token_ids=(STOP,),
        )
        if arrival.num_beams:
            return params, RecordedSearch(
                arrival.num_beams, arrival.forks, arrival.ends, max_tokens
            )
        for index, end in enumerate(arrival.ends):
            if end.reason == "stop":
                self._runtime.stops[seed, index] = length + end.num_output_tokens
        return params, None
