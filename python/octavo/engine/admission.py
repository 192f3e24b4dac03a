"""What a request must be to be accepted, how many may wait at once, and how long each may live."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

from octavo.errors import InvalidArgumentError, QueueFullError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.config import RuntimeOptions
    from octavo.engine.scheduler import Scheduler

MAX_PRIORITY = 2**31 - 1
_PART = "#"  # in no id that a server gives or takes


def part_id(request_id: str, index: int) -> str:
    """What one of several prompts of a request is called; they are admitted as one."""
    return f"{request_id}{_PART}{index}"


def whole_id(request_id: str) -> str:
    """The request that this is a part of; "" where it is none."""
    return request_id.rpartition(_PART)[0]


class _Unstarted(NamedTuple):
    num_tokens: int
    num_answers: int
    num_schedules: int  # before it came


class AdmissionLimits:
    """Holds the requests that have been accepted and not yet started, and bounds how many wait.

    A request waits where the next step has no place for it, or where a step has already left it, or
    one before it, waiting. So as many as there are places may come together, whatever the limits,
    `max_waiting_requests` and `max_waiting_tokens` of the options. One that was started and
    preempted does not count: it was accepted before.
    """

    def __init__(self, options: RuntimeOptions, scheduler: Scheduler) -> None:
        self._max_requests = options.max_waiting_requests
        self._max_tokens = options.max_waiting_tokens
        self._scheduler = scheduler
        self.num_tokens = 0  # of the prompts of those that have not started
        self._unstarted: dict[str, _Unstarted] = {}
        self._last_whole = ""  # the request of several parts that was admitted last

    @property
    def num_requests(self) -> int:
        """Requests that have not started."""
        return len(self._unstarted)

    def admit(
        self, request_id: str, num_tokens: int, num_answers: int = 1, part_of: str = ""
    ) -> None:
        """Accept a request of so many prompt tokens, or raise a QueueFullError.

        When no request waits, any is accepted, even one longer than max_waiting_tokens: otherwise
        it never could be. num_answers: each needs a place. part_of: a request whose parts come one
        after another. The first of them decides for all, so that it is not refused for what it
        brings itself.
        """
        has_limits = self._max_requests is not None or self._max_tokens is not None
        if has_limits and (not part_of or part_of != self._last_whole):
            self._check(num_tokens)
        self._last_whole = part_of
        number = self._scheduler.num_schedules
        self._unstarted[request_id] = _Unstarted(num_tokens, num_answers, number)
        self.num_tokens += num_tokens

    def _check(self, num_tokens: int) -> None:
        waiting = self._waiting()
        most, most_tokens = self._max_requests, self._max_tokens
        is_full = most is not None and len(waiting) >= most
        is_over = most_tokens is not None and sum(waiting) + num_tokens > most_tokens
        if is_full or (is_over and waiting):
            raise QueueFullError(len(waiting), sum(waiting), most, most_tokens, num_tokens)

    def _waiting(self) -> list[int]:
        """The prompt tokens of each request that waits."""
        num_places, waiting = self._scheduler.num_places, list[int]()
        for each in self._unstarted.values():
            num_places -= each.num_answers
            if num_places < 0 or waiting or each.num_schedules < self._scheduler.num_schedules:
                waiting.append(each.num_tokens)
        return waiting

    def remove(self, request_id: str) -> None:
        """The request has started or ended; harmless for one that is not known."""
        if (found := self._unstarted.pop(request_id, None)) is not None:
            self.num_tokens -= found.num_tokens


class Deadlines:
    """When requests must end, soonest first; times in seconds of the engine's clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._deadlines: dict[str, float] = {}

    def add(self, request_id: str, deadline: float) -> None:
        """Note when a request must end."""
        self._deadlines[request_id] = deadline
        heapq.heappush(self._heap, (deadline, request_id))

    def remove(self, request_id: str) -> None:
        """The request has ended; harmless for one that had no deadline."""
        self._deadlines.pop(request_id, None)
        # Its entry in the heap is dropped at its time, or now if most entries are of this kind.
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [(time, name) for name, time in self._deadlines.items()]
            heapq.heapify(self._heap)

    def expired(self, now: float) -> list[str]:
        """The requests whose deadline has passed; they are removed from here."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            deadline, request_id = heapq.heappop(self._heap)
            if self._deadlines.get(request_id) == deadline:
                del self._deadlines[request_id]
                found.append(request_id)
        return found


def check_tokens(
    prompt_token_ids: SequenceOf[int],
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: Collection[int],
) -> None:
    """Raise an InvalidArgumentError for a token id that the model does not have, and no params."""
    if not isinstance(params, SamplingParams):
        raise InvalidArgumentError(f"params is {params!r}; expected SamplingParams(...)")
    is_plain = set(map(type, prompt_token_ids)) == {int}  # a long prompt is checked in microseconds
    if not (is_plain and min(prompt_token_ids) >= 0 and max(prompt_token_ids) < vocab_size):
        for position, token in enumerate(prompt_token_ids):
            _check_token(f"token {position} of the prompt", token, vocab_size)
    for token in params.stop_token_ids:
        _check_token("an entry of stop_token_ids", token, vocab_size)
    for token in params.allowed_token_ids or ():
        _check_token("an entry of allowed_token_ids", token, vocab_size)
    for token in dict(params.logit_bias):
        _check_token("a token id of logit_bias", token, vocab_size)
    own = () if params.ignore_eos else eos_token_ids
    if params.min_tokens and len(set(params.stop_token_ids).union(own)) >= vocab_size:
        raise InvalidArgumentError(
            f"min_tokens is {params.min_tokens}, but stop_token_ids holds every token of the "
            f"vocabulary: no token is left to sample"
        )


def check_scheduling(priority: int, timeout: float | None) -> None:
    """Raise an InvalidArgumentError for an impossible priority or timeout."""
    is_integer = isinstance(priority, int) and not isinstance(priority, bool)
    if not is_integer or abs(priority) > MAX_PRIORITY:
        raise InvalidArgumentError(
            f"priority is {priority!r}; expected an integer from -{MAX_PRIORITY} to "
            f"{MAX_PRIORITY} (lower is more urgent, 0 is usual)"
        )
    if timeout is not None and not (
        isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0
    ):
        raise InvalidArgumentError(
            f"timeout is {timeout!r}; expected a number of seconds above 0, or None for no limit"
        )


def _check_token(what: str, token: int, vocab_size: int) -> None:
    try:
        value = operator.index(token)
    except TypeError:
        raise InvalidArgumentError(f"{what} is {token!r}; expected an integer") from None
    if not 0 <= value < vocab_size:
        raise InvalidArgumentError(
            f"{what} is {value}; expected 0 to {vocab_size - 1}, the model's vocabulary"
        )
