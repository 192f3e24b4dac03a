"""From logits to the next token, bit by bit.

Sampling token i with probability softmax(logits / temperature)_i is the same as taking the token
with the largest logits_i / temperature + g_i, where the g_i are independent Gumbel variates (Gumbel
1954; Maddison et al. 2014, arXiv 1411.0030). The variates here come from a counter: g is a pure
function of (seed, sample_index, position, token). So what a request samples depends on nothing but
its logits and its seed: not on the batch, nor on the order of the work, nor on the device.

This requires the same bits everywhere. Libraries differ in the last bit of exp and log, so both
are defined below (the polynomials of Moshier's Cephes library), with every multiplication and
addition rounded to float32, and the sums that decide on top-p are of integers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.integer[Any]]
SamplingRows = npt.NDArray[np.void]  # of SAMPLING_ROW

OPS = ("adjust_logits", "sample", "log_softmax", "gumbel")

# How one row of logits is sampled, with the default of each field: greedy. The native core takes
# these bytes as they are (csrc/core/sampling_row.h); rows have no padding.
#
# temperature: 0 takes the largest logit. top_k: keep so many; 0 keeps all. top_p: keep the most
# probable tokens up to this probability; 1 keeps all. min_p: drop tokens less probable than this
# part of the most probable; 0 keeps all. seed, sample_index, position: as in `gumbel`; a step sets
# the position itself. num_logprobs: how many of the most probable tokens to report; 0: the sampled
# token's log-probability alone; -1: nothing. state_row: where a step keeps the sampled token, for a
# later step to read; -1: nowhere. target: a token that is taken whatever the logits, the mask and
# the other fields are, so that its log-probability is reported; -1: none. top_n_sigma: keep the
# logits within so many standard deviations of the largest; 0 keeps all. typical_p: keep the most
# typical tokens up to this probability; 1 keeps all. xtc_probability: how often the most probable
# tokens are left out, those that have xtc_threshold or more, except for the last of them.
_FIELDS: tuple[tuple[str, str, float], ...] = (
    ("temperature", "<f4", 0.0),
    ("top_k", "<i4", 0),
    ("top_p", "<f4", 1.0),
    ("min_p", "<f4", 0.0),
    ("seed", "<u8", 0),
    ("sample_index", "<i4", 0),
    ("position", "<i4", 0),
    ("num_logprobs", "<i4", -1),
    ("state_row", "<i4", -1),
    ("target", "<i8", -1),
    ("top_n_sigma", "<f4", 0.0),
    ("typical_p", "<f4", 1.0),
    ("xtc_probability", "<f4", 0.0),
    ("xtc_threshold", "<f4", 0.1),
)
SAMPLING_ROW = np.dtype([(name, kind) for name, kind, _ in _FIELDS], align=True)
_GREEDY = np.array(tuple(default for _, _, default in _FIELDS), SAMPLING_ROW)

_f = np.float32
_EXP_COEFFICIENTS = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
_LOG_COEFFICIENTS = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LN2_HIGH, _LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)  # their sum is ln 2
_FIXED_POINT = float(2**40)  # probabilities relative to the largest are summed in units of 2^-40


def exp32(x: Float32) -> Float32:
    """e^x for x <= 0, within 2 units in the last place; 0 below -87. Any shape."""
    clamped = np.maximum(x, _f(-87))
    n = np.floor(clamped * _f(1.44269504088896341) + _f(0.5))  # x = n ln 2 + r
    r = clamped - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = (_polynomial(_EXP_COEFFICIENTS, r) * (r * r) + r) + _f(1)
    y = np.ldexp(y, n.astype(np.int32))  # exact
    result: Float32 = np.where(x < _f(-87), _f(0), y).astype(np.float32)
    return result


def log32(x: Float32) -> Float32:
    """The natural logarithm of x > 0, not denormal, within 2 units in the last place."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    low = mantissa < _f(0.707106781186547524)
    fraction = np.where(low, (mantissa + mantissa) - _f(1), mantissa - _f(1))
    exponent = np.where(low, exponent - 1, exponent).astype(np.float32)
    return _log_of_parts(fraction, exponent)


def _log_of_parts(f: Float32, e: Float32) -> Float32:
    """log((1 + f) * 2^e) for f between sqrt(1/2) - 1 and sqrt(2) - 1, e a whole number."""
    z = f * f
    y = (_polynomial(_LOG_COEFFICIENTS, f) * f) * z
    y = y + e * _LN2_LOW
    y = y - _f(0.5) * z
    r: Float32 = (f + y) + e * _LN2_HIGH
    return r


def _polynomial(coefficients: tuple[float, ...], x: Float32) -> Float32:
    """Horner's scheme, highest power first."""
    result = np.full_like(x, _f(coefficients[0]))
    for coefficient in coefficients[1:]:
        result = result * x + _f(coefficient)
    return result


def philox4x32(counter: tuple[UInt32, UInt32, UInt32, UInt32], key: tuple[int, int]) -> UInt32:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four uint32 arrays of one shape (n,); key: two 32-bit numbers.
    Returns uint32 (n, 4): four random words for each counter.
    """
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    key_low, key_high = key
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key_low),
            product1 & mask,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key_high),
            product0 & mask,
        )
        key_low = (key_low + 0x9E3779B9) & 0xFFFFFFFF
        key_high = (key_high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_bits(seed: int, sample_index: int, position: int, vocab_size: int) -> UInt32:
    """32 random bits for every token, uint32 (vocab_size,); arguments as in `gumbel`."""
    num_counters = (vocab_size + 3) // 4  # one gives four tokens their bits
    counter = (
        np.arange(num_counters, dtype=np.uint32),
        np.full(num_counters, position, dtype=np.uint32),
        np.full(num_counters, sample_index, dtype=np.uint32),
        np.zeros(num_counters, dtype=np.uint32),
    )
    key = (seed & 0xFFFFFFFF, seed >> 32)
    return philox4x32(counter, key).reshape(-1)[:vocab_size]


def gumbel(seed: int, sample_index: int, position: int, vocab_size: int) -> Float32:
    """A standard Gumbel variate for every token, float32 (vocab_size,).

    seed: 0 to 2^64 - 1. sample_index: which of a prompt's answers. position: of the token to be
    sampled, counted from the start of the prompt.

    -log(E), where E is exponential: E = -log(u) with u in (0, 1) from the random bits. Large
    variates come from u close to 1, where float32 is coarse, so there 1 - u is computed instead.
    """
    bits = random_bits(seed, sample_index, position, vocab_size)
    below_half = bits < np.uint32(2**31)
    u = (bits.astype(np.float32) + _f(0.5)) * _f(2.0**-32)
    rest = ((~bits).astype(np.float32) + _f(0.5)) * _f(2.0**-32)  # 1 - u
    near_one = ~below_half & (rest <= _f(0.2929))
    exponential_near_one = -_log_of_parts(-rest, np.zeros_like(rest))
    exponential = -log32(np.where(below_half, u, _f(1) - rest))
    return -log32(np.where(near_one, exponential_near_one, exponential))


def adjust_logits(
    logits: Float32, row_starts: Int32, token_ids: Int32, repetition: Float32, bias: Float32
) -> Float32:
    """The logits with some of them changed, before a token is sampled: penalties and biases.

    logits: float32 (rows, vocab_size). row_starts: int32 (rows + 1,); row r has the entries
    row_starts[r] .. row_starts[r + 1] - 1 of the other three, each of shape (entries,).
    token_ids: int32, ascending within a row. repetition: float32, above 0: divides a positive
    logit and multiplies any other (Keskar et al. 2019, arXiv 1909.05858; the test of the sign is
    later common practice); 1 changes nothing. bias: float32, added after that. Returns a new
    array of the shape of logits.
    """
    result: Float32 = logits.copy()
    for row in range(len(logits)):
        entries = slice(row_starts[row], row_starts[row + 1])
        x = result[row, token_ids[entries]]
        x = np.where(x > 0, x / repetition[entries], x * repetition[entries])
        result[row, token_ids[entries]] = x + bias[entries]
    return result


def dry_penalties(
    token_ids: Int32,
    breaks: npt.NDArray[np.bool_],
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
) -> tuple[Int32, Float32]:
    """What DRY takes off the logits of tokens that would go on with a repetition.

    ("Don't repeat yourself", by its author, 2024: github.com/oobabooga/text-generation-webui/
    pull/5677.) Wherever the end of the text stood before, at a length of n tokens, the token that
    followed there loses multiplier * base^(n - allowed_length), for the largest such n of
    allowed_length or more. No repetition reaches over a break, and no break is penalized.

    token_ids: int32 (tokens,), prompt and answer so far. breaks: bool (tokens,). Lengths above
    allowed_length + 60 count as that. Returns the tokens, ascending, and what they lose.
    """
    lengths = np.zeros(len(token_ids), np.int32)
    followers = np.flatnonzero(~breaks)  # positions of tokens that may have followed
    for length in range(allowed_length + 60):
        last = len(token_ids) - 1 - length
        if last < 1 or breaks[last]:
            break
        before = followers - 1 - length
        is_same = (before >= 0) & (token_ids[before] == token_ids[last]) & ~breaks[before]
        followers = followers[is_same]
        lengths[followers] = length + 1
    places = np.flatnonzero(lengths >= allowed_length)
    tokens, inverse = np.unique(token_ids[places], return_inverse=True)
    longest = np.zeros(len(tokens), np.int32)
    np.maximum.at(longest, inverse, lengths[places])
    lost = [multiplier * base ** (n - allowed_length) for n in longest.tolist()]
    return tokens.astype(np.int32), np.minimum(lost, 1e30).astype(np.float32)


def sampling_rows(num_rows: int, **fields: npt.ArrayLike) -> SamplingRows:
    """Rows of SAMPLING_ROW, (num_rows,); fields that are not given have their defaults.

    fields: by name, one value for all rows or one for each. Raises ValueError on an unknown name
    and on the wrong number of values.
    """
    rows = np.full(num_rows, _GREEDY)
    for name, values in fields.items():
        rows[name] = values
    return rows


def sample(logits: Float32, rows: SamplingRows, masks: Int32 | None = None) -> Int32:
    """Sample a token for every row.

    logits: float32 (rows, vocab_size). rows: of SAMPLING_ROW, (rows,). masks: int32
    (rows, ceil(vocab_size / 32)); bit b of word w allows token 32 w + b; at least one has to be
    allowed. Returns int32 (rows,); of equals the lowest token id.
    """
    allowed = None if masks is None else unpack_masks(masks, logits.shape[1])
    tokens = [
        sample_row(
            logits[i] if allowed is None else np.where(allowed[i], logits[i], _f(-np.inf)), row
        )
        for i, row in enumerate(rows)
    ]
    return np.array(tokens, dtype=np.int32)


def sample_row(logits: Float32, row: np.void) -> int:
    """Sample one token from logits (vocab_size,), masked ones being -inf, by a row of options."""
    if row["target"] >= 0:
        return int(row["target"])
    if row["temperature"] == 0:
        return int(np.argmax(logits))
    counter = (int(row["seed"]), int(row["sample_index"]), int(row["position"]))
    scaled = logits / row["temperature"]
    noisy = scaled + gumbel(*counter, len(logits))
    return int(np.argmax(np.where(keep_tokens(logits, row), noisy, _f(-np.inf))))


def keep_tokens(logits: Float32, row: np.void) -> npt.NDArray[np.bool_]:
    """Which tokens may be sampled: bool (vocab_size,), by the filters of a row of SAMPLING_ROW.

    logits: (vocab_size,), masked ones being -inf. Each filter sees what those before it have left:
    top_n_sigma, min_p, top_k, typical_p, top_p, and XTC. docs/sampling.md gives the reasons for
    this order.
    """
    scaled = logits / row["temperature"]
    largest = scaled.max()
    kept = scaled > _f(-np.inf)
    if row["top_n_sigma"] > 0:
        kept &= scaled >= lowest_by_sigma(logits, row["top_n_sigma"]) / row["temperature"]
    if row["min_p"] > 0:  # Nguyen et al. 2024, arXiv 2407.01082
        kept &= scaled >= largest + log32(np.array([row["min_p"]]))
    # Most probable first; a stable sort leaves equals in the order of their ids.
    order = np.argsort(-scaled, kind="stable")
    order = order[kept[order]]
    if row["top_k"] > 0:
        order = order[: row["top_k"]]
    distances = largest - scaled
    if row["typical_p"] < 1:
        order = order[keep_typical(distances[order], order, row["typical_p"])]
    if row["top_p"] < 1:  # Holtzman et al. 2019, arXiv 1904.09751
        order = order[: _count_up_to(_weights(distances[order]), row["top_p"])]
    if is_excluding_top(row):
        order = order[exclude_top(_weights(distances[order]), row["xtc_threshold"])]
    result = np.zeros(len(logits), dtype=np.bool_)
    result[order] = True
    return result


def lowest_by_sigma(logits: Float32, num_sigmas: np.float32) -> np.float32:
    """The smallest logit that top_n_sigma keeps (Tang et al. 2024, arXiv 2411.07641).

    logits: float32 (vocab_size,); those of -inf do not count. It is the largest one less
    num_sigmas standard deviations, which are taken of the distances from the largest one, as whole
    numbers of 2^-15. Distances beyond 128 count as 128: so the sums of a million are exact.
    """
    largest = logits.max()
    distances = np.minimum(largest - logits[logits > _f(-np.inf)], _f(128))
    steps = (distances * _f(2**15)).astype(np.uint64)
    mean = float(steps.sum()) / len(steps)
    variance = float((steps * steps).sum()) / len(steps) - mean * mean
    sigma = math.sqrt(max(variance, 0.0)) * 2.0**-15
    lowest: np.float32 = largest - _f(float(num_sigmas) * sigma)
    return lowest


def keep_typical(
    distances: Float32, token_ids: Integers, mass: np.float32
) -> npt.NDArray[np.bool_]:
    """Which tokens are the most typical ones that hold `mass` of the probability: bool (tokens,).

    Locally typical sampling (Meister et al. 2022, arXiv 2202.00666) prefers tokens whose
    -log(probability) is close to the entropy, its mean. Both have the logarithm of the total in
    them, which cancels: -log(p_i) - entropy = distance_i - mean distance.

    distances: float32 (tokens,), of the scores from the largest one. token_ids decide between
    equals; the lower one is preferred.
    """
    weights = _weights(distances)
    # No distance above 28 has a weight; an infinite one must not be multiplied.
    products = weights.astype(np.float64) * np.minimum(distances, _f(1000)).astype(np.float64)
    total = float(weights.sum(dtype=np.uint64))
    mean = _f(float(np.floor(products).astype(np.uint64).sum(dtype=np.uint64)) / total)
    order = np.lexsort((token_ids, np.abs(distances - mean)))
    result = np.zeros(len(distances), dtype=np.bool_)
    result[order[: _count_up_to(weights[order], mass)]] = True
    return result


def is_excluding_top(row: np.void) -> bool:
    """Whether XTC leaves out the most probable tokens here: decided by one random number."""
    counter = (0, int(row["position"]), int(row["sample_index"]), 1)  # `gumbel` has 0 at the end
    words = tuple(np.array([word], dtype=np.uint32) for word in counter)
    seed = int(row["seed"])
    bits = int(philox4x32(words, (seed & 0xFFFFFFFF, seed >> 32))[0, 0])  # type: ignore[arg-type]
    return bits < int(float(row["xtc_probability"]) * 2**32)


def exclude_top(weights: UInt64, threshold: np.float32) -> npt.NDArray[np.bool_]:
    """Which tokens XTC leaves, "exclude top choices": bool (tokens,).

    All but those with `threshold` of the probability or more, and the last of these. (By the
    author of DRY, 2024: github.com/oobabooga/text-generation-webui/pull/6335.)
    weights: uint64 (tokens,), the most probable first.
    """
    is_top = weights >= _part_of(threshold, weights)
    if is_top.any():
        is_top[np.flatnonzero(is_top)[-1]] = False
    return ~is_top


def _weights(distances: Float32) -> UInt64:
    """Probabilities relative to the largest one's, in fixed point; distances: as keep_typical's."""
    return _fixed_point(exp32(-distances))


def _part_of(fraction: np.float32, weights: UInt64) -> np.uint64:
    part: np.uint64 = np.uint64(math.ceil(float(fraction) * float(weights.sum(dtype=np.uint64))))
    return part


def _count_up_to(weights: UInt64, fraction: np.float32) -> int:
    """How many of the first tokens together reach this fraction of the total; one at least."""
    cumulative = np.cumsum(weights, dtype=np.uint64)
    return max(1, 1 + int(np.searchsorted(cumulative, _part_of(fraction, weights))))


def log_softmax(logits: Float32) -> Float32:
    """log(softmax(logits)) over the last axis: the tokens' log-probabilities.

    logits: float32 (rows, vocab_size). Returns the same shape.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    totals = _fixed_point(exp32(shifted)).sum(axis=-1, dtype=np.uint64)
    logs = [math.log(float(total) / _FIXED_POINT) for total in np.atleast_1d(totals)]
    result: Float32 = shifted - np.array(logs, dtype=np.float32).reshape(*totals.shape, 1)
    return result


def unpack_masks(masks: Int32, vocab_size: int) -> npt.NDArray[np.bool_]:
    """int32 (rows, ceil(vocab_size / 32)) -> bool (rows, vocab_size): which tokens are allowed."""
    words = np.ascontiguousarray(masks).view(np.uint32)
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    allowed: npt.NDArray[np.bool_] = bits.reshape(len(masks), -1)[:, :vocab_size] != 0
    return allowed


def _fixed_point(x: Float32) -> UInt64:
    """floor(x * 2^40), uint64: sums of these are exact, whatever their order."""
    return np.floor(x.astype(np.float64) * _FIXED_POINT).astype(np.uint64)
