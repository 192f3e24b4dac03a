"""LoRA adapters in the native core: equal to the definition, and rows that know only their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from adapter_runtime_helpers import KINDS, SPECS, adapters_of, logits, prompt, runtime_with
from reference_helpers import max_error, same_bits
from runtime_helpers import random_weights, tiny_runtime

from octavo import _native
from octavo.reference.llama import ReferenceModel


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_equal_to_the_definition(name: str, dtype: str) -> None:
    spec = SPECS[name]
    adapters, weights = adapters_of(spec), random_weights(spec)
    sequences = [(prompt(i, 9 + i), i - 1, 2 * i) for i in range(len(KINDS) + 1)]
    plain = ReferenceModel(spec, weights, dtype=dtype, kv_dtype=dtype)
    expected = [plain.forward(sequences[0][0])]
    for adapter, (tokens, _, _) in zip(adapters, sequences[1:], strict=True):
        reference = ReferenceModel(spec, weights, dtype=dtype, kv_dtype=dtype, adapter=adapter)
        expected.append(reference.forward(tokens))
        assert max_error(plain.forward(tokens), expected[-1]) > 0.02
    # A number near the middle of two bf16 may be rounded either way after another order of sums.
    tolerance = 2e-5 if dtype == "f32" else 0.03
    first: list[np.ndarray] = []
    for isa in _native.available_isas():
        runtime = runtime_with(spec, adapters, dtype=dtype, isa=isa)
        found = logits(runtime, sequences)
        for ours, theirs in zip(found, expected, strict=True):
            assert max_error(ours, theirs) < tolerance, isa
        first = first or found
        if dtype == "f32":  # instructions that multiply bf16 sum in an order of their own
            assert all(map(same_bits, found, first)), isa


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bits_do_not_depend_on_the_neighbours(dtype: str) -> None:
    """Alone, among 17 with other adapters, in chunks; and without an adapter as ever."""
    spec = SPECS["tied"]
    adapters = adapters_of(spec)
    options: dict[str, Any] = {"dtype": dtype, "num_blocks": 40, "max_num_seqs": 17}
    runtime = runtime_with(spec, adapters, max_num_batched_tokens=256, **options)
    crowd = [(prompt(i, 1 + i % 13), i % 6 - 1, 2 * i) for i in range(17)]
    together = logits(runtime, crowd)
    plain = tiny_runtime(spec, max_num_batched_tokens=256, **options)
    for sequence, found in zip(crowd, together, strict=True):
        assert same_bits(logits(runtime, [sequence])[0], found)
        last = logits(runtime, [sequence], every_row=False)[0]
        assert same_bits(last[0], found[-1])
        if sequence[1] < 0:
            assert same_bits(logits(plain, [sequence])[0], found)
    tokens, adapter, block = prompt(3, 21), 0, 4
    whole = logits(runtime, [(tokens, adapter, block)])[0]
    parts = [
        logits(runtime, [(tokens[at : at + 7], adapter, block), (prompt(1, 5), 3, 8)], cached=at)[0]
        for at in (0,)
    ]
    parts += [
        logits(runtime, [(tokens[at : at + 7], adapter, block)], cached=at)[0] for at in (7, 14)
    ]
    assert same_bits(np.concatenate(parts), whole)


def test_many_rows_of_one_adapter() -> None:
    """More rows than a piece has, and than are computed at once: each is as it would be alone."""
    spec = SPECS["aligned"]
    options: dict[str, Any] = {"num_blocks": 64, "max_num_batched_tokens": 640, "max_num_seqs": 20}
    runtime = runtime_with(spec, adapters_of(spec), **options)
    crowd = [(prompt(i, 30), i % 3 // 2, 2 * i) for i in range(20)]
    for sequence, found in list(zip(crowd, logits(runtime, crowd), strict=True))[::3]:
        assert same_bits(logits(runtime, [sequence])[0], found)


def test_parts_that_share_a() -> None:
    """As those of a fused matrix do: the same bits as with an A of their own each."""
    spec = SPECS["tied"]
    own = adapters_of(spec)[1].native()  # of rank 16: three times that fill whole panels
    a = own["layers.0.q"][0]
    shared = {**own, "layers.0.k": (a, own["layers.0.k"][1])}
    apart = {**own, "layers.0.k": (a.copy(), own["layers.0.k"][1])}
    runtime = runtime_with(spec, [])
    sequence = (prompt(2, 8), 0, 0)
    found, weights = [], []
    for matrices in (shared, apart, own):
        runtime.load_adapter(0, matrices)
        found.append(logits(runtime, [sequence])[0])
        weights.append(runtime.memory()["weights"])
    assert same_bits(found[0], found[1]) and not same_bits(found[1], found[2])
    assert weights[0] < weights[1] == weights[2]


def test_a_step_without_adapters_is_as_ever() -> None:
    spec = SPECS["untied"]
    with_them, plain = runtime_with(spec, adapters_of(spec)), tiny_runtime(spec)
    sequences = [(prompt(i, 6), -1, 2 * i) for i in range(3)]
    assert all(map(same_bits, logits(with_them, sequences), logits(plain, sequences)))
    assert with_them.memory()["weights"] > plain.memory()["weights"]


def test_loaded_over_and_unloaded() -> None:
    spec = SPECS["tied"]
    one, two = adapters_of(spec)[:2]
    runtime = runtime_with(spec, [one, one])
    sequence = (prompt(2, 8), 1, 0)
    first = logits(runtime, [sequence])[0]
    runtime.load_adapter(1, two.native())
    second = logits(runtime, [sequence])[0]
    assert not same_bits(first, second)
    assert same_bits(logits(runtime_with(spec, [two, two]), [sequence])[0], second)
    runtime.unload_adapter(1)
    runtime.unload_adapter(1)
    with pytest.raises(ValueError, match="adapter_ids names place 1, where no adapter is"):
        logits(runtime, [sequence])
    assert same_bits(logits(runtime, [(sequence[0], 0, 0)])[0], first)


def test_refused() -> None:
    spec = SPECS["tied"]
    runtime, good = tiny_runtime(spec), adapters_of(spec)[0].native()
    a, b = good["layers.1.k"]
    for slot, matrices, message in (
        (-1, good, "slot is -1"),
        (1024, good, "slot is 1024; expected 0 to 1023"),
        (0, {}, "has no matrices"),
        (0, {"layers.2.k": (a, b)}, 'no matrix named "layers.2.k"'),
        (0, {"layers.1.k": (a[:, 1:].copy(), b)}, "expected at least 1 row of 36 and 20 rows"),
        (0, {"layers.1.k": (a, b[1:])}, "B 19 rows"),
        (0, {"layers.1.k": (a[1:], b)}, "expected the same rank"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.load_adapter(slot, matrices)
    with pytest.raises(ValueError, match=r"adapter_ids\[0\] is 0; expected -1 to -1"):
        logits(runtime, [(prompt(0, 4), 0, 0)])
