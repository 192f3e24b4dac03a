"""Sequences stepped by hand: each computes what the reference does, whatever goes beside it."""

from __future__ import annotations

import numpy as np
import pytest
from runtime_helpers import VOCAB, random_weights, tiny_runtime, tiny_spec

from octavo.config import RuntimeOptions
from octavo.reference.llama import ReferenceModel
from octavo.runtime.loader import LoadedRuntime
from octavo.runtime.session import Session

SPEC = tiny_spec()
TOKENS = [[(17 * i + 5 * s) % VOCAB for i in range(40)] for s in range(3)]


def session(num_blocks: int = 9) -> Session:
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 12)
    runtime = tiny_runtime(SPEC, num_blocks=num_blocks)
    return Session(LoadedRuntime(runtime, options, num_blocks, "cpu", 1))


def expected(sequence: int, stop: int, start: int | None = None) -> np.ndarray:
    """Logits of a sequence's tokens start .. stop - 1; of the last alone where start is None."""
    logits = ReferenceModel(SPEC, random_weights(SPEC)).forward(TOKENS[sequence][:stop])
    return logits[stop - 1 if start is None else start :]


def test_ragged_sequences() -> None:
    found = session()
    found.restart(3)
    first = found.step({0: TOKENS[0][:20], 2: TOKENS[2][:3]})
    want = np.concatenate([expected(0, 20), expected(2, 3)])
    np.testing.assert_allclose(first.logits, want, atol=1e-4)
    assert first.token_ids.tolist() == want.argmax(axis=1).tolist() and not first.taps
    second = found.step({2: TOKENS[2][3:33], 1: TOKENS[1][:1], 0: TOKENS[0][20:21]})
    want = np.concatenate([expected(2, 33), expected(1, 1), expected(0, 21)])
    np.testing.assert_allclose(second.logits, want, atol=1e-4)
    found.rewind(2)  # sequence 1 has none at place 1, and is left alone
    third = found.step({2: TOKENS[2][2:5]}, [0, 2], ["layers.0.q", "final_norm"])
    np.testing.assert_allclose(third.logits, expected(2, 5, 2)[[0, 2]], atol=1e-4)
    assert third.taps["layers.0.q"].shape == (3, 60) and len(third.taps["final_norm"]) == 2


def test_blocks_in_any_order_and_steps_without_logits() -> None:
    found = session()
    found.restart(2, np.array([7, 2, 0, 5], np.int32))
    found.feed(TOKENS[1][:30], 1)  # in chunks of 12
    found.feed(TOKENS[0][:31])
    step = found.step({0: TOKENS[0][31:32], 1: TOKENS[1][30:31]})
    np.testing.assert_allclose(step.logits, [expected(0, 32)[0], expected(1, 31)[0]], atol=1e-4)
    silent = found.step({1: TOKENS[1][31:32]}, ())
    assert silent.logits.shape == (0, VOCAB) and silent.token_ids.shape == (0,)
    with pytest.raises(ValueError, match="a sequence of 33 tokens; expected at most 32"):
        found.step({0: [1]})
    found.rewind(31)
    again = found.step({0: TOKENS[0][31:32]})
    np.testing.assert_allclose(again.logits, expected(0, 32), atol=1e-4)


def test_a_sampled_token_stays_on_the_device() -> None:
    found = session()
    found.restart(2)
    sampled = found.step({1: TOKENS[1][:9], 0: TOKENS[0][:7]}).token_ids.tolist()
    ticket = found.submit({0: [-1], 1: [-2]})
    tokens = found.loaded.runtime.wait(ticket).token_ids
    model = ReferenceModel(SPEC, random_weights(SPEC))
    for sequence, length in ((0, 7), (1, 9)):
        prompt = [*TOKENS[sequence][:length], sampled[1 - sequence]]
        assert tokens[sequence] == model.forward(prompt)[-1].argmax()
