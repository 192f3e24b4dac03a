"""typical_p against transformers' TypicalLogitsWarper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TypicalLogitsWarper

from octavo.reference.sampling import keep_tokens, sampling_rows

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("vocab_size", [29, 131, 5003])
def test_the_same_tokens_are_kept(vocab_size: int, mass: float) -> None:
    generator = np.random.default_rng(vocab_size)
    warper = TypicalLogitsWarper(mass=mass)
    for spread in (0.5, 2, 6):
        logits = (generator.standard_normal(vocab_size) * spread).astype(np.float32)
        (row,) = sampling_rows(1, temperature=1.0, typical_p=mass)
        found = keep_tokens(logits, row)
        scores = warper(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None])
        expected = torch.isfinite(scores[0]).numpy()
        assert found.tolist() == expected.tolist()
