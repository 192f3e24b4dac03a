"""CUDA: whole layers in five kernels have the bits of the single ops, which taps keep to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from reference_helpers import Float32
from runtime_helpers import VOCAB, make_batch, random_weights, tiny_spec

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.models.rope import default_rope
from octavo.models.spec import ModelSpec, NormSpec, WeightFormat
from octavo.reference.quantization import pack_int4

pytestmark = needs_cuda

Weights = dict[str, np.ndarray]
NUM_SEQS = 8
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def spec_of(hidden: int = 136, num_layers: int = 2, **fields: Any) -> ModelSpec:
    """Of widths that are no whole number of blocks of outputs or of inputs."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 200}
    return tiny_spec(hidden, num_layers, **{**sizes, **fields})


def runtime_of(
    spec: ModelSpec,
    format: WeightFormat | None = None,
    weights: Weights | None = None,
    dtype: str = "bf16",
    **options: Any,
) -> _native.Runtime:
    """format: of every matrix of the layers; None: dtype."""
    weights = random_weights(spec) if weights is None else weights
    codes = {name: quantized(values, format) for name, values in weights.items() if is_matrix(name)}
    runtime = _native.Runtime(
        DEVICE,
        spec,
        RuntimeOptions(
            dtype=dtype,
            kv_dtype=options.pop("kv_dtype", dtype),
            block_size=16,
            max_model_len=256,
            max_num_seqs=NUM_SEQS,
            max_num_batched_tokens=128,
            formats={name.removesuffix(".weight"): format for name in codes} if format else {},
            **options,
        ),
    )
    for name, values in weights.items():
        if format is None or name not in codes:
            runtime.load(name, values, "f32")
            continue
        stored, scales, zeros = codes[name]
        runtime.load(name, stored, format.dtype)
        runtime.load(name.removesuffix(".weight") + ".scale", scales, "f32")
        if zeros is not None:
            runtime.load(name.removesuffix(".weight") + ".zero", zeros, "f32")
    runtime.alloc_kv(5 * NUM_SEQS)
    return runtime


def is_matrix(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".weight") and "norm" not in name


def quantized(
    values: Float32, format: WeightFormat | None
) -> tuple[np.ndarray, Float32, Float32 | None]:
    """Codes, scales and zeros: not those of the numbers, but of as many, and as different."""
    if format is None:
        return values, values, None
    generator = np.random.default_rng(values.shape[0] * 31 + values.shape[1])
    shape = (values.shape[0], format.num_groups(values.shape[1]))
    if format.dtype == "int8":
        scales = generator.uniform(0.5, 2, shape) / 73 / np.sqrt(values.shape[1])
        codes = generator.integers(-127, 128, values.shape).astype(np.int8)
        return codes, scales.astype(np.float32), None
    levels = np.array(format.levels, np.float64)
    scales = generator.uniform(0.5, 2, shape) / levels.std() / np.sqrt(values.shape[1])
    zeros = generator.integers(-3, 4, shape).astype(np.float32) if format.has_zeros else None
    codes = generator.integers(0, 16, (values.shape[0], values.shape[1])).astype(np.uint8)
    return pack_int4(codes), scales.astype(np.float32), zeros


# (sequences, tokens of each), some often enough to be recorded and replayed; three and five
# sequences are padded to four and eight.
STEPS = [
    *[(1, 1)] * 3,
    *[(3, 1)] * 3,
    (2, 1),
    (5, 1),
    *[(8, 1)] * 3,
    *[(1, tokens) for tokens in range(2, 9)],
    *[(2, 4)] * 3,
    (2, 3),
]
FEW_STEPS = [*[(1, 1)] * 3, (2, 1), (4, 1), (8, 1), (1, 3), (1, 8)]
ROWS_OF_FORMATS = [(1, 1), (3, 1), (8, 1), (1, 8)]  # graphs and tables do not depend on formats


def logits_of_steps(
    runtime: _native.Runtime,
    steps: list[tuple[int, int]],
    taps: list[str] | None = None,
    all_rows: bool = True,
) -> list[Float32]:
    generator = np.random.default_rng(5)
    lengths = [0] * NUM_SEQS
    found = []
    for num_seqs, tokens in [(NUM_SEQS, 5), *steps]:
        new = []
        for s in range(num_seqs):
            ids = generator.integers(0, VOCAB, tokens).tolist()
            new.append((ids, lengths[s], [5 * s + b for b in range(5)]))
            lengths[s] += tokens
        rows = range(num_seqs * tokens) if all_rows else None
        ticket = runtime.submit(make_batch(new, rows), taps)
        found.append(runtime.logits(ticket))
        runtime.wait(ticket)
    return found


def expect_the_bits_of_ops(
    spec: ModelSpec,
    steps: list[tuple[int, int]],
    format: WeightFormat | None = None,
    all_rows: bool = True,
    **options: Any,
) -> None:
    runtimes = [runtime_of(spec, format, **options) for _ in range(2)]
    fused = logits_of_steps(runtimes[0], steps, all_rows=all_rows)
    expected = logits_of_steps(runtimes[1], steps, ["embed"], all_rows)
    counts = [runtime.counts()["kernels"] for runtime in runtimes]
    assert counts[0] < counts[1]
    for step, left, right in zip([(8, 5), *steps], fused, expected, strict=True):
        assert np.isfinite(right).all() and right.std() > 0.1
        assert (left == right).all(), step


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden": 264, "num_heads": 3, "num_kv_heads": 1, "head_dim": 128, "window": 5},
        {"head_dim": 32, "num_kv_heads": 4, "activation": "gelu", "qkv_bias": True},
        {"head_dim": 16, "activation": "gelu_tanh", "o_bias": True, "intermediate_size": 8},
        {"head_dim": 48, "activation": "relu", "mlp_bias": True, "intermediate_size": 1032},
        {"head_dim": 40},  # 20 pairs: not rotated by the product
        {"rope": None, "attention_scale": 0.3},
        {"norm": NormSpec("layer", 1e-5, True)},  # norms are kernels of their own
        {"hidden": 1160, "num_layers": 1},
        {"hidden": 4104, "num_layers": 1, "head_dim": 16, "intermediate_size": 24},
    ],
    ids=str,
)
def test_whole_layers_have_the_bits_of_ops(fields: dict[str, Any]) -> None:
    expect_the_bits_of_ops(spec_of(**fields), FEW_STEPS if fields else STEPS)


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": "head"},
        {"output_norm": NormSpec()},
        {"residual_multiplier": 0.5},
        {"norm": NormSpec("none")},
        {"attention_softcap": 0.2},
        {"rope": default_rope(1000.0, 32)},
    ],
    ids=str,
)
def test_layers_with_more_between_their_products_have_the_bits_of_ops(
    fields: dict[str, Any],
) -> None:
    spec = replace(spec_of(**fields), final_norm=NormSpec())
    left, right = (logits_of_steps(runtime_of(spec), FEW_STEPS, taps) for taps in (None, ["embed"]))
    plain = logits_of_steps(runtime_of(spec_of()), FEW_STEPS)
    for step, a, b, other in zip([(8, 5), *FEW_STEPS], left, right, plain, strict=True):
        assert np.isfinite(a).all() and (a == b).all(), step
        assert np.abs(a - other).max() > 0.01, step


EVERY_FORMAT = [
    None,
    WeightFormat("int8"),
    WeightFormat("int8", 32, scale_dtype="f16"),
    WeightFormat("int8", 96),
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, has_zeros=True),
    WeightFormat("int4", 128, scale_dtype="f32"),
    WeightFormat("int4", 128, has_zeros=True, scale_dtype="f32"),
    WeightFormat("int4", 64, levels=UNEVEN),
    WeightFormat("int4", 96, levels=UNEVEN, scale_dtype="f32"),
    WeightFormat("int4", 32, levels=UNEVEN, has_zeros=True),
    WeightFormat("int4", 256, levels=UNEVEN, has_zeros=True, scale_dtype="f32"),
]


@pytest.mark.parametrize(("format", "dtype"), [*zip(EVERY_FORMAT, cycle(["bf16", "f16"]))], ids=str)
def test_every_format_has_the_bits_of_ops(format: WeightFormat | None, dtype: str) -> None:
    expect_the_bits_of_ops(spec_of(392), ROWS_OF_FORMATS, format, dtype=dtype)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("graphs", [True, False])
def test_every_cache_has_the_bits_of_ops(kv_dtype: str, graphs: bool) -> None:
    expect_the_bits_of_ops(spec_of(), FEW_STEPS, all_rows=graphs, kv_dtype=kv_dtype, graphs=graphs)


# ---- planted errors: what one of the kernels might have got wrong, put into weights or spec ----

Planted = Callable[[ModelSpec, Weights], ModelSpec]


def swap_gate_and_up(spec: ModelSpec, weights: Weights) -> ModelSpec:
    gate, up = "layers.1.gate.weight", "layers.1.up.weight"
    weights[gate], weights[up] = weights[up], weights[gate]
    return spec


def pair_a_neighbour(spec: ModelSpec, weights: Weights) -> ModelSpec:
    q = weights["layers.1.q.weight"]
    q[[2, 3]] = q[[3, 2]]
    return spec


def swap_halves_of_a_key(spec: ModelSpec, weights: Weights) -> ModelSpec:
    weights["layers.0.k.weight"][:64] = np.roll(weights["layers.0.k.weight"][:64], 32, axis=0)
    return spec


def store_the_other_head(spec: ModelSpec, weights: Weights) -> ModelSpec:
    weights["layers.0.v.weight"] = np.roll(weights["layers.0.v.weight"], 64, axis=0)
    return spec


def add_the_last_outputs_nowhere(spec: ModelSpec, weights: Weights) -> ModelSpec:
    weights["layers.1.down.weight"][128:] = 0
    return spec


def forget_attention(spec: ModelSpec, weights: Weights) -> ModelSpec:
    weights["layers.0.o.weight"][:] = 0
    return spec


def forget_the_last_columns_of_a_norm(spec: ModelSpec, weights: Weights) -> ModelSpec:
    weights["layers.1.mlp_norm.weight"][132:] = 0
    return spec


def take_another_epsilon(spec: ModelSpec, weights: Weights) -> ModelSpec:
    layers = [replace(layer, norm=NormSpec(eps=1e-6)) for layer in spec.layers]
    return replace(spec, layers=tuple(layers))


def take_another_activation(spec: ModelSpec, weights: Weights) -> ModelSpec:
    return replace(spec, layers=tuple(replace(x, activation="gelu_tanh") for x in spec.layers))


def do_not_rotate(spec: ModelSpec, weights: Weights) -> ModelSpec:
    return replace(spec, layers=(spec.layers[0], replace(spec.layers[1], rope=None)))


@pytest.mark.parametrize(
    "plant",
    [
        swap_gate_and_up,
        pair_a_neighbour,
        swap_halves_of_a_key,
        store_the_other_head,
        add_the_last_outputs_nowhere,
        forget_attention,
        forget_the_last_columns_of_a_norm,
        take_another_epsilon,
        take_another_activation,
        do_not_rotate,
    ],
)
def test_a_planted_error_is_found(plant: Planted) -> None:
    spec = spec_of()
    weights = random_weights(spec)
    wrong = logits_of_steps(runtime_of(plant(spec, weights), weights=weights), [(1, 1)])
    right = logits_of_steps(runtime_of(spec), [(1, 1)], ["embed"])
    assert not (wrong[-1] == right[-1]).all()


# ---- launches ----


def launches_of_a_step(num_layers: int, num_seqs: int, **options: Any) -> int:
    """Of a recorded step of one token a sequence, sampling included."""
    runtime = runtime_of(spec_of(num_layers=num_layers), **options)
    launched = []
    for length in range(4):
        before = runtime.counts()
        runtime.step(make_batch([([7 + s], length, [s]) for s in range(num_seqs)]))
        after = runtime.counts()
        if after["recorded"] > before["recorded"]:
            launched.append(after["kernels"] - before["kernels"])
    (recorded,) = set(launched)
    return recorded


@pytest.mark.parametrize(
    ("num_seqs", "per_layer", "others", "options"),
    [
        (1, 5, 4, {}),
        (4, 5, 4, {}),
        (8, 7, 5, {}),  # with all norms
        (1, 5, 4, {"format": WeightFormat("int4", 64)}),
        (1, 6, 4, {"kv_dtype": "int8"}),  # with rope_and_store
    ],
    ids=str,
)
def test_a_recorded_step_has_few_launches(
    num_seqs: int, per_layer: int, others: int, options: dict[str, Any]
) -> None:
    three = launches_of_a_step(3, num_seqs, **options)
    assert three - launches_of_a_step(2, num_seqs, **options) == per_layer
    assert three - 3 * per_layer <= others  # embedding, final norm, head, drawing
