"""A fake runtime whose next token is a pure function of all tokens before it.

It keeps tokens where a real one keeps keys and values: in the slots of paged blocks, which all KV
groups share. The history it draws from is read back through the block tables, so a wrong table, a
slot written by somebody else, a chunk left out or a position repeated gives wrong tokens; slots
that were never written, or handed to another sequence meanwhile, are found out at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.config import RuntimeOptions
from octavo.reference.sampling import SAMPLING_ROW

VOCAB = 97
EOS = 5
NAN_TOKEN = 96  # a sequence that holds it has logits that are not finite
EMPTY = -7
ROPE_MARK = 500


@dataclass
class FakeBatch:
    """The arguments of `_native.Batch`, kept as they are."""

    token_ids: npt.NDArray[Any]
    row_starts: npt.NDArray[Any]
    context_lens: npt.NDArray[Any]
    block_tables: npt.NDArray[Any]
    logit_rows: npt.NDArray[Any]
    sampling: npt.NDArray[np.void]
    adapter_ids: npt.NDArray[Any] | None = None
    rope_sets: npt.NDArray[Any] | None = None

    def adapter_of(self, s: int) -> int:
        """The place of a sequence's adapter."""
        return -1 if self.adapter_ids is None else int(self.adapter_ids[s])

    def rope_set_of(self, s: int) -> int:
        """The set of rope frequencies of a sequence."""
        return 0 if self.rope_sets is None else int(self.rope_sets[s])


@dataclass
class FakeOutput:
    """What `_native.StepOutput` has."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_token_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    finite: npt.NDArray[np.bool_]


def draw(
    history: Sequence[int],
    sampling: tuple[float, int, float, float],
    seed: int,
    sample_index: int,
    forbidden: frozenset[int] = frozenset(),
) -> tuple[int, float]:
    """The fake model: (next token, its log-probability), from everything it may depend on."""
    temperature, top_k, top_p, min_p = sampling
    key: tuple[Any, ...] = (*history, -1)
    if temperature > 0:
        kept = top_k if top_k < VOCAB else 0  # to keep more than there are is to keep all
        options = (np.float32(temperature), kept, np.float32(top_p), np.float32(min_p))
        key += (*(float(option) for option in options), seed, sample_index)
    number = hash(key)  # of numbers only: the same in every process
    token = number % (VOCAB - 1)  # NAN_TOKEN comes in prompts only
    while token in forbidden:
        token = (token + 1) % (VOCAB - 1)
    return token, float(np.float32(-((number >> 16) % 1000) / 128))


def target_logprob(history: Sequence[int], target: int) -> float:
    """The fake model's log-probability of a token that is given."""
    return float(np.float32(-(hash((*history, -3, target)) % 1000) / 64))


def rank_of(history: Sequence[int], token: int) -> int:
    """The fake model's rank of a token."""
    return hash((*history, -4, token)) % VOCAB + 1


def top_tokens(history: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The fake model's most probable tokens and their log-probabilities."""
    first = hash((*history, -2)) % VOCAB
    tokens = tuple((first + 3 * rank) % VOCAB for rank in range(count))
    return tokens, tuple(float(np.float32(-0.5 * rank - first / 64)) for rank in range(count))


@dataclass
class FakeRuntime:
    """Has the calls of `_native.Runtime` that the engine uses, and checks every batch.

    kv_windows: of each KV group; the first has none, so that it holds the whole history.
    """

    options: RuntimeOptions
    num_blocks: int
    kv_windows: tuple[int, ...] = (0,)
    max_tokens_seen: int = 0
    num_tokens_computed: int = 0
    num_copies: int = 0
    batches: list[FakeBatch] = field(default_factory=list)
    max_in_flight: int = 0
    fail_next: Exception | None = None  # in `sample`, and a `submit` that draws
    fail_wait: Exception | None = None  # in `wait`
    # By place: the fake model with an adapter is another model, and its slots show whose they are.
    adapters: dict[int, int] = field(default_factory=dict)
    loads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Of each slot the token, its position, and the group that wrote it.
        self.slots = np.full((self.num_blocks, self.options.block_size, 3), EMPTY, np.int64)
        self.sampled = np.full(self.options.max_num_seqs, EMPTY, np.int64)  # by state row
        self._open: dict[int, FakeBatch] = {}
        self._drawn: dict[int, FakeOutput] = {}
        self._next_ticket = 0

    def submit(self, batch: FakeBatch, *, sample: bool) -> int:
        assert len(self._open) < 2, "two tickets are in flight already"
        assert not (self._open.keys() - self._drawn.keys()), "a step is not sampled yet"
        unknown = batch.token_ids < 0
        batch.token_ids = batch.token_ids.copy()
        batch.token_ids[unknown] = self.sampled[-1 - batch.token_ids[unknown]]
        self._check(batch)
        for s in range(len(batch.context_lens)):
            self._write(batch, s)
        self.batches.append(batch)
        self._next_ticket += 1
        self._open[self._next_ticket] = batch
        self.max_in_flight = max(self.max_in_flight, len(self._open))
        if sample:
            try:
                self.sample(self._next_ticket)
            except Exception:
                del self._open[self._next_ticket]
                raise
        return self._next_ticket

    def load_adapter(self, slot: int, matrices: Any) -> None:
        assert 0 <= slot < self.options.max_adapters and slot not in self.adapters
        self.adapters[slot] = int(matrices["embed"][0][0, 0])
        self.loads.append(self.adapters[slot])

    def unload_adapter(self, slot: int) -> None:
        del self.adapters[slot]

    def copy_blocks(self, kv_group: int, pairs: npt.NDArray[np.int32]) -> None:
        assert pairs.dtype == np.int32 and pairs.shape[1:] == (2,)
        for source, destination in pairs.tolist():
            assert self.slots[source, 0, 2] == kv_group
            self.slots[destination] = self.slots[source]
        self.num_copies += len(pairs)

    def sample(
        self, ticket: int, masks: npt.NDArray[np.int32] | None = None, adjustments: Any = None
    ) -> None:
        assert adjustments is None, "the fake model has no logits: test adjustments on a real one"
        assert ticket in self._open and ticket not in self._drawn
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self._drawn[ticket] = self._draw(self._open[ticket], masks)

    def wait(self, ticket: int) -> FakeOutput:
        assert ticket == min(self._open), "steps end in the order in which they were submitted"
        self._open.pop(ticket)
        if self.fail_wait is not None:
            error, self.fail_wait = self.fail_wait, None
            raise error
        return self._drawn.pop(ticket)

    def _draw(self, batch: FakeBatch, masks: Any) -> FakeOutput:
        num_rows = len(batch.logit_rows)
        num_top = max([0, *batch.sampling["num_logprobs"].tolist()])
        output = FakeOutput(
            np.zeros(num_rows, np.int32),
            np.full(num_rows, np.nan, np.float32),
            np.zeros(num_rows, np.int32),
            np.full((num_rows, num_top), -1, np.int32),
            np.full((num_rows, num_top), np.nan, np.float32),
            np.ones(num_rows, np.bool_),
        )
        for row, position in enumerate(batch.logit_rows.tolist()):
            self._draw_row(batch, row, position, None if masks is None else masks[row], output)
            state_row = batch.sampling["state_row"][row]
            if state_row >= 0:
                self.sampled[state_row] = output.token_ids[row]
        return output

    def _draw_row(
        self, batch: FakeBatch, row: int, token_row: int, mask: Any, output: FakeOutput
    ) -> None:
        s = int(np.searchsorted(batch.row_starts, token_row, side="right")) - 1
        behind = int(batch.row_starts[s + 1]) - 1 - token_row
        history = self._read(batch, s, int(batch.context_lens[s]) - behind)
        is_long = 0 < self.options.rope_switch < len(history)
        assert batch.rope_set_of(s) == is_long, "rope frequencies of another length"
        if batch.adapter_of(s) >= 0:
            history = (-self.adapters[batch.adapter_of(s)], *history)
        forbidden = frozenset(
            t for t in range(VOCAB) if mask is not None and not (int(mask[t // 32]) >> (t % 32)) & 1
        )
        options = dict(zip(SAMPLING_ROW.names or (), batch.sampling[row].item(), strict=True))
        sampling = tuple(options[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        seed, sample_index = options["seed"], options["sample_index"]
        token, logprob = draw(history, sampling, seed, sample_index, forbidden)
        target = options["target"]
        if target >= 0:
            token, logprob = target, target_logprob(history, target)
        output.token_ids[row] = token
        output.finite[row] = NAN_TOKEN not in history
        count = options["num_logprobs"]
        if count >= 0:
            output.logprobs[row] = logprob
            output.ranks[row] = rank_of(history, token)
            ids, logprobs = top_tokens(history, count)
            output.top_token_ids[row, :count] = ids
            output.top_logprobs[row, :count] = logprobs

    def _mark(self, batch: FakeBatch, s: int) -> int:
        """What a sequence's keys show beside the token: whose they are."""
        slot = batch.adapter_of(s)
        of_rope = ROPE_MARK * batch.rope_set_of(s)
        return of_rope if slot < 0 else of_rope + 1000 * self.adapters[slot]

    def _slots(self, batch: FakeBatch, s: int, stop: int) -> list[list[tuple[int, int]]]:
        size = self.options.block_size
        return [
            [(int(batch.block_tables[group, s, p // size]), p % size) for p in range(stop)]
            for group in range(len(self.kv_windows))
        ]

    def _write(self, batch: FakeBatch, s: int) -> None:
        tokens = batch.token_ids[batch.row_starts[s] : batch.row_starts[s + 1]].tolist()
        context, mark = int(batch.context_lens[s]), self._mark(batch, s)
        for group, slots in enumerate(self._slots(batch, s, context)):
            for position, token in enumerate(tokens, context - len(tokens)):
                assert slots[position][0] >= 0, "a new token has no block"
                self.slots[slots[position]] = token + mark, position, group

    def _read(self, batch: FakeBatch, s: int, stop: int) -> tuple[int, ...]:
        histories = []
        for group, slots in enumerate(self._slots(batch, s, stop)):
            window = self.kv_windows[group]
            seen = slots[max(0, stop - window) if window else 0 :]
            assert min(block for block, _ in seen) >= 0, "a block is gone that a token sees"
            found = [self.slots[slot].tolist() for slot in seen]
            places = [(position, group) for position in range(stop - len(seen), stop)]
            assert [(p, g) for _, p, g in found] == places, f"stale or foreign slots: {found}"
            history = tuple(token - self._mark(batch, s) for token, _, _ in found)
            assert all(0 <= token < VOCAB for token in history), "keys of another adapter or rope"
            histories.append(history)
        whole = histories[0]
        assert all(h == whole[len(whole) - len(h) :] for h in histories), "the groups disagree"
        return whole

    def _check(self, batch: FakeBatch) -> None:
        options = self.options
        num_seqs = len(batch.context_lens)
        assert 1 <= num_seqs <= options.max_num_seqs
        assert 1 <= len(batch.token_ids) <= options.max_num_batched_tokens
        self.num_tokens_computed += len(batch.token_ids)
        self.max_tokens_seen = max(self.max_tokens_seen, len(batch.token_ids))
        assert batch.row_starts[0] == 0 and batch.row_starts[-1] == len(batch.token_ids)
        assert (np.diff(batch.row_starts) > 0).all()
        assert (np.diff(batch.logit_rows) > 0).all()
        assert ((batch.token_ids >= 0) & (batch.token_ids < VOCAB)).all()
        assert (batch.context_lens <= options.max_model_len).all()
        assert batch.block_tables.shape[:2] == (len(self.kv_windows), num_seqs)
        for optional in (batch.adapter_ids, batch.rope_sets):
            assert optional is None or optional.shape == (num_seqs,)
        for name, array in vars(batch).items():
            if name in ("adapter_ids", "rope_sets") and array is None:
                continue
            assert array.dtype == (SAMPLING_ROW if name == "sampling" else np.int32), name
            assert array.flags.c_contiguous, name
        used = [block for block in batch.block_tables.ravel().tolist() if block != -1]
        assert all(0 <= block < self.num_blocks for block in used)
        for s in range(num_seqs):
            own = [block for block in batch.block_tables[:, s].ravel().tolist() if block != -1]
            assert len(own) == len(set(own))
            num_new = int(batch.row_starts[s + 1] - batch.row_starts[s])
            first_written = (int(batch.context_lens[s]) - num_new) // options.block_size
            for block in batch.block_tables[:, s, first_written:].ravel().tolist():
                assert block == -1 or used.count(block) == 1, "a block is written that others read"
