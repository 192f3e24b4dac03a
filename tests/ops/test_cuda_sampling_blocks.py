"""Rows that many blocks draw from together: the tokens are the reference's, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_helpers import needs_cuda
from cuda_sampling_helpers import check, cuda, requests
from reference_helpers import same_bits, uniform
from sampling_helpers import changed, make_rows, random_masks

from octavo import _native_ops
from octavo.reference import sampling

pytestmark = needs_cuda

# ---- many blocks a row ----

# Sizes that no block's share divides; rows that all ask for something else.
WAYS: list[dict[str, float]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"top_k": 1},
    {"top_k": 50, "temperature": 0.7},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 900, "top_p": 0.95, "temperature": 3},
    {"top_k": 300_000},
    {"top_k": 300_000, "top_p": 0.8},
    {"top_p": 1e-6},
    {"top_p": 0.95},
    {"top_p": 0.95, "temperature": 4},
    {"top_p": 0.9999, "temperature": 30},
    {"min_p": 0.05},
    {"min_p": 0.05, "top_k": 20, "top_p": 0.9},
    {"min_p": 1e-9, "top_p": 0.99},
]


def ways_of_drawing(logits: np.ndarray, **others: Any) -> dict[str, Any]:
    """Arguments of `sample`: the one row of logits, drawn from in each of WAYS."""
    arguments = requests(np.tile(logits, (len(WAYS), 1)), **others)
    for row, way in zip(arguments["rows"], WAYS, strict=True):
        for name, value in way.items():
            row[name] = value
    return arguments


def one_by_one(native: _native_ops.Ops, arguments: dict[str, Any], **others: Any) -> np.ndarray:
    """Tokens of the rows drawn in steps of their own, where most blocks share a row."""
    masks = others.get("masks")
    tokens = []
    for row in range(len(arguments["logits"])):
        alone = {name: value[row : row + 1] for name, value in arguments.items()}
        mask = {} if masks is None else {"masks": masks[row : row + 1]}
        tokens.append(int(native.sample(**alone, **mask)[0][0]))
    return np.array(tokens, np.int32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab", [1025, 5003, 70_001, 128_257])
def test_rows_of_different_settings_shared_by_many_blocks(vocab: int, masked: bool) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    logits[rng.integers(0, vocab, 30)] += 8
    arguments = ways_of_drawing(logits, seed=rng.integers(0, 2**63, len(WAYS)))
    masks = random_masks(vocab, len(WAYS), vocab) if masked else None
    expected = check(arguments, masks)
    others = {} if masks is None else {"masks": masks}
    # One instance, so that each step finds the counters as the one before left them.
    assert same_bits(one_by_one(cuda(), arguments, **others), expected)


@pytest.mark.parametrize("vocab", [5003, 20_011])
def test_equal_logits_in_the_parts_of_many_blocks(vocab: int) -> None:
    """A limit lies among equals that no block sees all of: the lowest ids are kept."""
    logits = np.where(np.arange(vocab) % 5 == 3, 2.0, -1.0).astype(np.float32)
    logits[[7, vocab // 2, vocab - 1]] = 2.5
    for seed in (1, 2, 3):
        check(ways_of_drawing(logits, seed=seed))
        k = np.array([1, 2, 3, 4, 5, 100, 700, vocab // 5, vocab // 5 + 4, vocab - 1])
        check(requests(logits[None].repeat(len(k), axis=0), top_k=k, seed=seed))


def test_more_tokens_near_a_limit_than_can_be_collected() -> None:
    """One block goes through the row: 9000 equal scores are more than the 4096 it has room for."""
    equal = np.full(9001, 0.5, np.float32)
    equal[[17, 8200]] = (0.75, -3)
    near = (uniform(5, 1, 9001)[0] * 1e-3).astype(np.float32)
    for logits in (equal, near):
        for seed in (4, 5):
            check(ways_of_drawing(logits, seed=seed))
            check(
                requests(
                    np.tile(logits, (4, 1)),
                    top_k=[4500, 4500, 8999, 0],
                    top_p=[1, 0.6, 0.3, 0.6],
                    seed=seed,
                )
            )


def test_nothing_but_one_token_may_be_drawn() -> None:
    vocab = 5003
    for only in (0, 1024, 3333, 5002):
        masks = np.zeros((len(WAYS), -(-vocab // 32)), np.uint32)
        masks[:, only // 32] = np.uint32(1) << np.uint32(only % 32)
        tokens = check(ways_of_drawing(uniform(6, 1, vocab)[0] * 9), masks.view(np.int32))
        assert (tokens == only).all()
        # The rest so far away that nothing else has a chance, or a weight.
        far = np.full(vocab, -1e30, np.float32)
        far[only] = 3
        assert (check(ways_of_drawing(far)) == only).all()


def test_steps_of_more_rows_than_a_launch_takes() -> None:
    arguments = make_rows(11, 300, 40)
    check(arguments, random_masks(11, 300, 40))
    counts = np.resize(np.array([-1, 0, 3], np.int32), 300)
    native = cuda().sample(**changed(arguments, num_logprobs=counts))
    best = np.argsort(-arguments["logits"], axis=1, kind="stable")[:, :3]
    assert (native[3][counts == 3] == best[counts == 3]).all()
    assert (native[3][counts < 3] == -1).all()


def test_logprobs_and_filters_in_one_step_of_many_blocks() -> None:
    """Up to five phases a row, and rows of other numbers of phases beside them."""
    vocab = 5003
    logits = uniform(13, 1, vocab)[0] * 6
    logits[::2] = np.round(logits[::2])
    counts = np.resize(np.array([20, -1, 0, 5, 512], np.int32), len(WAYS))
    arguments = ways_of_drawing(logits, seed=np.arange(len(WAYS)), num_logprobs=counts)
    native = cuda()
    expected = sampling.sample(**arguments)
    logprobs = sampling.log_softmax(arguments["logits"])
    best = np.argsort(-logits, kind="stable")
    for _ in range(2):
        tokens, own, _, top_ids, top, _, ranks = native.sample(**arguments)
        assert same_bits(tokens, expected)
        for row, count in enumerate(counts.clip(min=0)):
            assert top_ids[row, :count].tolist() == best[:count].tolist()
            np.testing.assert_allclose(top[row, :count], logprobs[row, best[:count]], 1e-6, 1e-5)
            assert ranks[row] == (1 + best.tolist().index(tokens[row]) if counts[row] >= 0 else 0)
            if counts[row] >= 0:
                np.testing.assert_allclose(own[row], logprobs[row, tokens[row]], 1e-6, 1e-5)


def test_logprobs_of_tokens_that_weigh_nothing() -> None:
    """Four tokens near the best; the others, 50 to 90 below, are counted all together."""
    logits = uniform(14, 1, 5003) * np.float32(20) - np.float32(50)
    logits[0, [5, 1030, 3000, 5002]] = (20, 19, 19, 18)
    native = cuda().sample(**requests(logits, num_logprobs=30))
    best = np.argsort(-logits[0], kind="stable")[:30]
    assert native[3][0].tolist() == best.tolist()
    expected = sampling.log_softmax(logits)[0, best]
    np.testing.assert_allclose(native[4][0], expected, 1e-6, 1e-5)


def test_noise_where_only_it_decides() -> None:
    """The winner among 30,000 equals is whoever has the most noise: no screen may miss it."""
    count = 40
    logits = np.zeros((count, 30_011), np.float32)
    logits[1::2] += uniform(3, count // 2, 30_011) * 1e-2
    temperature = np.resize(np.array([1, 1e-3, 40, 1e-20, 1e25], np.float32), count)
    tokens = check(requests(logits, seed=np.arange(count), temperature=temperature))
    assert len(set(tokens.tolist())) > 25


def keep_highest_ids(logits: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros(len(logits), bool)
    order = len(logits) - 1 - np.argsort(-logits[::-1], kind="stable")
    kept[order[:k]] = True
    return kept


def keep_each_blocks_best(logits: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros(len(logits), bool)
    for begin in range(0, len(logits), 1024):
        part = np.argsort(-logits[begin : begin + 1024], kind="stable")[: -(-k // 5)]
        kept[begin + part] = True
    return kept


def keep_all_that_equal_the_last(logits: np.ndarray, k: int) -> np.ndarray:
    return np.asarray(logits >= np.sort(logits)[-k])


def keep_one_too_few(logits: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros(len(logits), bool)
    kept[np.argsort(-logits, kind="stable")[: k - 1]] = True
    return kept


@pytest.fixture(scope="module")
def many_equal() -> tuple[np.ndarray, np.ndarray]:
    """Logits of which every fifth is the largest, and the tokens of 40 seeds with a top-k of 5."""
    logits = np.where(np.arange(5003) % 5 == 3, 2.0, -1.0).astype(np.float32)
    rows = np.tile(logits, (40, 1))
    return logits, check(requests(rows, top_k=5, seed=np.arange(40)))


@pytest.mark.parametrize(
    "keep",
    [keep_highest_ids, keep_each_blocks_best, keep_all_that_equal_the_last, keep_one_too_few],
)
def test_a_planted_error_is_found(keep: Any, many_equal: tuple[np.ndarray, np.ndarray]) -> None:
    """What a top-k over many blocks might keep instead draws other tokens from these rows."""
    logits, tokens = many_equal
    kept = keep(logits, 5)
    wrong = [
        np.argmax(np.where(kept, logits + sampling.gumbel(seed, 0, 5, len(logits)), -np.inf))
        for seed in range(len(tokens))
    ]
    assert (tokens != np.array(wrong)).sum() > 3
