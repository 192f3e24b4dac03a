"""Ropes that change with the length of a sequence: as transformers, below, at and beyond it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from engine_helpers import run_to_end

from hf.family_models import (
    DYNAMIC,
    MAX_MODEL_LEN,
    ORIGINAL,
    logits_of,
    saved_model,
    tokens_of,
    whole_forward,
)
from octavo.config import read_environment
from octavo.diff.comparison import DiffOptions
from octavo.diff.setup import DiffRequest, compare
from octavo.engine.engine import Engine
from octavo.errors import InvalidArgumentError
from octavo.model import load_model
from octavo.models.rope import for_length
from octavo.reference.llama import ReferenceModel
from octavo.sampling_params import SamplingParams
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore:.*eos_token_id")]
LONGROPE = "phi3, long factors, window"
TOLERANCE = 1e-3
each_kind = pytest.mark.parametrize("case", [LONGROPE, DYNAMIC])


@cache
def reference(case: str) -> ReferenceModel:
    files = read_model(saved_model(case)[1])
    weights = {name: x.to_float32() for name, x in open_checkpoint(files).items()}
    return ReferenceModel(for_length(files.spec, MAX_MODEL_LEN), weights)


def engine_of(case: str, **options: int) -> Engine:
    config = {"max_model_len": MAX_MODEL_LEN, "num_kv_blocks": 60, **options}
    return load_model(saved_model(case)[1], dtype="f32", num_threads=1, **config).engine


@each_kind
@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 100, MAX_MODEL_LEN])
def test_logits_at_every_position(case: str, length: int) -> None:
    tokens, model = tokens_of(length, length), saved_model(case)[0]
    expected = whole_forward(model, tokens)
    if case == DYNAMIC and length == ORIGINAL:
        # transformers keeps the long base at this very length, unless it saw a shorter text.
        logits_of(model, tokens[:1])
        expected = logits_of(model, tokens)
    found = reference(case).forward(tokens)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    spec = reference(case).spec
    assert spec.rope_switch == ORIGINAL
    # The other set of frequencies gives something else.
    cut = ORIGINAL // 2
    wrong = reference(case).forward(
        tokens[:cut], sequence_length=0 if length > ORIGINAL else MAX_MODEL_LEN
    )
    assert np.abs(wrong - expected[:cut]).max() > TOLERANCE


@each_kind
@pytest.mark.parametrize("chunk", [7, 64])
def test_greedy_tokens_across_the_length(case: str, chunk: int) -> None:
    """Each is the most probable one after a forward pass over all tokens before it."""
    engine, model = engine_of(case, max_num_batched_tokens=chunk), saved_model(case)[0]
    params = SamplingParams(temperature=0.0, max_tokens=14)
    for length in (ORIGINAL - 7, ORIGINAL, ORIGINAL + 20):
        engine.add_request(f"{length}", tokens_of(length, 9).tolist(), params)
    for length, output in run_to_end(engine).items():
        tokens = tokens_of(int(length), 9).tolist()
        assert output.metrics.num_preemptions == (int(length) <= ORIGINAL)
        for token in output.outputs[0].token_ids:
            if case == DYNAMIC and len(tokens) == ORIGINAL:
                logits_of(model, tokens[:1])
                logits = logits_of(model, tokens)[-1]
            else:
                logits = whole_forward(model, tokens)[-1]
            assert logits[token] > logits.max() - TOLERANCE
            tokens.append(token)


def test_generate_of_transformers_crosses_the_length_alike() -> None:
    """Its Phi-3 computes the cache again there."""
    model, _ = saved_model(LONGROPE)
    prompt = tokens_of(ORIGINAL - 7, 9)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    theirs = model.generate(ids, max_new_tokens=14, do_sample=False)[0, len(prompt) :].tolist()
    engine = engine_of(LONGROPE)
    engine.add_request("one", prompt.tolist(), SamplingParams(temperature=0.0, max_tokens=14))
    assert list(run_to_end(engine)["one"].outputs[0].token_ids) == theirs


def test_octavo_diff_does_not_cross_the_length() -> None:
    request = DiffRequest(str(saved_model(LONGROPE)[1]), random=40, options=DiffOptions(steps=16))
    with pytest.raises(InvalidArgumentError, match="more than 45 tokens .* lower --steps to 5"):
        compare(request, read_environment(), lambda *_: None)


def test_dynamic_rope_goes_as_far_as_its_factor() -> None:
    _, path = saved_model(DYNAMIC)
    assert load_model(path, num_kv_blocks=20).max_model_len == ORIGINAL
    assert load_model(path, max_model_len=5 * ORIGINAL, num_kv_blocks=60).max_model_len == 225
    with pytest.raises(InvalidArgumentError, match="max_model_len is 226; expected at most 225"):
        load_model(path, max_model_len=226)
