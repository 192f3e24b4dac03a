"""The native runtime: batches, tickets, taps, masks, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from runtime_helpers import VOCAB, logits_of, make_batch, random_weights, tiny_runtime, tiny_spec

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.models.layer import tap_names
from octavo.reference.llama import ReferenceModel

PROMPT = [5, 17, 80, 3, 3, 41, 9, 60, 22, 7, 55, 1, 33, 70, 12, 48, 29, 64, 2]


def test_every_tap_equals_the_reference_in_order() -> None:
    spec = tiny_spec()
    reference: dict[str, np.ndarray] = {}
    ReferenceModel(spec, random_weights(spec)).forward(np.array(PROMPT), taps=reference)
    rows = range(len(PROMPT))
    output = tiny_runtime(spec).step(make_batch([(PROMPT, 0, [7, 4])], rows), ["*"])
    assert list(output.taps) == list(reference) == tap_names(spec)
    for name, expected in reference.items():
        np.testing.assert_allclose(output.taps[name], expected, rtol=2e-5, atol=2e-5, err_msg=name)


def test_taps_are_those_asked_for() -> None:
    output = tiny_runtime().step(make_batch([(PROMPT, 0, [0, 1])]), ["layers.1.attn", "embed"])
    assert list(output.taps) == ["embed", "layers.1.attn"]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_hidden_states_of_rows_and_tokens_are_those_of_the_taps(dtype: str) -> None:
    """Without taps, ops are fused; the states and all samples have the same bits as with them."""
    spec = tiny_spec()
    runtime = tiny_runtime(spec, dtype=dtype)
    cases: list[tuple[list[Any], list[int] | None]] = [
        ([(PROMPT, 0, [7, 4]), (PROMPT[3:8], 0, [9])], [4, 18, 21, 23]),  # not every token
        ([(PROMPT[:3], 0, [7]), (PROMPT[5:9], 0, [9])], list(range(7))),  # every token
        ([(PROMPT[:1], 0, [7]), (PROMPT[5:6], 0, [9])], [0, 1]),  # decoding
        ([(PROMPT, 0, [7, 4])], []),  # part of a prompt: no rows
    ]
    for sequences, rows in cases:
        batch = make_batch(sequences, rows)
        tapped = runtime.step(batch, ["*"])
        found = {}
        for states in ("rows", "tokens"):
            output = runtime.wait(runtime.submit(batch, sample=bool(rows), states=states))
            found[states] = output.states
            assert (output.token_ids == tapped.token_ids).all()
        num_tokens = sum(len(tokens) for tokens, _, _ in sequences)
        assert found["rows"].shape == (len(rows or []), spec.hidden_size)
        assert found["tokens"].shape == (num_tokens, spec.hidden_size)
        if rows:
            assert (found["rows"] == tapped.taps["final_norm"]).all()
            assert (found["tokens"][rows] == found["rows"]).all()
            assert np.abs(found["tokens"]).min() < np.abs(found["tokens"]).max()
    assert runtime.step(make_batch(cases[0][0])).states.size == 0
    with pytest.raises(ValueError, match='states is "all"; expected rows or tokens'):
        runtime.submit(make_batch(cases[0][0]), states="all")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope": None},
        {"window": 5},
        {"activation": "gelu_tanh", "gated": False, "mlp_bias": True},
        {"activation": "gelu", "qkv_bias": True, "o_bias": True},
        {"activation": "relu"},
        {"num_heads": 5, "num_kv_heads": 1, "head_dim": 34},
        {"num_heads": 32, "num_kv_heads": 1, "head_dim": 4},
    ],
    ids=str,
)
def test_layer_fields_beyond_llama_equal_the_reference(fields: dict[str, Any]) -> None:
    spec = tiny_spec(**fields)
    expected = ReferenceModel(spec, random_weights(spec)).forward(np.array(PROMPT))
    batch = make_batch([(PROMPT, 0, [3, 8])], range(len(PROMPT)))
    np.testing.assert_allclose(logits_of(tiny_runtime(spec), batch), expected, rtol=3e-5, atol=3e-5)


def test_a_sequence_gets_the_same_bits_in_any_company_and_chunking() -> None:
    runtime = tiny_runtime()
    alone = logits_of(runtime, make_batch([(PROMPT, 0, [9, 2])], range(len(PROMPT))))
    others = [(PROMPT[i:], 0, [10 + 2 * i, 11 + 2 * i]) for i in range(3)]
    ragged = make_batch([others[0], (PROMPT, 0, [20, 5]), *others[1:]])
    shared = logits_of(runtime, ragged)
    assert (shared[1] == alone[-1]).all()
    start = 0
    for length in (1, 1, 7, 10):
        chunk = (PROMPT[start : start + length], start, [30, 31])
        chunked = logits_of(runtime, make_batch([chunk], range(length)))
        assert (chunked == alone[start : start + length]).all()
        start += length


def test_a_long_context_split_over_threads_gives_the_same_bits() -> None:
    # 600 tokens are two ranges of 512; one query, so the ranges go to different threads.
    options = {"block_size": 16, "max_model_len": 640, "max_num_seqs": 2}
    tokens = np.random.default_rng(4).integers(0, VOCAB, 600).tolist()
    results = []
    for num_threads in (1, 2, 5):
        runtime = _native.Runtime(
            "cpu",
            tiny_spec(),
            RuntimeOptions(
                "f32", "f32", max_num_batched_tokens=600, num_threads=num_threads, **options
            ),
        )
        for name, values in random_weights(tiny_spec()).items():
            runtime.load(name, values, "f32")
        runtime.alloc_kv(40)
        blocks = list(range(39, 1, -1))
        logits_of(runtime, make_batch([(tokens[:599], 0, blocks)]))
        results.append(logits_of(runtime, make_batch([(tokens[599:], 599, blocks)])))
        whole = logits_of(runtime, make_batch([(tokens, 0, blocks)]))
        assert (results[-1] == whole).all()
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_two_tickets_in_flight_and_a_token_resolved_on_the_device() -> None:
    runtime = tiny_runtime()
    first = runtime.step(make_batch([(PROMPT, 0, [0, 1])])).token_ids[0]
    expected = runtime.step(make_batch([([int(first)], len(PROMPT), [0, 1])])).token_ids[0]

    one = runtime.submit(make_batch([(PROMPT, 0, [4, 5])], state_row=3))
    runtime.sample(one)
    two = runtime.submit(make_batch([([-1 - 3], len(PROMPT), [4, 5])], state_row=3))
    with pytest.raises(ValueError, match="two tickets are in flight"):
        runtime.submit(make_batch([(PROMPT, 0, [6, 7])]))
    assert runtime.wait(one).token_ids[0] == first
    assert runtime.wait(two).token_ids[0] == expected
    with pytest.raises(ValueError, match="not open"):
        runtime.wait(two)


def test_a_step_that_draws_as_it_is_submitted() -> None:
    runtime = tiny_runtime()
    batch = make_batch([(PROMPT, 0, [0, 1])], num_logprobs=3)
    expected = runtime.submit(batch)
    runtime.sample(expected)
    ticket = runtime.submit(batch, sample=True)
    with pytest.raises(ValueError, match="sampled already"):
        runtime.sample(ticket)
    logits = runtime.logits(ticket)
    left, right = runtime.wait(expected), runtime.wait(ticket)
    assert left.token_ids == right.token_ids == logits.argmax(-1)
    assert (left.top_logprobs == right.top_logprobs).all() and left.logprobs == right.logprobs


def test_a_mask_leaves_only_allowed_tokens() -> None:
    runtime = tiny_runtime()
    masks = np.zeros((1, (VOCAB + 31) // 32), np.int32)
    masks[0, 1] = 1 << 9  # token 41
    ticket = runtime.submit(make_batch([(PROMPT, 0, [0, 1])]))
    runtime.sample(ticket, masks)
    assert runtime.wait(ticket).token_ids[0] == 41


def test_logprobs_come_best_first_and_only_where_asked_for() -> None:
    runtime = tiny_runtime()
    rows = [3, 7, 11]
    output = runtime.step(make_batch([(PROMPT, 0, [0, 1])], rows, num_logprobs=[2, -1, 0]))
    logits = logits_of(runtime, make_batch([(PROMPT, 0, [0, 1])], rows)).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(output.logprobs[[0, 2]], expected.max(-1)[[0, 2]], atol=1e-5)
    assert np.isnan(output.logprobs[1])
    assert output.top_token_ids[0].tolist() == np.argsort(-expected[0])[:2].tolist()
    assert output.top_token_ids[1:].tolist() == [[-1, -1], [-1, -1]]
    np.testing.assert_allclose(output.top_logprobs[0], np.sort(expected[0])[::-1][:2], atol=1e-5)


def test_a_row_with_nan_is_flagged_and_leaves_its_neighbours_alone() -> None:
    runtime = tiny_runtime()
    table = random_weights(tiny_spec())["embed.weight"]
    expected = runtime.step(make_batch([(PROMPT, 0, [0, 1])])).token_ids[0]
    poisoned = table.copy()
    poisoned[50] = np.nan  # an untied table, so that the head stays clean
    spec = tiny_spec()
    untied = type(spec)(**{**spec.__dict__, "tie_word_embeddings": False})
    runtime = _native.Runtime(
        "cpu", untied, RuntimeOptions("f32", "f32", 16, 256, 8, 128, num_threads=2)
    )
    for name, values in random_weights(spec).items():
        runtime.load(name, poisoned if name == "embed.weight" else values, "f32")
    runtime.load("lm_head.weight", table, "f32")
    runtime.alloc_kv(8)
    output = runtime.step(make_batch([(PROMPT, 0, [0, 1]), ([4, 50], 0, [2])]))
    assert output.finite.tolist() == [True, False]
    assert output.token_ids[0] == expected


def test_copied_blocks_continue_like_the_original() -> None:
    runtime = tiny_runtime()
    runtime.step(make_batch([(PROMPT, 0, [0, 1])]))
    runtime.copy_blocks(0, np.array([[0, 12], [1, 13]], np.int32))
    original = logits_of(runtime, make_batch([([8], len(PROMPT), [0, 1])]))
    copy = logits_of(runtime, make_batch([([8], len(PROMPT), [12, 13])]))
    assert (original == copy).all()


def test_steps_allocate_nothing() -> None:
    runtime = tiny_runtime()
    for num_seqs in range(1, 9):
        batch = make_batch([(PROMPT[:7], 0, [s, 9]) for s in range(num_seqs)])
        for _ in range(5):
            runtime.step(batch)
    runtime.step(make_batch([((PROMPT * 9)[:128], 0, list(range(8)))]))
    assert runtime.allocations() == 0


@pytest.mark.parametrize(
    ("sequences", "rows", "sampling", "message"),
    [
        ([([VOCAB], 0, [0])], None, {}, r"token_ids\[0\] is 83; expected -8 to 82"),
        ([([1, -9], 0, [0])], None, {}, r"token_ids\[1\] is -9"),
        ([([1], 0, [32])], None, {}, r"block_tables\[0\] is 32; expected 0 to 31"),
        ([([1], 16, [3])], None, {}, "needs 2 blocks"),
        ([([1], 16, [3, -1])], None, {}, r"block_tables\[1\] is -1"),
        ([([1], 256, list(range(17)))], None, {}, r"context_lens\[0\] is 257"),
        ([([1] * 129, 0, list(range(9)))], None, {}, "max_num_batched_tokens = 128"),
        ([([1], 0, [0])] * 9, None, {}, "max_num_seqs = 8"),
        ([([1, 2], 0, [0])], [1, 1], {}, r"logit_rows\[1\] is 1; expected 2 to 1"),
        (
            [([1], 0, [0])],
            None,
            {"temperature": -1},
            r"sampling\[0\].temperature is -1; .* 0 or",
        ),
        ([([1], 0, [0])], None, {"top_p": 0}, r"sampling\[0\].top_p is 0; .* above 0, at most 1"),
        ([([1], 0, [0])] * 2, None, {"top_k": [4, -1]}, r"sampling\[1\].top_k is -1"),
        ([([1], 0, [0])], None, {"min_p": np.nan}, r"sampling\[0\].min_p is nan"),
        ([([1], 0, [0])], None, {"num_logprobs": 84}, r"num_logprobs is 84; expected -1 to 83"),
        (
            [([1], 0, [0])],
            None,
            {"state_row": 8},
            r"sampling\[0\].state_row is 8; .* -1 to 7",
        ),
    ],
)
def test_a_wrong_batch_is_refused_by_name(
    sequences: list[Any], rows: list[int] | None, sampling: dict[str, Any], message: str
) -> None:
    runtime = tiny_runtime()
    with pytest.raises(ValueError, match=message):
        runtime.submit(make_batch(sequences, rows, **sampling))
    runtime.step(make_batch([(PROMPT, 0, [0, 1])]))  # and nothing is left open or broken


def test_weights_are_checked_by_name_shape_and_presence() -> None:
    runtime = _native.Runtime("cpu", tiny_spec(), RuntimeOptions("f32", "f32", 16, 256, 8, 128))
    assert len(runtime.missing_weights()) == 2 + 2 * 9
    with pytest.raises(ValueError, match='no weight named "layers.9.q.weight"'):
        runtime.load("layers.9.q.weight", np.zeros((2, 2), np.float32), "f32")
    with pytest.raises(ValueError, match=r"shape \(36\); expected \(83, 36\)"):
        runtime.load("embed.weight", np.zeros(36, np.float32), "f32")
    with pytest.raises(ValueError, match="does not hold bf16"):
        runtime.load("embed.weight", np.zeros((83, 36), np.float32), "bf16")
    runtime.alloc_kv(2)
    with pytest.raises(ValueError, match="20 weights are not loaded yet"):
        runtime.submit(make_batch([(PROMPT, 0, [0, 1])]))


@pytest.mark.parametrize(
    ("device", "field", "value", "message"),
    [
        ("tpu", "isa", "auto", 'device is "tpu"'),
        ("cpu", "isa", "avx9", 'isa is "avx9"'),
        ("cpu", "dtype", "f16", "dtype f16 is for GPUs"),
        ("cpu", "block_size", 24, "block_size is 24"),
        ("cpu", "num_threads", -1, "num_threads is -1"),
        ("cpu", "device_index", 1, "device_index is 1; expected 0 to 0"),
        ("cuda_emulated", "device_index", -1, "device_index is -1"),
        ("cpu", "world_size", 2, "world_size is 2 and rank 0; expected 1 and 0"),
        ("cpu", "rank", 1, "world_size is 1 and rank 1; expected 1 and 0"),
    ],
)
def test_wrong_options_are_refused(device: str, field: str, value: Any, message: str) -> None:
    fields: dict[str, Any] = {
        "dtype": "f32",
        "kv_dtype": "f32",
        "block_size": 16,
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
        field: value,
    }
    with pytest.raises(ValueError, match=message):
        _native.Runtime(device, tiny_spec(), RuntimeOptions(**fields))


def test_f16_and_bf16_weights_load_exactly() -> None:
    spec = tiny_spec()
    weights = random_weights(spec)
    halves = {name: values.astype(np.float16) for name, values in weights.items()}
    results = []
    for dtype in ("f16", "f32"):
        runtime = _native.Runtime("cpu", spec, RuntimeOptions("f32", "f32", 16, 256, 8, 128))
        for name, half in halves.items():
            runtime.load(name, half if dtype == "f16" else half.astype(np.float32), dtype)
        runtime.alloc_kv(2)
        results.append(logits_of(runtime, make_batch([(PROMPT, 0, [0, 1])])))
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=needs_cuda)])
def test_ranks_are_those_of_the_logits_whatever_another_row_asks_for(device: str) -> None:
    """Log-probabilities are rounded: different logits may have the same one."""
    runtime = tiny_runtime(device=device)
    batch = make_batch([([1, 2], 0, [0]), ([4], 0, [1])], num_logprobs=5)
    one = np.float32(1.0)
    logits = np.zeros(VOCAB, np.float32)
    above = np.nextafter(one, np.float32(2))
    logits[[60, 7, 40, 20, 33]] = (np.nextafter(above, np.float32(2)), one, above, one, above)

    def results(adjustments: Any) -> list[list[Any]]:
        ticket = runtime.submit(batch)
        runtime.set_logits(ticket, 0, logits)
        runtime.sample(ticket, None, adjustments)
        output = runtime.wait(ticket)
        tops = output.top_token_ids[0], output.top_logprobs[0]
        return [output.ranks[:1].tolist(), *(each.tolist() for each in tops)]

    biased = (np.array([0, 0, 1]), np.array([9]), np.ones(1), np.full(1, 0.5))  # of the second row
    types = (np.int32, np.int32, np.float32, np.float32)
    adjustments = tuple(each.astype(kind) for each, kind in zip(biased, types, strict=True))
    plain = results(None)
    assert plain[1] == [60, 33, 40, 7, 20] and len(set(plain[2])) < 3
    assert results(adjustments) == plain
