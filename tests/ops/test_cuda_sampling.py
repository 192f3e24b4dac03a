"""The CUDA sampler against the reference: exactly the same tokens, whatever is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_helpers import needs_cuda
from cuda_sampling_helpers import check, cuda, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference_helpers import same_bits, uniform
from sampling_helpers import changed, check_targets, make_rows, random_masks

from octavo.reference import sampling

pytestmark = needs_cuda


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 257, 5003])
def test_tokens_equal_the_reference(vocab: int, masked: bool) -> None:
    rows = 150 if vocab < 5000 else 50
    masks = random_masks(vocab, rows, vocab) if masked else None
    tokens = check(make_rows(vocab, rows, vocab), masks)
    assert vocab < 30 or len(set(tokens.tolist())) > 20  # not all the same


@pytest.mark.parametrize(
    ("vocab", "rows"), [(4097, 3), (49152, 1), (49152, 12), (128256, 5), (200_003, 3)]
)
def test_rows_shared_by_several_blocks(vocab: int, rows: int) -> None:
    check(make_rows(vocab + rows, rows, vocab), random_masks(vocab, rows, vocab))


def test_many_seeds_positions_and_temperatures() -> None:
    """Plain random draws, whose noise alone decides."""
    rng = np.random.default_rng(1)
    logits = uniform(1, 1, 300).repeat(200, axis=0)
    tokens = check(
        requests(
            logits,
            temperature=rng.uniform(0.05, 3, 200),
            seed=rng.integers(0, 2**64, 200, dtype=np.uint64),
            sample_index=rng.integers(0, 9, 200),
            position=rng.integers(0, 2**31 - 1, 200),
        )
    )
    assert len(set(tokens.tolist())) > 50


# Where filters are hard: nearly equal logits, so that many tokens stay; equal ones, so that only
# their ids decide; and both beside a few that stand out.
HARD = {
    "flat": lambda vocab: uniform(3, 1, vocab) * np.float32(1e-3),
    "flatter than float32": lambda vocab: np.float32(1000) + uniform(3, 1, vocab) * 1e-3,
    "wide": lambda vocab: uniform(3, 1, vocab) * np.float32(60),
    "equal": lambda vocab: np.full((1, vocab), -3, np.float32),
    "zeros of both signs": lambda vocab: np.where(np.arange(vocab) % 3, 0.0, -0.0)[None],
    "steps of an eighth": lambda vocab: np.round(uniform(4, 1, vocab) * 24) / 8,
    "a few, then equal": lambda vocab: np.where(np.arange(vocab) % 701 == 5, 4.0, 1.0)[None],
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("vocab", [600, 3000])
def test_filters_where_they_are_hard(name: str, vocab: int) -> None:
    logits = np.asarray(HARD[name](vocab), np.float32)
    filters = [
        *[(k, 1.0, 0.0) for k in (1, 2, 511, 512, 513, 599, 1500)],
        *[(0, p, 0.0) for p in (1e-6, 0.2, 0.5, 0.95, 0.9999)],
        *[(k, p, 0.0) for k in (5, 520, 1111) for p in (0.1, 0.7)],
        *[(0, 1.0, m) for m in (0.01, 0.999)],
        *[(700, 0.9, 0.3), (5000, 0.6, 1e-9)],
    ]
    k, p, m = (np.array(column) for column in zip(*filters, strict=True))
    seed = np.arange(len(k))
    check(requests(logits.repeat(len(k), axis=0), top_k=k, top_p=p, min_p=m, seed=seed))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 0.01, 100.0, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = uniform(8, 12, 1000) * np.float32(10)
    check(requests(logits, temperature=temperature, seed=np.arange(12)))
    if temperature > 1e-20:  # below, scores overflow, and their probabilities are not defined
        filters = {"top_k": 40, "top_p": 0.9, "min_p": 0.01}
        check(requests(logits, temperature=temperature, seed=np.arange(12), **filters))


def test_scores_that_overflow_give_the_first_of_them() -> None:
    logits = np.array([[-2, 1, 3, 2, 3, -1]], dtype=np.float32)
    for filters in ({}, {"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.5}):
        arguments = requests(logits, temperature=1e-39, **filters)
        assert cuda().sample(**arguments)[0].tolist() == [1]


few = st.sampled_from([-1e30, -8.5, -1.0, -0.0, 0.0, 0.125, 1.0, 2.5, 88.0, 1e30])
many = st.floats(-100, 100, width=32)


@settings(max_examples=30)
@given(
    data=st.data(),
    vocab=st.integers(1, 70),
    rows=st.integers(1, 3),
)
def test_any_logits(data: st.DataObject, vocab: int, rows: int) -> None:
    def column(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(strategy, min_size=rows, max_size=rows))

    logits = data.draw(arrays.arrays(np.float32, (rows, vocab), elements=few | many))
    allowed = data.draw(arrays.arrays(np.bool_, (rows, -(-vocab // 32) * 32)))
    allowed[:, data.draw(st.integers(0, vocab - 1))] = True
    masks = np.ascontiguousarray(np.packbits(allowed, axis=1, bitorder="little")).view("<i4")
    check(
        requests(
            logits,
            temperature=column(st.sampled_from([0.0, 1e-3, 0.7, 1.0, 20.0])),
            top_k=column(st.integers(0, vocab + 1)),
            top_p=column(st.floats(2**-10, 1, width=32)),
            min_p=column(st.just(0.0) | st.floats(2**-20, 1, width=32)),
            top_n_sigma=column(st.just(0.0) | st.floats(2**-7, 4, width=32)),
            typical_p=column(st.just(1.0) | st.floats(2**-10, 1, width=32)),
            xtc_probability=column(st.sampled_from([0.0, 0.5, 1.0])),
            xtc_threshold=column(st.floats(0, 1, width=32)),
            seed=column(st.integers(0, 2**64 - 1)),
            position=column(st.integers(0, 2**31 - 1)),
        ),
        masks if data.draw(st.booleans()) else None,
    )


def test_row_alone_or_among_others_and_with_gaps_between_rows() -> None:
    arguments = make_rows(9, 33, 5001)
    whole = cuda().sample(**arguments)[0]
    for gap in (1, 3):
        assert same_bits(cuda(row_gap=gap).sample(**arguments)[0], whole)
    for row in range(0, 33, 4):  # alone it is shared by several blocks
        alone = {name: value[row : row + 1] for name, value in arguments.items()}
        assert cuda().sample(**alone)[0] == whole[row : row + 1]


def test_every_place_of_a_row_is_looked_at() -> None:
    """The only token with a chance lies where threads of all warps, one after another, read."""
    threads = np.arange(0, 512, 3)
    logits = np.zeros((len(threads), 2048), np.float32)
    winners = 4 * threads + threads % 4
    logits[np.arange(len(threads)), winners] = 100
    ways = {  # greedy; plain; min_p; listed; more than can be listed
        "temperature": [0, 1, 1, 1, 1],
        "min_p": [0, 0, 1e-6, 0, 0],
        "top_k": [0, 0, 0, 40, 600],
    }
    columns = {name: np.resize(value, len(threads)) for name, value in ways.items()}
    assert same_bits(cuda().sample(**requests(logits, **columns))[0], winners.astype(np.int32))


def test_a_workspace_is_used_again_and_again() -> None:
    """Counters are back at zero, whatever the shapes of the batches were."""
    native = cuda()
    for vocab, rows in [(30_000, 2), (200_003, 1), (5000, 3), (100_000, 1), (30_000, 2)]:
        arguments = make_rows(vocab, rows, vocab)
        assert same_bits(native.sample(**arguments)[0], sampling.sample(**arguments))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([[1, 3, 3, 2], [-5, -7, -5, -5], [0, 0, 0, 0]], dtype=np.float32)
    assert cuda().sample(**requests(logits, temperature=0))[0].tolist() == [1, 0, 0]
    wide = np.zeros((1, 60_000), np.float32)  # equals in the parts of several blocks
    wide[0, [777, 20_000, 20_001, 59_999]] = 1
    assert cuda().sample(**requests(wide, temperature=0))[0].tolist() == [777]
    for winner in (3, 8190, 100_000, 140_001, 199_999):  # the largest in each of many blocks
        wide = np.zeros((1, 200_000), np.float32)
        wide[0, winner] = 1
        assert cuda().sample(**requests(wide, temperature=0))[0].tolist() == [winner]


@pytest.mark.parametrize("vocab", [1, 7, 300, 5003, 50_001])
def test_logprobs(vocab: int) -> None:
    rows = 7
    arguments = make_rows(vocab, rows, vocab)
    counts = np.array([-1, 0, 1, 5, 20, 3, 2], np.int32).clip(max=vocab)
    masks = random_masks(vocab, rows, vocab)
    asked = changed(arguments, num_logprobs=counts, state_row=np.arange(rows)[::-1])
    native = cuda().sample(**asked, masks=masks)
    tokens, logprobs, finite, top_ids, top_logprobs, kept, ranks = native
    assert same_bits(tokens, sampling.sample(**arguments, masks=masks))
    assert same_bits(kept, tokens[::-1].copy())
    assert finite.all()
    expected = sampling.log_softmax(arguments["logits"])  # of all tokens, not of those allowed
    for row, count in enumerate(counts):
        if count < 0:
            assert np.isnan(logprobs[row])
        else:
            np.testing.assert_allclose(logprobs[row], expected[row, tokens[row]], 1e-6, 1e-5)
        order = np.argsort(-arguments["logits"][row], kind="stable").tolist()
        assert ranks[row] == (1 + order.index(tokens[row]) if count >= 0 else 0)
        best = np.array(order[: max(count, 0)], np.int64)
        assert top_ids[row, : len(best)].tolist() == best.tolist()
        assert (top_ids[row, len(best) :] == -1).all()
        np.testing.assert_allclose(top_logprobs[row, : len(best)], expected[row, best], 1e-6, 1e-5)
        assert np.isnan(top_logprobs[row, len(best) :]).all()


@pytest.mark.parametrize("vocab", [7, 257, 5003])
def test_a_target_is_taken_with_its_logprob(vocab: int) -> None:
    check_targets(cuda().sample, vocab, 60, vocab)


def test_logprobs_of_equal_logits_and_of_many_tokens() -> None:
    logits = np.stack([np.zeros(2000), np.round(uniform(1, 2000) * 4)]).astype(np.float32)
    counts = np.array([300, 512], np.int32)
    native = cuda().sample(**requests(logits, temperature=0, num_logprobs=counts))
    for row, count in enumerate(counts):
        best = np.argsort(-logits[row], kind="stable")[:count]
        assert native[3][row, :count].tolist() == best.tolist()
    with pytest.raises(ValueError, match="513 tokens; the kernel lists up to 512"):
        cuda().sample(**requests(logits, num_logprobs=[0, 513]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4097, 8998])
def test_rows_that_are_not_finite_are_flagged(bad: float, place: int) -> None:
    logits = uniform(1, 3, 8999)
    logits[1, place] = bad
    filters = {"top_p": [1, 0.9, 0.9], "temperature": [0, 1, 1]}
    arguments = requests(logits, **filters, num_logprobs=2, state_row=[2, 1, 0])
    tokens, logprobs, finite, top_ids, top_logprobs, kept, ranks = cuda().sample(**arguments)
    assert finite.tolist() == [1, 0, 1]
    assert tokens[1] == 0 and kept[1] == 0 and ranks[1] == 0 and ranks[[0, 2]].all()
    assert np.isnan(logprobs).tolist() == [False, True, False]
    assert (top_ids[1] == -1).all() and np.isnan(top_logprobs[1]).all()
    whole = sampling.sample(**{name: value[[0, 2]] for name, value in arguments.items()})
    assert tokens[[0, 2]].tolist() == whole.tolist()


TAMPERED = {
    "top_k": lambda k: np.where(k > 0, k + 1, k),
    "top_p": lambda p: np.where(p < 1, np.minimum(p * 1.05, 1), p),
    "min_p": np.zeros_like,
    "top_n_sigma": lambda n: n * 1.5,
    "typical_p": lambda p: np.where(p < 1, np.minimum(p + 0.02, 1), p),
    "xtc_probability": lambda p: np.where(p > 0, 1, p),
    "xtc_threshold": lambda t: t * 2,
    "position": lambda position: position + 1,
    "sample_index": lambda index: index * 0,
    "seed": lambda seed: seed & np.uint64(0xFFFFFFFF),
    "temperature": lambda t: np.where(t > 0, t * 1.1, t),
}


@pytest.mark.parametrize("name", [*TAMPERED, "masks"])
def test_an_error_in_any_argument_would_be_found(name: str) -> None:
    rows = 300 if name.startswith("xtc") else 60  # few rows have tokens that XTC leaves out
    arguments = {**make_rows(7, rows, 257), "masks": random_masks(7, rows, 257)}
    if name == "masks":
        turned = arguments["masks"].view(np.uint8)[:, ::-1].copy().view(np.int32)
        wrong = {**arguments, "masks": turned}
    else:
        wrong = changed(arguments, **{name: TAMPERED[name]})
    assert (cuda().sample(**wrong)[0] != sampling.sample(**arguments)).any()
