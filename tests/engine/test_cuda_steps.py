"""What a step costs the host on the CUDA backend, and where the memory for it comes from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, emulated, needs_cuda
from runtime_helpers import VOCAB, make_batch, tiny_runtime, tiny_spec

from octavo import _native
from octavo.models.spec import ModelSpec

pytestmark = needs_cuda

PROMPT = [5, 17, 80, 3, 3, 41, 9, 60, 22, 7, 55, 1, 33, 70, 12, 48, 29, 64, 2]
SPEC = tiny_spec(num_heads=4, num_kv_heads=2, head_dim=64)


def cuda_runtime(spec: ModelSpec = SPEC, **fields: Any) -> _native.Runtime:
    return tiny_runtime(spec, device=DEVICE, **fields)


def sequences(count: int, new: int = 1, cached: int = 0) -> list[Any]:
    """`count` sequences of `new` tokens each, with two blocks of their own."""
    return [
        ([(7 * s + i) % VOCAB for i in range(new)], cached, [2 * s, 2 * s + 1])
        for s in range(count)
    ]


def counts_of(runtime: _native.Runtime, work: Any) -> dict[str, int]:
    before = runtime.counts()
    work()
    return {name: count - before[name] for name, count in runtime.counts().items()}


NOTHING = dict.fromkeys(("kernels", "recorded", "replayed", "forgotten", "uploads", "downloads"), 0)
ONE_GRAPH = {**NOTHING, "replayed": 1, "uploads": 1, "downloads": 1}


@pytest.mark.parametrize("num_seqs", [1, 3])
def test_a_plain_recorded_step_is_a_copy_a_graph_and_a_copy_back(num_seqs: int) -> None:
    runtime = cuda_runtime(dtype="bf16")

    def step() -> None:
        runtime.step(make_batch(sequences(num_seqs)))

    kernels = counts_of(runtime, step)["kernels"]
    assert kernels > 0
    # Recorded: every kernel is launched into the recording, once, and then all of them at once.
    assert counts_of(runtime, step) == {**ONE_GRAPH, "kernels": kernels, "recorded": 1}
    for _ in range(3):
        assert counts_of(runtime, step) == ONE_GRAPH


def test_a_masked_step_is_a_graph_and_the_sampling() -> None:
    """The masks are made while the forward pass runs; without any the sampling is recorded, too."""
    runtime = cuda_runtime(dtype="bf16")
    masks = np.full((1, -(-VOCAB // 32)), -1, np.int32)

    def step(masks: Any) -> None:
        ticket = runtime.submit(make_batch(sequences(1)))
        runtime.sample(ticket, masks)
        runtime.wait(ticket)

    for _ in range(3):
        found = counts_of(runtime, lambda: step(masks))
    assert found["kernels"] > 0
    assert found == {**ONE_GRAPH, "kernels": found["kernels"], "uploads": 2}
    for _ in range(3):
        found = counts_of(runtime, lambda: step(None))
    assert found == {**ONE_GRAPH, "replayed": 2}


def test_rows_are_copied_only_where_they_differ_from_the_tokens() -> None:
    runtime = cuda_runtime(dtype="bf16", graphs=False)

    def kernels(rows: Sequence[int] | None) -> int:
        batch = make_batch(sequences(2, new=2), rows)
        return counts_of(runtime, lambda: runtime.wait(runtime.submit(batch)))["kernels"]

    assert kernels([1, 3]) == kernels([0, 1, 2, 3]) + 1


def test_all_memory_is_taken_at_the_start() -> None:
    """Growing batches, longer contexts, log-probabilities, masks: no buffer grows."""
    runtime = cuda_runtime(dtype="bf16", num_blocks=128)
    tickets = deque([runtime.submit(make_batch(sequences(1)), sample=True)])
    masks = np.full((8, -(-VOCAB // 32)), -1, np.int32)
    for num_seqs, context, wanted in product((1, 2, 3, 5, 8), (0, 200), (-1, 20)):
        new = [([s, 9], context, range(16 * s, 16 * s + 16)) for s in range(num_seqs)]
        batch = make_batch(new, num_logprobs=wanted)
        for _ in range(4):  # two in flight, each of which records its steps
            tickets.append(runtime.submit(batch, sample=True))
            runtime.wait(tickets.popleft())
        tickets.append(runtime.submit(batch))
        runtime.sample(tickets[-1], masks[:num_seqs])
        runtime.wait(tickets.popleft())
    runtime.wait(tickets.popleft())
    runtime.step(make_batch(sequences(7, new=18)))
    assert runtime.allocations() == 0
    counts = runtime.counts()
    assert counts["recorded"] >= 2 * 5 and counts["forgotten"] == 0


def test_a_step_with_more_rows_than_sequences_grows_once_and_records_anew() -> None:
    runtime = cuda_runtime(dtype="bf16")

    def decode() -> list[int]:
        return [int(runtime.step(make_batch(sequences(1))).token_ids[0]) for _ in range(3)]

    expected = decode()
    before = runtime.memory()["workspace"]
    runtime.step(make_batch(sequences(1, new=19), range(19)))
    grown = runtime.allocations()
    assert grown > 0 and runtime.counts()["forgotten"] == 1
    assert runtime.memory()["workspace"] > before
    assert decode() == expected
    runtime.step(make_batch(sequences(1, new=19), range(19)))
    assert runtime.allocations() == grown and runtime.counts()["forgotten"] == 1


NO_MEMORY_LEFT = """
from bisect import bisect
from runtime_helpers import make_batch, tiny_runtime, tiny_spec

spec = tiny_spec(num_heads=4, num_kv_heads=2, head_dim=64)
runtime = tiny_runtime(spec, device="cuda_emulated", dtype="bf16")

def lacks_memory(blocks):
    try:
        runtime.alloc_kv(blocks)
    except MemoryError:
        return True
    return False

most = bisect(range(1, 1 << 14), False, key=lacks_memory)
assert not lacks_memory(most)  # and less than a block is left: 16 KiB

def decode():
    return [int(runtime.step(make_batch([([7], 0, [0])])).token_ids[0]) for _ in range(3)]

expected = decode()
for _ in range(2):
    try:
        runtime.step(make_batch([(range(80), 0, range(5))], range(80)))
    except MemoryError as error:
        print(str(error).partition("; ")[2])
    assert decode() == expected
"""


@pytest.mark.skipif(DEVICE != "cuda_emulated", reason="a GPU has as much as it has")
def test_a_step_for_which_memory_is_lacking_leaves_the_next_ones_right() -> None:
    """What was recorded read the logits' old place, which is given back before the new is asked."""
    shown = emulated(NO_MEMORY_LEFT, "MEMORY_KIB", 96 << 10)
    said = "1 MiB were asked for: lower kv_memory_fraction"
    assert [line.partition(",")[0] for line in shown.splitlines()] == [said, said], shown


def test_steps_are_padded_within_the_memory_that_was_taken() -> None:
    """Five sequences would be padded to eight: with tokens enough for seven and for five."""
    for limits in ({"max_num_seqs": 7}, {"max_num_batched_tokens": 15}):
        runtime = cuda_runtime(dtype="bf16", **limits)
        batch = make_batch(sequences(5, new=3))
        expected = cuda_runtime(dtype="bf16", graphs=False).step(batch).token_ids
        for _ in range(3):
            assert (runtime.step(batch).token_ids == expected).all()
        assert runtime.counts()["replayed"] == 2


def test_logits_are_found_where_padding_put_them() -> None:
    """Three, one and two tokens are padded in front to four each; rows keep their own order."""

    def filled(**fields: Any) -> _native.Runtime:
        runtime = cuda_runtime(**fields)
        runtime.step(make_batch(sequences(3, new=9)))
        return runtime

    new = [([s + 3, 70, 11][:count], 9, [2 * s, 2 * s + 1]) for s, count in enumerate((3, 1, 2))]
    batch = make_batch(new, range(6))
    plain = filled(graphs=False)
    ticket = plain.submit(batch)
    expected = plain.logits(ticket)
    plain.wait(ticket)
    assert len(np.unique(expected, axis=0)) == 6
    padded = filled()
    for _ in range(3):
        ticket = padded.submit(batch, sample=True)
        assert np.array_equal(padded.logits(ticket), expected)
        assert np.array_equal(padded.logits(ticket, np.array([4, 0], np.int32)), expected[[4, 0]])
        assert (padded.wait(ticket).token_ids == expected.argmax(axis=1)).all()
    assert padded.counts()["replayed"] == 2


def test_a_new_cache_makes_recorded_steps_void() -> None:
    runtime = cuda_runtime(dtype="bf16", num_blocks=20)

    def decode() -> list[list[float]]:
        found = [runtime.step(make_batch([(PROMPT, 0, [3, 1])]))]
        for step in range(4):
            token = [int(found[-1].token_ids[0])]
            found.append(runtime.step(make_batch([(token, 19 + step, [3, 1])], num_logprobs=0)))
        return [[float(output.token_ids[0]), float(output.logprobs[0])] for output in found[1:]]

    expected = decode()
    assert runtime.counts()["replayed"] > 0
    for num_blocks in (37, 5):
        runtime.alloc_kv(num_blocks)
        assert decode() == expected
    assert runtime.counts()["forgotten"] == 2


def test_growing_adjustments_leave_recorded_steps_alone() -> None:
    """Penalties name more tokens every step: now and then their buffer grows, and nothing else."""
    runtime = cuda_runtime(dtype="bf16")
    for _ in range(3):
        expected = runtime.step(make_batch(sequences(1))).token_ids
    recorded = runtime.counts()["recorded"]
    for count in range(1, VOCAB, 9):
        tokens = np.arange(count, dtype=np.int32)
        ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
        ticket = runtime.submit(make_batch(sequences(1)))
        runtime.sample(ticket, None, (np.array([0, count], np.int32), tokens, ones, zeros))
        assert runtime.wait(ticket).token_ids == expected
    assert 0 < runtime.allocations() <= 2 * 3
    counts = runtime.counts()
    assert counts["forgotten"] == 0 and counts["recorded"] == recorded + 1  # the forward pass alone
