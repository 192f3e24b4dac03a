"""The reference and the native core against files that Hugging Face's results were kept in."""

from __future__ import annotations

import numpy as np
import pytest
from golden_helpers import load_smollm2, load_tiny_models
from reference_helpers import NativeModel, need_smollm2

from octavo import _native
from octavo.models.spec import ModelSpec
from octavo.reference.llama import KVCache, ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

TINY = load_tiny_models()
SMOLLM2 = load_smollm2()
REFERENCE_TOLERANCE = 1e-4
NATIVE_TOLERANCE = 2e-4


def check(name: str, logits: np.ndarray, taps: dict[str, np.ndarray], tolerance: float) -> None:
    golden = TINY[name]
    hidden = [taps["embed"], *(taps[f"layers.{i}.out"] for i in range(len(golden.hidden) - 1))]
    for index, value in enumerate(hidden):
        np.testing.assert_allclose(
            value, golden.hidden[index], atol=tolerance, rtol=0, err_msg=f"hidden state {index}"
        )
    assert golden.logits.std() > 0.3
    np.testing.assert_allclose(logits, golden.logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_reference_equals_hugging_face(name: str) -> None:
    golden, taps = TINY[name], {}  # type: ignore[var-annotated]
    reference = ReferenceModel(golden.spec, golden.weights)
    check(name, reference.forward(golden.tokens, taps=taps), taps, REFERENCE_TOLERANCE)
    cache = KVCache()
    chunks = np.split(golden.tokens, [1, 9, 10, 20])
    logits = np.concatenate([reference.forward(chunk, cache) for chunk in chunks])
    check(name, logits, taps, REFERENCE_TOLERANCE)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("name", TINY)
def test_native_equals_hugging_face(name: str, isa: str) -> None:
    golden, taps = TINY[name], {}  # type: ignore[var-annotated]
    native = NativeModel(golden.spec, golden.weights, isa=isa)
    whole = native.forward(golden.tokens, taps)
    check(name, whole, taps, NATIVE_TOLERANCE)
    native.restart()
    chunks = np.split(golden.tokens, [1, 9, 10, 20])
    logits = np.concatenate([native.forward(chunk) for chunk in chunks])
    assert logits.tobytes() == whole.tobytes(), "chunks change bits"


@pytest.fixture(scope="module")
def smollm2() -> tuple[ModelSpec, dict[str, np.ndarray]]:
    files = read_model(need_smollm2())
    weights = {name: tensor.to_float32() for name, tensor in open_checkpoint(files).items()}
    return files.spec, weights


@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2_reference(name: str, smollm2: tuple[ModelSpec, dict[str, np.ndarray]]) -> None:
    golden = SMOLLM2[name]
    rows = len(golden.tokens)
    wanted = np.arange(rows - 1, rows + len(golden.answer) - 1)
    logits = ReferenceModel(*smollm2).forward(golden.tokens + golden.answer[:-1], logit_rows=wanted)
    np.testing.assert_allclose(logits[0, golden.top_tokens], golden.top_logits, atol=3e-4, rtol=0)
    assert logits.argmax(axis=1).tolist() == golden.answer


def test_smollm2_native(smollm2: tuple[ModelSpec, dict[str, np.ndarray]]) -> None:
    native = NativeModel(*smollm2)
    for name, golden in SMOLLM2.items():
        native.restart()
        last = native.forward(golden.tokens, logit_rows=[len(golden.tokens) - 1])[0]
        np.testing.assert_allclose(
            last[golden.top_tokens], golden.top_logits, atol=1e-3, rtol=0, err_msg=name
        )
        native.restart()
        answer = native.greedy(golden.tokens, 8)
        rest = native.forward(golden.answer[7:-1])  # as one chunk: 50 steps more tell no more
        assert answer + rest.argmax(axis=1).tolist() == golden.answer, name
