"""bfloat16 on SmolLM2: the native core rounds as much as the reference does, and no more.

Where two sums straddle a rounding to bfloat16 the results step apart, and from there on the two
paths are as far from each other as either is from float32. So what is compared is how far each is
from float32; op by op they are held together much more closely (test_ops_compute.py). The figures
are in docs/numbers.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prompts import PROMPTS
from reference_helpers import SMOLLM2_MISSING, NativeModel, smollm2_path

from hf.hf_models import hf_logits
from hf.hf_smollm2 import SmolLM2
from octavo.reference.llama import ReferenceModel

pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING),
]


def size(difference: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(difference))))


@pytest.fixture(scope="module")
def logits(smollm2: SmolLM2) -> dict[str, np.ndarray]:
    """Each side's logits on four prompts, one after the other: (rows, vocab_size)."""
    spec, weights = smollm2.files.spec, smollm2.weights
    rounded = {"dtype": "bf16", "kv_dtype": "bf16"}
    native = NativeModel(spec, weights, **rounded)
    hf_bf16 = smollm2.load_hf(torch.bfloat16)
    reference, exact = ReferenceModel(spec, weights, **rounded), ReferenceModel(spec, weights)
    sides: dict[str, list[np.ndarray]] = {"exact": [], "reference": [], "native": [], "hf": []}
    for name in ("capital", "python", "digits", "mixed"):
        tokens = smollm2.tokens(PROMPTS[name])
        native.restart()
        sides["exact"].append(exact.forward(tokens))
        sides["reference"].append(reference.forward(tokens))
        sides["native"].append(native.forward(tokens))
        sides["hf"].append(hf_logits(hf_bf16, tokens))
    return {side: np.concatenate(parts) for side, parts in sides.items()}


def test_native_rounds_as_the_reference_does(logits: dict[str, np.ndarray]) -> None:
    own = size(logits["reference"] - logits["exact"])
    assert 0.01 < own < 0.2
    assert 0.8 * own < size(logits["native"] - logits["exact"]) < 1.25 * own
    assert size(logits["native"] - logits["reference"]) < 1.5 * own


def test_reference_rounds_less_than_transformers(logits: dict[str, np.ndarray]) -> None:
    """octavo keeps the residual stream, norms and scores in float32; transformers does not."""
    own = size(logits["reference"] - logits["exact"])
    assert 1.5 * own < size(logits["hf"] - logits["exact"])
    assert size(logits["hf"] - logits["reference"]) < 1.25 * size(logits["hf"] - logits["exact"])


def test_first_choices_stay(logits: dict[str, np.ndarray]) -> None:
    first = {side: values.argmax(axis=1) for side, values in logits.items()}
    rows = len(first["exact"])
    assert (first["native"] != first["exact"]).sum() <= 0.05 * rows
    assert (first["reference"] != first["exact"]).sum() <= 0.05 * rows
