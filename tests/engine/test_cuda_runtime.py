"""Whole models on the CUDA backend: wiring, recorded steps, steps ahead, and the diff."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from diff_helpers import tokens_for, write_model
from runtime_helpers import VOCAB, logits_of, make_batch, random_weights, tiny_runtime, tiny_spec

from octavo import _native
from octavo.diff.comparison import Comparison, DiffOptions
from octavo.diff.implementations import ReferenceImplementation
from octavo.diff.native import load_native
from octavo.models.layer import tap_names
from octavo.models.rope import default_rope
from octavo.models.spec import ModelSpec, NormSpec
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

pytestmark = needs_cuda

PROMPT = [5, 17, 80, 3, 3, 41, 9, 60, 22, 7, 55, 1, 33, 70, 12, 48, 29, 64, 2]
# Where the fast kernels are at home; tiny_spec() alone is for the general ones.
LLAMA_LIKE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
CAPPED: dict[str, Any] = {
    "attention_softcap": 2.0,
    "output_norm": NormSpec(),
    "qk_norm": "head",
    "residual_multiplier": 0.8,
    "rope": default_rope(1000.0, 32),
}


def cuda_runtime(spec: ModelSpec | None = None, **fields: Any) -> _native.Runtime:
    return tiny_runtime(spec, device=DEVICE, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        LLAMA_LIKE,
        {"rope": None},
        {"window": 5},
        {"activation": "gelu_tanh", "gated": False, "mlp_bias": True},
        {"activation": "gelu", "qkv_bias": True, "o_bias": True},
        {"activation": "relu", "num_heads": 5, "num_kv_heads": 1, "head_dim": 34},
        {"qk_norm": "head", "rope": default_rope(1000.0, 6)},
        {"qk_norm": "row", "norm": NormSpec("none", 1e-3), "output_norm": NormSpec(), **LLAMA_LIKE},
        {"attention_softcap": 0.7, "output_norm": NormSpec(), "residual_multiplier": 0.4},
        {"attention_softcap": 0.7, "rope": default_rope(1000.0, 32), **LLAMA_LIKE},
    ],
    ids=str,
)
def test_every_tap_equals_the_reference(fields: dict[str, Any]) -> None:
    spec = replace(tiny_spec(**fields), final_norm=NormSpec())
    if "attention_softcap" in fields:
        spec = replace(spec, embed_multiplier=2.1, logits_multiplier=0.3, logits_softcap=0.9)
    reference: dict[str, np.ndarray] = {}
    ReferenceModel(spec, random_weights(spec)).forward(np.array(PROMPT), taps=reference)
    rows = range(len(PROMPT))
    output = cuda_runtime(spec).step(make_batch([(PROMPT, 0, [7, 4])], rows), ["*"])
    assert list(output.taps) == list(reference) == tap_names(spec)
    for name, expected in reference.items():
        np.testing.assert_allclose(output.taps[name], expected, rtol=3e-5, atol=3e-5, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.04), ("f16", 0.005)])
@pytest.mark.parametrize("kv_dtype", ["same", "int8"])
@pytest.mark.parametrize("fields", [{}, CAPPED], ids=["plain", "capped"])
def test_sixteen_bits_stay_near_the_reference(
    dtype: str, tolerance: float, kv_dtype: str, fields: dict[str, Any]
) -> None:
    spec = tiny_spec(**LLAMA_LIKE, **fields)
    expected = ReferenceModel(spec, random_weights(spec)).forward(np.array(PROMPT))
    kv = dtype if kv_dtype == "same" else kv_dtype
    runtime = cuda_runtime(spec, dtype=dtype, kv_dtype=kv)
    whole = logits_of(runtime, make_batch([(PROMPT, 0, [3, 8])], range(len(PROMPT))))
    if kv == "int8":
        tolerance += 0.02
    if fields:  # six more results of a layer are rounded, beside ten
        tolerance *= 1.6
    assert np.abs(whole - expected).max() < tolerance * expected.std()


def decode(runtime: _native.Runtime, num_seqs: int, steps: int, **sampling: Any) -> list[Any]:
    """Token ids and log-probabilities of sequences that start with prompts of their own."""
    blocks = [[3 * s, 3 * s + 1, 3 * s + 2] for s in range(num_seqs)]
    prompts = [PROMPT[: 3 + 2 * s] for s in range(num_seqs)]
    told = {name: values[:num_seqs] for name, values in sampling.items()}
    told["num_logprobs"] = 0
    found = []
    start = [(p, 0, b) for p, b in zip(prompts, blocks, strict=True)]
    output = runtime.step(make_batch(start, **told))
    for step in range(steps):
        found.append((output.token_ids.tolist(), output.logprobs.tolist()))
        new = [
            ([token], len(p) + step, b)
            for token, p, b in zip(output.token_ids.tolist(), prompts, blocks, strict=True)
        ]
        output = runtime.step(make_batch(new, **told))
    return [*found, (output.token_ids.tolist(), output.logprobs.tolist())]


SAMPLING = {
    "temperature": [0.0, 0.9, 1.3, 0.7, 0.0],
    "top_k": [0, 20, 0, 5, 0],
    "top_p": [1.0, 0.9, 0.95, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.01, 0.0, 0.0],
    "seed": [1, 2**63 + 9, 3, 4, 5],
    "sample_index": [0, 1, 0, 2, 0],
}


@pytest.mark.parametrize("num_seqs", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_replayed_steps_equal_eager_ones_bit_for_bit(dtype: str, num_seqs: int) -> None:
    """Three and five sequences are padded to four and eight."""
    spec = tiny_spec(**LLAMA_LIKE)
    eager = cuda_runtime(spec, dtype=dtype, graphs=False)
    recorded = cuda_runtime(spec, dtype=dtype)
    expected = decode(eager, num_seqs, 6, **SAMPLING)
    for _ in range(2):
        assert decode(recorded, num_seqs, 6, **SAMPLING) == expected
    assert eager.counts()["replayed"] == 0
    # Of 12 decoding steps the first of each flight runs as it is.
    assert recorded.counts()["replayed"] >= 10


@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_can_start_before_the_one_before_is_read(graphs: bool) -> None:
    spec = tiny_spec(**LLAMA_LIKE)
    expected = [tokens for tokens, _ in decode(cuda_runtime(spec), 3, 5)]
    runtime = cuda_runtime(spec, graphs=graphs)
    blocks = [[3 * s, 3 * s + 1, 3 * s + 2] for s in range(3)]
    prompts = [PROMPT[: 3 + 2 * s] for s in range(3)]
    state = {"state_row": [2, 0, 1]}
    tickets = [runtime.submit(make_batch([*zip(prompts, [0] * 3, blocks, strict=True)], **state))]
    runtime.sample(tickets[0])
    found = []
    for step in range(5):
        new = [
            ([-1 - r], len(p) + step, b) for r, p, b in zip((2, 0, 1), prompts, blocks, strict=True)
        ]
        tickets.append(runtime.submit(make_batch(new, **state)))
        runtime.sample(tickets[-1])
        found.append(runtime.wait(tickets.pop(0)).token_ids.tolist())
    found.append(runtime.wait(tickets.pop(0)).token_ids.tolist())
    assert found == expected


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_deterministic_bits_do_not_depend_on_company_or_chunks(dtype: str) -> None:
    spec = tiny_spec(**LLAMA_LIKE)
    runtime = cuda_runtime(spec, dtype=dtype, deterministic=True)
    alone = logits_of(runtime, make_batch([(PROMPT, 0, [9, 2])], range(len(PROMPT))))
    others = [(PROMPT[i:], 0, [10 + 2 * i, 11 + 2 * i]) for i in range(3)]
    shared = logits_of(runtime, make_batch([others[0], (PROMPT, 0, [20, 5]), *others[1:]]))
    assert (shared[1] == alone[-1]).all()
    start = 0
    for length in (1, 1, 7, 10):
        chunk = (PROMPT[start : start + length], start, [30, 31])
        chunked = logits_of(runtime, make_batch([chunk], range(length)))
        assert (chunked == alone[start : start + length]).all()
        start += length


def test_masks_and_top_logprobs() -> None:
    spec = tiny_spec(**LLAMA_LIKE)
    cuda, cpu = cuda_runtime(spec), tiny_runtime(spec)
    masks = np.zeros((2, -(-VOCAB // 32)), np.int32)
    masks[0, 1], masks[1, 2] = 0b1011 << 4, 0b1 << 7
    outputs = []
    for runtime in (cuda, cpu):
        batch = make_batch(
            [(PROMPT, 0, [0, 1]), (PROMPT[:4], 0, [2])],
            num_logprobs=[2, 5],
            temperature=[0.8, 0.0],
            seed=[3, 4],
        )
        ticket = runtime.submit(batch)
        runtime.sample(ticket, masks)
        outputs.append(runtime.wait(ticket))
    left, right = outputs
    assert left.token_ids.tolist() == right.token_ids.tolist()
    assert left.token_ids[1] == 71 and left.token_ids[0] in (36, 37, 39)
    assert left.top_token_ids.tolist() == right.top_token_ids.tolist()
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-4)
    np.testing.assert_allclose(left.top_logprobs, right.top_logprobs, atol=1e-4)


def test_a_step_without_logit_rows_stores_its_keys() -> None:
    spec = tiny_spec(**LLAMA_LIKE)
    runtime = cuda_runtime(spec)
    expected = logits_of(runtime, make_batch([(PROMPT, 0, [0, 1])]))
    assert len(runtime.step(make_batch([(PROMPT[:11], 0, [4, 5])], [])).token_ids) == 0
    found = logits_of(runtime, make_batch([(PROMPT[11:], 11, [4, 5])]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_copied_blocks_are_read() -> None:
    spec = tiny_spec(**LLAMA_LIKE)
    runtime = cuda_runtime(spec)
    runtime.step(make_batch([(PROMPT[:-1], 0, [4, 5])]))
    expected = logits_of(runtime, make_batch([(PROMPT[-1:], 18, [4, 5])]))
    runtime.copy_blocks(0, np.array([[4, 11], [5, 20]], np.int32))
    runtime.step(make_batch([(PROMPT, 0, [0, 1]), (PROMPT[::-1], 0, [4, 5])]))  # overwritten
    found = logits_of(runtime, make_batch([(PROMPT[-1:], 18, [11, 20])]))
    assert (found == expected).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_octavo_diff_finds_nothing(tmp_path: Path, dtype: str) -> None:
    files = read_model(write_model(tmp_path))
    checkpoint = open_checkpoint(files)
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    model = ReferenceModel(files.spec, weights, dtype=dtype, kv_dtype=dtype)
    left = load_native(files, checkpoint, device=DEVICE, dtype=dtype, max_tokens=49, chunk_size=9)
    truth = (
        ReferenceImplementation(ReferenceModel(files.spec, model.weights))
        if dtype == "bf16"
        else None
    )
    options = DiffOptions(steps=8, decode_rows=12, chunk_size=9)
    ids = tokens_for(files.spec, 41)
    result = Comparison(left, ReferenceImplementation(model), model, ids, options, truth).run(
        "small"
    )
    assert result.ok, (result.first_bad, result.findings)


def test_octavo_diff_names_a_planted_mistake(tmp_path: Path) -> None:
    files = read_model(write_model(tmp_path))
    checkpoint = open_checkpoint(files)
    model = ReferenceModel(files.spec, {n: t.to_float32() for n, t in checkpoint.items()})
    layers = tuple(replace(layer, norm=NormSpec(eps=1e-6)) for layer in files.spec.layers)
    wrong = replace(files, spec=replace(files.spec, layers=layers))
    left = load_native(wrong, checkpoint, device=DEVICE, dtype="f32", max_tokens=49, chunk_size=9)
    ids, options = tokens_for(files.spec, 41), DiffOptions(steps=0, decode_rows=0, chunk_size=9)
    result = Comparison(left, ReferenceImplementation(model), model, ids, options).run("small")
    assert result.first_bad.name == "layers.0.attn_norm"
    assert result.findings[0].mistake == "epsilon 1e-06 instead of 1e-05"
    assert "csrc/cuda/elementwise/norm.cu" in result.findings[0].files


def test_what_a_device_cannot_run_is_said() -> None:
    with pytest.raises(ValueError, match="head_dim is 300"):
        cuda_runtime(tiny_spec(head_dim=300))
