"""SmolLM2 on twenty prompts: transformers, the reference and the native core say the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from prompts import PROMPTS
from reference_helpers import SMOLLM2_MISSING, NativeModel, smollm2_path

from hf.hf_smollm2 import NUM_GREEDY, Expected, SmolLM2
from octavo.reference.llama import ReferenceModel

pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING),
]
REFERENCE_TOLERANCE = 3e-4
NATIVE_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def smollm2() -> SmolLM2:
    path = smollm2_path()
    assert path is not None
    return SmolLM2(path)


@pytest.fixture(scope="module", params=PROMPTS)
def expected(request: pytest.FixtureRequest, smollm2: SmolLM2) -> Iterator[Expected]:
    yield smollm2.expected(request.param, PROMPTS[request.param])


@pytest.fixture(scope="module")
def native(smollm2: SmolLM2) -> NativeModel:
    return NativeModel(smollm2.files.spec, smollm2.weights, max_tokens=2048)


def test_twenty_prompts() -> None:
    assert len(PROMPTS) == 20


def test_reference_equals_transformers(expected: Expected, smollm2: SmolLM2) -> None:
    """Logits at every position; and, fed transformers' answer, the same choice at every step."""
    reference = ReferenceModel(smollm2.files.spec, smollm2.weights)
    logits = reference.forward(np.concatenate([expected.tokens, expected.answer[:-1]]))
    rows = len(expected.tokens)
    np.testing.assert_allclose(logits[:rows], expected.logits, atol=REFERENCE_TOLERANCE, rtol=0)
    assert logits[rows - 1 :].argmax(axis=1).tolist() == expected.answer


def test_native_equals_transformers(expected: Expected, native: NativeModel) -> None:
    """Logits at every position; and 64 tokens of its own, one by one, are transformers'."""
    native.restart()
    logits = native.forward(expected.tokens)
    np.testing.assert_allclose(logits, expected.logits, atol=NATIVE_TOLERANCE, rtol=0)
    native.restart()
    assert native.greedy(expected.tokens, NUM_GREEDY) == expected.answer
