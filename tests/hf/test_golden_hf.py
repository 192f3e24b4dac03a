"""The golden files, by which `make test` judges without torch, are what transformers gives."""

from __future__ import annotations

import pytest
from reference_helpers import SMOLLM2_MISSING, smollm2_path

from golden.make_golden import problems_of_smollm2, problems_of_tiny_models
from hf.hf_smollm2 import SmolLM2

pytestmark = pytest.mark.hf


def test_tiny_models_are_reproduced() -> None:
    assert problems_of_tiny_models() == []


@pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING)
def test_smollm2_is_reproduced(smollm2: SmolLM2) -> None:
    assert problems_of_smollm2(smollm2) == []
