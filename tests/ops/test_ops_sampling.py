"""The native sampler against the reference: the same tokens and the same noise, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ops_helpers import TOLERANCES
from reference_helpers import max_error, same_bits, uniform
from sampling_helpers import changed, check_targets, make_rows, random_masks, with_targets

from octavo import _native, _native_ops
from octavo.reference import sampling
from octavo.reference.sampling import sampling_rows

ISAS = _native.available_isas()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 257, 1000, 5003])
def test_tokens_equal_the_reference(vocab: int, masked: bool) -> None:
    arguments = make_rows(vocab, 240, vocab)
    masks = random_masks(vocab, 240, vocab) if masked else None
    expected = sampling.sample(**arguments, masks=masks)
    assert vocab < 30 or len(set(expected.tolist())) > 20  # not all the same
    for isa in ISAS:
        for threads in (1, 2):
            actual = _native_ops.Ops("cpu", threads, isa).sample(**arguments, masks=masks)[0]
            assert same_bits(actual, expected), f"{isa} x {threads}"


def test_tokens_of_a_whole_vocabulary() -> None:
    arguments = make_rows(5, 24, 49152)
    expected = sampling.sample(**arguments)
    for isa in ISAS:
        assert same_bits(_native_ops.Ops("cpu", 2, isa).sample(**arguments)[0], expected), isa


@pytest.mark.parametrize("vocab", [7, 257, 5003])
def test_a_target_is_taken_with_its_logprob(vocab: int) -> None:
    first = None
    for isa in ISAS:
        found = check_targets(_native_ops.Ops("cpu", 2, isa).sample, vocab, 60, vocab)
        first = first or found
        assert all(same_bits(ours, other) for ours, other in zip(found, first, strict=True)), isa


def test_planted_errors_of_targets_are_found() -> None:
    ops = _native_ops.Ops("cpu", 1)

    def shifted(logits: np.ndarray, rows: np.ndarray, masks: np.ndarray) -> Any:
        return ops.sample(logits, rows[np.r_[1 : len(rows), 0]], masks)

    def masked(logits: np.ndarray, rows: np.ndarray, masks: np.ndarray) -> Any:
        rows = rows.copy()
        allowed = sampling.unpack_masks(masks, logits.shape[1])
        rows["target"] = np.where(allowed[np.arange(len(rows)), rows["target"]], rows["target"], -1)
        return ops.sample(logits, rows, masks)

    def of_scores(logits: np.ndarray, rows: np.ndarray, masks: np.ndarray) -> Any:
        return ops.sample(logits / np.float32(1.01), rows, masks)

    for wrong in (shifted, masked, of_scores):
        with pytest.raises(AssertionError):
            check_targets(wrong, 3, 60, 257)
    with pytest.raises(ValueError, match=r"sampling\[1\].target is 257; expected -1 to 256"):
        ops.sample(**changed(with_targets(3, 2, 257), target=257 - np.array([1, 0])))


def test_row_alone_or_among_others() -> None:
    arguments = make_rows(9, 33, 101)
    native = _native_ops.Ops("cpu", 2)
    whole = native.sample(**arguments)[0]
    for row in range(33):
        alone = {name: value[row : row + 1] for name, value in arguments.items()}
        assert native.sample(**alone)[0] == whole[row : row + 1]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize(("sample_index", "position", "vocab"), [(0, 0, 1), (3, 7, 4099)])
def test_gumbel_equals_the_reference(
    seed: int, sample_index: int, position: int, vocab: int
) -> None:
    expected = sampling.gumbel(seed, sample_index, position, vocab)
    for isa in ISAS:
        actual = _native_ops.Ops("cpu", 1, isa).gumbel(seed, sample_index, position, vocab)
        assert same_bits(actual, expected), isa


def test_gumbel_over_a_million() -> None:
    """Every branch of the transformation, rare ones included."""
    expected = sampling.gumbel(42, 0, 1, 1_000_003)
    assert same_bits(_native_ops.Ops("cpu", 1).gumbel(42, 0, 1, 1_000_003), expected)


@pytest.mark.parametrize("vocab", [1, 7, 33, 1000, 49152])
def test_log_softmax_equals_the_reference(vocab: int) -> None:
    logits = uniform(vocab, 6, vocab) * np.float32([[1], [20], [0], [100], [1e-3], [3]])
    logits[1] += np.float32(1000)
    expected = sampling.log_softmax(logits)
    first = None
    for isa in ISAS:
        for threads in (1, 2):
            actual = _native_ops.Ops("cpu", threads, isa).log_softmax(logits)
            np.testing.assert_array_max_ulp(actual, expected, maxulp=2)
            first = actual if first is None else first
            assert same_bits(actual, first), f"{isa} x {threads}"


@pytest.mark.parametrize("isa", ISAS)
def test_log_probabilities_of_huge_logits(isa: str) -> None:
    """A forced token's is 0, also where the vocabulary ends within a vector."""
    logits = uniform(3, 4, 37)
    logits[range(4), [0, 7, 20, 36]] = 1e9, 1e11, 1e30, np.finfo(np.float32).max
    expected = sampling.log_softmax(logits)
    assert (expected.max(axis=1) == 0).all()
    native = _native_ops.Ops("cpu", 1, isa)
    assert same_bits(native.log_softmax(logits), expected)
    assert (native.sample(logits, sampling_rows(4, num_logprobs=0))[1] == 0).all()


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits = np.array([[1, 3, 3, 2], [-5, -7, -5, -5], [0, 0, 0, 0]], dtype=np.float32)
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 1, isa)
        assert native.sample(logits, sampling_rows(3))[0].tolist() == [1, 0, 0]
        assert sampling.sample(logits, sampling_rows(3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("isa", ISAS)
def test_ranks_count_every_better_token(isa: str) -> None:
    """Of equals the lower id is the better one, as in the list of the best."""
    logits = np.round(uniform(3, 6, 1003) * 40) / 8
    rows = sampling_rows(6, temperature=8, seed=np.arange(6), num_logprobs=[0, 3, -1, 1003, 5, 0])
    rows["target"][5] = 1002
    found = _native_ops.Ops("cpu", 2, isa).sample(logits, rows)
    tokens, top_ids, ranks = found[0], found[3], found[6]
    best = np.argsort(-logits, axis=1, kind="stable")
    expected = [1 + best[row].tolist().index(token) for row, token in enumerate(tokens)]
    expected[2] = 0
    assert ranks.tolist() == expected and max(expected) > 100
    assert (
        top_ids[3].tolist() == best[3].tolist() and top_ids[1, :3].tolist() == best[1, :3].tolist()
    )


NOISY: dict[str, Callable[[int, int], np.ndarray]] = {
    "equals": lambda rows, vocab: np.full((rows, vocab), -3, np.float32),
    "as a model's": lambda rows, vocab: uniform(3, rows, vocab) * uniform(5, rows, vocab) * 14,
    "large, so that noise is rounded": lambda rows, vocab: uniform(3, rows, vocab) + 3e6,
    "far apart": lambda rows, vocab: uniform(3, rows, vocab) * np.float32(1e20),
    "rising": lambda rows, vocab: np.linspace(0, 9, rows * vocab).reshape(rows, vocab),
}


@pytest.mark.parametrize("name", NOISY)
def test_no_token_misses_its_noise(name: str) -> None:
    """The noise of most tokens is never computed; whoever would win has to have its own."""
    for rows, vocab in ((120, 777), (3, 30_001)):
        logits = NOISY[name](rows, vocab).astype(np.float32)
        options = sampling_rows(rows, temperature=1, seed=vocab, position=np.arange(rows))
        options["top_p"][::2] = 0.98
        masks = random_masks(5, rows, vocab)
        expected = sampling.sample(logits, options), sampling.sample(logits, options, masks)
        for isa in ISAS:
            native = _native_ops.Ops("cpu", 2, isa)
            assert same_bits(native.sample(logits, options)[0], expected[0]), isa
            assert same_bits(native.sample(logits, options, masks)[0], expected[1]), isa


PLANTED: dict[str, dict[str, Any]] = {
    "top_k keeps one more": {"top_k": lambda k: np.where(k > 0, k + 1, k)},
    "top_k ignored": {"top_k": 0},
    "top_p ignored": {"top_p": 1},
    "top_p a little higher": {"top_p": lambda p: np.where(p < 1, np.minimum(p * 1.05, 1), p)},
    "min_p ignored": {"min_p": 0},
    "top_n_sigma ignored": {"top_n_sigma": 0},
    "top_n_sigma a fifth higher": {"top_n_sigma": lambda n: n * 1.2},
    "typical_p ignored": {"typical_p": 1},
    "typical_p a little higher": {
        "typical_p": lambda p: np.where(p < 1, np.minimum(p + 0.02, 1), p)
    },
    "XTC ignored": {"xtc_probability": 0},
    "XTC always": {"xtc_probability": lambda p: np.where(p > 0, 1, p)},
    "XTC's threshold twice as high": {"xtc_threshold": lambda t: t * 2},
    "position off by one": {"position": lambda position: position + 1},
    "sample index ignored": {"sample_index": 0},
    "half of the seed ignored": {"seed": lambda seed: seed & np.uint64(0xFFFFFFFF)},
    "temperature multiplies": {"temperature": lambda t: np.where(t > 0, 1 / (t + 1e-9), t)},
}
PLANTED_MASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mask ignored": lambda masks: masks * 0 - 1,
    "mask from the high bit": lambda masks: masks.view(np.uint8)[:, ::-1].copy().view(np.int32),
}


@pytest.mark.parametrize("name", [*PLANTED, *PLANTED_MASKS])
def test_planted_error_is_found(name: str) -> None:
    arguments = {**make_rows(7, 240, 257), "masks": random_masks(7, 240, 257)}
    wrong = changed(arguments, **PLANTED.get(name, {}))
    wrong["masks"] = PLANTED_MASKS.get(name, np.copy)(arguments["masks"])
    assert (sampling.sample(**wrong) != sampling.sample(**arguments)).any()


def test_planted_errors_of_gumbel_and_log_softmax_are_found() -> None:
    right = sampling.gumbel(5, 1, 2, 100)
    assert not same_bits(sampling.gumbel(5, 2, 1, 100), right)
    assert not same_bits(sampling.gumbel(6, 1, 2, 100), right)
    assert not same_bits(sampling.gumbel(5, 1, 2, 101)[1:], right)
    logits = uniform(1, 3, 50)
    no_total = logits - logits.max(axis=1, keepdims=True)
    assert max_error(no_total, sampling.log_softmax(logits)) > 20 * TOLERANCES["log_softmax"]
