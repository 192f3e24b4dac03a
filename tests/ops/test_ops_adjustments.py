"""Adjusted logits: the native op against the reference to the bit, and through a whole step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_helpers import DEVICE, has_cuda
from reference_helpers import same_bits, uniform
from runtime_helpers import VOCAB, make_batch, tiny_runtime

from octavo import _native, _native_ops
from octavo.reference import sampling

PROMPT = [5, 17, 80, 2, 2, 41, 9]


class Adjustments(NamedTuple):
    row_starts: np.ndarray
    token_ids: np.ndarray
    repetition: np.ndarray
    bias: np.ndarray


def random_adjustments(seed: int, rows: int, vocab: int) -> Adjustments:
    """Rows with none, a few, and all tokens adjusted."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, vocab // 3, vocab], size=rows)
    tokens = [np.sort(rng.choice(vocab, size=count, replace=False)) for count in counts]
    total = int(counts.sum())
    return Adjustments(
        np.cumsum([0, *counts]).astype(np.int32),
        np.concatenate([*tokens, np.zeros(0)]).astype(np.int32),
        rng.choice(np.array([1, 1.1, 0.7, 2, 13], np.float32), size=total),
        (rng.choice([0.0, 1.0, -1.0], size=total) * rng.random(total) * 100).astype(np.float32),
    )


def adjust(changes: dict[int, tuple[float, float]]) -> Adjustments:
    """Of a single row: token -> (repetition, bias)."""
    tokens = sorted(changes)
    return Adjustments(
        np.array([0, len(tokens)], np.int32),
        np.array(tokens, np.int32),
        np.array([changes[token][0] for token in tokens], np.float32),
        np.array([changes[token][1] for token in tokens], np.float32),
    )


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (2, 7), (3, 31), (17, 257), (40, 5003)])
def test_logits_equal_the_reference(rows: int, vocab: int) -> None:
    logits = uniform(vocab, rows, vocab) * np.float32(8)
    logits[:, ::5] = np.float32(0)  # neither positive nor negative
    arguments = random_adjustments(vocab, rows, vocab)
    before = logits.copy()
    expected = sampling.adjust_logits(logits, *arguments)
    for isa in _native.available_isas():
        for threads in (1, 2):
            actual = _native_ops.Ops("cpu", threads, isa).adjust_logits(logits, *arguments)
            assert same_bits(actual, expected), f"{isa} x {threads}"
    if has_cuda:
        assert same_bits(_native_ops.Ops(DEVICE).adjust_logits(logits, *arguments), expected)
    assert same_bits(logits, before)
    assert rows < 3 or not same_bits(expected, logits)


def test_the_reference_by_hand() -> None:
    logits = np.array([[2.0, -3.0, 0.5, 4.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    arguments = Adjustments(
        np.array([0, 3, 3], np.int32),
        np.array([0, 1, 3], np.int32),
        np.array([2, 2, 1], np.float32),
        np.array([0, 0.25, -7], np.float32),
    )
    expected = [[1.0, -5.75, 0.5, -3.0], [1.0, 1.0, 1.0, 1.0]]
    assert sampling.adjust_logits(logits, *arguments).tolist() == expected


PLANTED: dict[str, Any] = {
    "the sign not looked at": lambda x, a: (
        np.where(x > 0, x / a.repetition, x / a.repetition) + a.bias
    ),
    "bias before the penalty": lambda x, a: np.where(
        x + a.bias > 0, (x + a.bias) / a.repetition, (x + a.bias) * a.repetition
    ),
    "bias forgotten": lambda x, a: np.where(x > 0, x / a.repetition, x * a.repetition),
    "multiplied by the inverse": lambda x, a: (
        np.where(x > 0, x * (np.float32(1) / a.repetition), x * a.repetition) + a.bias
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_found(name: str) -> None:
    logits = uniform(3, 1, 400) * np.float32(8)
    rng = np.random.default_rng(4)
    arguments = Adjustments(
        np.array([0, 400], np.int32),
        np.arange(400, dtype=np.int32),
        rng.choice(np.array([1.1, 0.7, 13], np.float32), size=400),
        rng.random(400).astype(np.float32),
    )
    wrong = PLANTED[name](logits[0], arguments)
    assert not same_bits(wrong, _native_ops.Ops("cpu", 1).adjust_logits(logits, *arguments)[0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row_starts", [0, 2], "row_starts has 2 entries; expected 3"),
        ("row_starts", [0, 1, 4], "goes from 0 to 4; expected 0 to 3"),
        ("row_starts", [0, 5, 3], r"row_starts\[2\] is 3; expected 5 or more"),
        ("token_ids", [1, 1, 0], r"token_ids\[1\] is 1; expected 2 to 6"),
        ("token_ids", [1, 7, 0], r"token_ids\[1\] is 7"),
        ("token_ids", [-1, 2, 0], r"token_ids\[0\] is -1"),
        ("repetition", [1, 0, 1], r"repetition\[1\] is 0; expected a number above 0"),
        ("repetition", [1, 1], "3 token_ids, 2 repetition and 3 bias"),
        ("bias", [0, 0, np.nan], r"bias\[2\] is nan"),
        ("bias", [np.inf, 0, 0], r"bias\[0\] is inf"),
    ],
)
def test_wrong_entries_are_named(field: str, value: list[float], message: str) -> None:
    right: dict[str, Any] = {
        "row_starts": [0, 2, 3],
        "token_ids": [1, 3, 0],
        "repetition": [1.0, 2.0, 1.0],
        "bias": [0.0, 1.0, 2.0],
    }
    arguments = {
        name: np.array(entries, np.int32 if name in ("row_starts", "token_ids") else np.float32)
        for name, entries in {**right, field: value}.items()
    }
    with pytest.raises(ValueError, match=message):
        _native_ops.Ops("cpu", 1).adjust_logits(uniform(1, 2, 7), **arguments)


def test_a_step_draws_from_adjusted_logits_and_reports_the_models_own() -> None:
    runtime = tiny_runtime()

    def batch() -> _native.Batch:
        return make_batch([(PROMPT, 0, [0, 1])], num_logprobs=3)

    plain = runtime.step(batch())
    best, second, third = plain.top_token_ids[0].tolist()
    for changes, expected in [
        ({best: (1.0, -50.0)}, second),
        ({best: (1.0, -50.0), second: (1.0, -50.0)}, third),
        ({61: (1.0, 99.0)}, 61),
    ]:
        ticket = runtime.submit(batch())
        runtime.sample(ticket, None, adjust(changes))
        output = runtime.wait(ticket)
        assert output.token_ids[0] == expected
        assert output.top_token_ids.tolist() == plain.top_token_ids.tolist()
        assert same_bits(output.top_logprobs, plain.top_logprobs)
    assert runtime.step(batch()).token_ids[0] == best  # nothing is left behind


def test_adjustments_and_a_mask_together() -> None:
    runtime = tiny_runtime()
    masks = np.zeros((1, (VOCAB + 31) // 32), np.int32)
    masks[0, 1] = (1 << 9) | (1 << 10)  # tokens 41 and 42
    drawn = []
    for token in (41, 42):
        ticket = runtime.submit(make_batch([(PROMPT, 0, [0, 1])]))
        runtime.sample(ticket, masks, adjust({3: (1.0, 100.0), token: (1.0, 50.0)}))
        drawn.append(int(runtime.wait(ticket).token_ids[0]))
    assert drawn == [41, 42]


def test_adjustments_of_the_wrong_size_leave_the_ticket_usable() -> None:
    runtime = tiny_runtime()
    ticket = runtime.submit(make_batch([(PROMPT, 0, [0, 1])], [2, 6]))
    with pytest.raises(ValueError, match="row_starts has 2 entries; expected 3"):
        runtime.sample(ticket, None, adjust({3: (1.0, 1.0)}))
    assert len(runtime.wait(ticket).token_ids) == 2
