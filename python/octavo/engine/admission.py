"""What bounds a request's wait: how many may wait at once, and how long each may live."""

from __future__ import annotations

import heapq

from octavo.errors import QueueFullError


class AdmissionLimits:
    """Counts the requests that have been accepted and not yet started.

    A request that was started and preempted does not count: it will not be refused any more.
    max_requests, max_tokens: the limits, of requests and of prompt tokens; None for none.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._tokens: dict[str, int] = {}

    @property
    def num_requests(self) -> int:
        """Requests that have not started."""
        return len(self._tokens)

    def enter(self, request_id: str, num_tokens: int) -> None:
        """Let a request of so many prompt tokens in, or raise a QueueFullError.

        An empty room takes any request, however long: it could never get in otherwise.
        """
        is_full = self.max_requests is not None and self.num_requests >= self.max_requests
        is_over = self.max_tokens is not None and self.num_tokens + num_tokens > self.max_tokens
        if is_full or (is_over and self._tokens):
            raise QueueFullError(
                self.num_requests, self.num_tokens, self.max_requests, self.max_tokens, num_tokens
            )
        self._tokens[request_id] = num_tokens
        self.num_tokens += num_tokens

    def leave(self, request_id: str) -> None:
        """The request has started or ended; harmless when it has left before."""
        self.num_tokens -= self._tokens.pop(request_id, 0)


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
        # What is left of it in the heap goes when its time comes, or now if it is most of the heap.
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [(time, name) for name, time in self._deadlines.items()]
            heapq.heapify(self._heap)

    def expired(self, now: float) -> list[str]:
        """The requests whose time is up, and no longer noted here."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            deadline, request_id = heapq.heappop(self._heap)
            if self._deadlines.get(request_id) == deadline:
                del self._deadlines[request_id]
                found.append(request_id)
        return found
