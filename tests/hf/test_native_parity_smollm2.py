"""SmolLM2 on twenty prompts: transformers, the reference and the native core say the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from prompts import PROMPTS
from reference_helpers import SMOLLM2_MISSING, NativeModel, smollm2_path

from hf.hf_models import hf_logits
from hf.hf_smollm2 import SmolLM2
from octavo.reference.llama import ReferenceModel

pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING),
]
NUM_GREEDY = 32  # of each prompt; test_golden.py has 64 of five
MOST_TOKENS = 1000  # of a prompt; one has more
REFERENCE_TOLERANCE = 3e-4
NATIVE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A prompt, the native core's answer to it, and transformers' logits over both."""

    tokens: np.ndarray  # int64 (rows + NUM_GREEDY - 1,): the prompt, the answer but its last token
    rows: int  # of the prompt
    logits: np.ndarray  # float32 (rows, vocab_size): the native core's, of the prompt in one step
    answer: list[int]  # NUM_GREEDY tokens, each a step of its own
    expected: np.ndarray  # float32 (len(tokens), vocab_size)

    @property
    def expected_answer(self) -> list[int]:
        """transformers' choice at every step, given the steps before.

        If the answer is the same at every step, transformers by itself would give it too.
        """
        choices: list[int] = self.expected[self.rows - 1 :].argmax(axis=1).tolist()
        return choices


@pytest.fixture(scope="module")
def native(smollm2: SmolLM2) -> NativeModel:
    return NativeModel(smollm2.files.spec, smollm2.weights, max_tokens=2048)


@pytest.fixture(scope="module", params=PROMPTS)
def case(request: pytest.FixtureRequest, smollm2: SmolLM2, native: NativeModel) -> Iterator[Case]:
    prompt = smollm2.tokens(PROMPTS[request.param])[:MOST_TOKENS]
    native.restart()
    logits = native.forward(prompt)
    first = int(logits[-1].argmax())
    answer = [first, *native.greedy([first], NUM_GREEDY - 1)]
    tokens = np.concatenate([prompt, answer[:-1]])
    yield Case(tokens, len(prompt), logits, answer, hf_logits(smollm2.hf_model, tokens))


def test_twenty_prompts() -> None:
    assert len(PROMPTS) == 20


def test_native_equals_transformers(case: Case) -> None:
    """Logits at every position; and 32 tokens of its own, one by one, are transformers'."""
    expected = case.expected[: case.rows]
    np.testing.assert_allclose(case.logits, expected, atol=NATIVE_TOLERANCE, rtol=0)
    assert case.answer == case.expected_answer


def test_reference_equals_transformers(case: Case, smollm2: SmolLM2) -> None:
    """Logits at every position, the answer's too; and the same choice at every step."""
    reference = ReferenceModel(smollm2.files.spec, smollm2.weights)
    logits = reference.forward(case.tokens)
    np.testing.assert_allclose(logits, case.expected, atol=REFERENCE_TOLERANCE, rtol=0)
    assert logits[case.rows - 1 :].argmax(axis=1).tolist() == case.expected_answer
