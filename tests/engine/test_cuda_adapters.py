"""LoRA adapters on the CUDA backend: equal to the definition, and recorded steps that serve any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from adapter_runtime_helpers import KINDS, SPECS, adapters_of, logits, prompt, runtime_with
from cuda_helpers import DEVICE, needs_cuda
from reference_helpers import max_error, same_bits
from runtime_helpers import random_weights, tiny_runtime

from octavo.reference.llama import ReferenceModel

pytestmark = needs_cuda


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 3e-5), ("bf16", 0.06), ("f16", 0.01)])
@pytest.mark.parametrize("name", SPECS)
def test_equal_to_the_definition(name: str, dtype: str, tolerance: float) -> None:
    spec = SPECS[name]
    adapters, weights = adapters_of(spec), random_weights(spec)
    sequences = [(prompt(i, 9 + i), i - 1, 2 * i) for i in range(len(KINDS) + 1)]
    runtime = runtime_with(spec, adapters, dtype=dtype, device=DEVICE)
    found = logits(runtime, sequences)
    for adapter, (tokens, _, _), ours in zip([None, *adapters], sequences, found, strict=True):
        expected = ReferenceModel(spec, weights, adapter=adapter).forward(tokens)
        assert max_error(ours, expected) < tolerance


@pytest.mark.parametrize("name", ["tied", "aligned"])
def test_recorded_steps_serve_any_adapters(name: str) -> None:
    """Which row has which adapter is read on the device: a replayed step takes it as it is now."""
    spec = SPECS[name]
    adapters = adapters_of(spec)
    options: dict[str, Any] = {"device": DEVICE, "deterministic": True, "dtype": "bf16"}
    recorded = runtime_with(spec, adapters, **options)
    eager = runtime_with(spec, adapters, graphs=False, **options)
    for position, ids in enumerate([(0, 1, -1), (1, -1, 0), (4, 3, 2), (-1, 2, 2), (0, 0, 0)]):
        step = [([7 + position + 5 * s], adapter, 2 * s) for s, adapter in enumerate(ids)]
        ours = logits(recorded, step, cached=position)
        assert all(map(same_bits, ours, logits(eager, step, cached=position)))
    counts = recorded.counts()
    assert counts["replayed"] >= 3 and counts["recorded"] <= 2
    other = adapters[1]
    for runtime in (recorded, eager):  # another adapter in the same place, in the same graph
        runtime.load_adapter(0, other.native())
    step = [([50 + s], 0, 2 * s) for s in range(3)]
    ours = logits(recorded, step, cached=5)
    assert all(map(same_bits, ours, logits(eager, step, cached=5)))


def test_a_step_without_adapters_is_as_ever() -> None:
    spec = SPECS["aligned"]
    options: dict[str, Any] = {"device": DEVICE, "dtype": "bf16"}
    with_them = runtime_with(spec, adapters_of(spec), **options)
    plain = tiny_runtime(spec, **options)
    sequences = [(prompt(i, 1), -1, 2 * i) for i in range(3)]
    for _ in range(2):
        assert all(map(same_bits, logits(with_them, sequences), logits(plain, sequences)))


def test_bits_do_not_depend_on_the_neighbours() -> None:
    spec = SPECS["aligned"]
    runtime = runtime_with(spec, adapters_of(spec), device=DEVICE, deterministic=True)
    crowd = [(prompt(i, 1 + i % 5), i % 6 - 1, 2 * i) for i in range(8)]
    for sequence, found in zip(crowd, logits(runtime, crowd), strict=True):
        assert same_bits(logits(runtime, [sequence])[0], found)
        assert np.isfinite(found).all()
