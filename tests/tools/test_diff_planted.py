"""A planted mistake is found at the right tap, named, and its op's files pointed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diff_helpers import (
    MISTAKES,
    attention_weighing,
    broken_reference,
    compare,
    gate_up_swapped,
    good_reference,
    random_weights,
    reference_with,
    rope_halves_swapped,
    rounded_weights,
    small_spec,
    tokens_for,
    whole_weights,
)

from octavo.diff import comparison
from octavo.diff.html import render
from octavo.diff.implementations import ReferenceImplementation, StepResult
from octavo.diff.report import to_json
from octavo.diff.tolerance import own_tolerance
from octavo.models.layer import Node, model_nodes, residual_before
from octavo.models.rope import linear_rope
from octavo.models.spec import NormSpec
from octavo.reference import ops
from octavo.reference.llama import ReferenceModel

SPEC = small_spec()
WEIGHTS = random_weights(SPEC)


def test_good_against_good_finds_nothing() -> None:
    result = compare(good_reference(SPEC, WEIGHTS), good_reference(SPEC, WEIGHTS), SPEC, WEIGHTS)
    assert result.ok and not result.findings and result.first_bad is None
    assert result.logits.max_abs == 0 and result.logits.same_choice == 23
    assert result.greedy.parted_at is None and result.decode.ok


def test_every_stage_tells_its_progress_up_to_the_end() -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, total: int) -> None:
        told.setdefault(what, []).append((done, total))

    one, ids = good_reference(SPEC, WEIGHTS), tokens_for(SPEC, 23)
    options = comparison.DiffOptions(steps=5, decode_rows=6)
    comparison.Comparison(one, one, one.model, ids, options, progress=progress).run("a model")
    assert len(told) == 3
    for steps in told.values():
        done, (total,) = [step[0] for step in steps], {step[1] for step in steps}
        assert done == sorted(done) and done[-1] == total > 0


def test_the_size_of_a_chunk_counts_every_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    taps: dict[str, np.ndarray] = {}
    ReferenceModel(SPEC, WEIGHTS).forward(np.arange(5, dtype=np.int32), taps=taps)
    bytes_per_token = sum(values.nbytes for values in taps.values()) // 5
    monkeypatch.setattr(comparison, "CHUNK_BYTES", 100 * bytes_per_token)
    assert comparison.chunk_size_for(SPEC) == 100
    monkeypatch.setattr(comparison, "CHUNK_BYTES", 100 * bytes_per_token - 1)
    assert comparison.chunk_size_for(SPEC) == 99


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_on_the_left(mistake: str, chunk_size: int | None) -> None:
    tap, op, words = MISTAKES[mistake]
    result = compare(
        broken_reference(mistake, SPEC, WEIGHTS),
        good_reference(SPEC, WEIGHTS),
        SPEC,
        WEIGHTS,
        chunk_size=chunk_size,
    )
    assert not result.ok
    assert result.first_bad.name == tap
    first = result.findings[0]
    assert (first.side, first.tap, first.op) == ("broken", tap, op)
    assert op in first.files and "reference/ops.py" in first.files
    if words is not None:
        assert words in first.mistake
    parts = {name.split(".")[-1] for finding in result.findings for name in finding.taps}
    expected = {
        "rope halves swapped": {"q_rope", "k_rope"},
        "rope of neighbours": {"q_rope", "k_rope"},
        "epsilon outside": {"attn_norm", "mlp_norm", "final_norm"},
        "k and v swapped": {"k", "v"},
        "rows in pairs": {"q", "k"},
        "pairs undone twice": {"q", "k"},
    }.get(mistake, {tap.split(".")[-1]})
    assert parts == expected, "ops that are right must not be blamed for their inputs"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_on_the_right(mistake: str) -> None:
    tap, op, _ = MISTAKES[mistake]
    result = compare(
        good_reference(SPEC, WEIGHTS),
        broken_reference(mistake, SPEC, WEIGHTS),
        SPEC,
        WEIGHTS,
        steps=0,
    )
    assert (result.findings[0].side, result.findings[0].tap) == ("broken", tap)
    assert result.findings[0].op == op


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_in_bf16(mistake: str) -> None:
    """Rounding to bf16 hides nothing from the judgement of single ops."""
    tap, op, words = MISTAKES[mistake]
    options = {"dtype": "bf16", "kv_dtype": "bf16"}
    exact = good_reference(SPEC, good_reference(SPEC, WEIGHTS, **options).model.weights)
    result = compare(
        broken_reference(mistake, SPEC, WEIGHTS, **options),
        good_reference(SPEC, WEIGHTS, **options),
        SPEC,
        WEIGHTS,
        dtype="bf16",
        truth=exact,
    )
    assert (result.first_bad.name, result.findings[0].op) == (tap, op)
    assert words is None or words in result.findings[0].mistake


def _not_whole(powers: Any) -> Any:
    weights = np.exp2(powers - powers.max())
    return ops.round_to_bf16(weights), weights.sum()


def _normalized_first(powers: Any) -> Any:
    weights = whole_weights(powers)
    return ops.round_to_bf16(weights / weights.sum()), np.float32(1)


def _sum_of_rounded(powers: Any) -> Any:
    weights = ops.round_to_bf16(whole_weights(powers))
    return weights, weights.sum()


# Attention over a bf16 cache that rounds something else: how -> words of the recognized mistake.
ROUNDINGS: dict[str, tuple[Callable[..., Any], str]] = {
    "float32 attention": (
        lambda q, k, v, scale, window=0, dtype="f32", cap=0: ops.attention(q, k, v, scale, window),
        "neither queries nor weights",
    ),
    "weights not rounded": (
        attention_weighing(lambda powers: (whole_weights(powers), whole_weights(powers).sum())),
        "weights not rounded",
    ),
    "queries not rounded": (attention_weighing(rounded_weights, False), "queries not rounded"),
    "maximum not whole": (attention_weighing(_not_whole), "not from a whole number"),
    "normalized first": (attention_weighing(_normalized_first), "divided by their sum before"),
    "sum of rounded": (attention_weighing(_sum_of_rounded), "sum taken after rounding"),
}


def _compare_roundings(
    attention: Callable[..., Any], spec: Any, weights: Any, **options: Any
) -> Any:
    """A reference in bf16 with this attention against the right one."""
    dtypes = {"dtype": "bf16", "kv_dtype": "bf16"}
    model = reference_with(attention=attention).ReferenceModel(spec, weights, **dtypes)
    right = good_reference(spec, weights, **dtypes)
    exact = good_reference(spec, right.model.weights)
    left = ReferenceImplementation(model, "broken", False)
    return compare(left, right, spec, weights, dtype="bf16", truth=exact, steps=0, **options)


@pytest.mark.parametrize(("factor", "named"), [(1.0, True), (1.05, False)])
def test_a_mistake_is_named_only_if_it_explains_all(factor: float, named: bool) -> None:
    """Over a cache of bfloat16 what it gives may be off by one step, and by no more."""

    def attention(q: Any, k: Any, v: Any, scale: float, *rest: Any) -> Any:
        return np.float32(factor) * ops.attention(q, k, v, 1.0, *rest)

    (finding,) = _compare_roundings(attention, SPEC, WEIGHTS).findings
    assert finding.op == "attention" and ("no scale" in (finding.mistake or "")) == named


@pytest.mark.parametrize("mistake", ROUNDINGS)
@pytest.mark.parametrize("window", [0, 6])
def test_attention_that_rounds_something_else_is_found(mistake: str, window: int) -> None:
    attention, words = ROUNDINGS[mistake]
    result = _compare_roundings(attention, small_spec(window=window), WEIGHTS, chunk_size=9)
    assert [finding.op for finding in result.findings] == ["attention"]
    assert len(result.findings[0].taps) == len(SPEC.layers) and not result.ok
    assert words in result.findings[0].mistake


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_attention_in_another_order_of_sums_is_right(size: float) -> None:
    """Many tokens: some weights are rounded the other way. Larger queries make larger scores."""
    spec = small_spec(num_layers=2, head_dim=32)
    weights = random_weights(spec)
    for index in range(2):
        weights[f"layers.{index}.q.weight"] *= np.float32(size)
    right = attention_weighing(rounded_weights)
    result = _compare_roundings(right, spec, weights, count=240, chunk_size=100)
    assert not result.findings
    attention = [tap for tap in result.taps if tap.part == "attn"]
    assert all(0 < tap.own[0] < 1e-5 for tap in attention)


def test_two_mistakes_are_both_found() -> None:
    """The first mistake does not hide the second, although everything after it differs."""
    module = reference_with(rope=rope_halves_swapped, gated_activation=gate_up_swapped)
    model = module.ReferenceModel(SPEC, WEIGHTS)
    result = compare(
        ReferenceImplementation(model, "broken", False),
        good_reference(SPEC, WEIGHTS),
        SPEC,
        WEIGHTS,
        steps=0,
    )
    assert [finding.tap for finding in result.findings] == ["layers.0.q_rope", "layers.0.act"]
    assert len(result.findings[0].taps) == 2 * len(SPEC.layers), "q and k: one mistake"
    assert len(result.findings[1].taps) == len(SPEC.layers)


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(num_heads=4, num_kv_heads=1, head_dim=10, tied=True),
        small_spec(qkv_bias=True, o_bias=True, mlp_bias=True, activation="gelu"),
        small_spec(gated=False, activation="relu", norm=NormSpec("layer", 1e-5, True)),
        replace(small_spec(rope=None), learned_positions=True),
        small_spec(window=5, rope=linear_rope(10000.0, 8, 3.0)),
    ],
    ids=[
        "multi-query tied",
        "biases gelu",
        "ungated layer norm",
        "learned positions",
        "window linear",
    ],
)
def test_every_kind_of_layer_is_found_right(spec: object) -> None:
    weights = random_weights(spec, seed=3)
    left = good_reference(spec, weights)
    left.is_definition = False  # so that its ops are checked
    exact = good_reference(spec, weights, compute=np.float64)
    exact.name = "float64"
    result = compare(left, exact, spec, weights, chunk_size=9)
    assert result.ok, result.findings
    assert all(tap.own[0] is not None for tap in result.taps)
    assert not result.missing


class _Between:
    """A reference that also gives the residual stream between attention and MLP, or half of it."""

    def __init__(self, broken: bool) -> None:
        self.right, self.broken = good_reference(SPEC, WEIGHTS), broken
        self.name, self.is_definition = "octavo", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def feed(self, token_ids: Any, **wanted: Any) -> StepResult:
        step = self.right.feed(token_ids, **wanted)
        taps = dict(step.taps)
        for index in range(len(SPEC.layers) if taps else 0):
            attn_out = taps[f"layers.{index}.attn_out"]
            residual = 0 if self.broken else taps[residual_before(index)]
            taps[f"layers.{index}.between"] = residual + attn_out
        return StepResult(step.logits, step.next_token, taps)


@pytest.mark.parametrize("broken", [False, True])
def test_a_new_tap_of_a_known_op_is_one_line_in_the_list(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    def with_between(spec: Any) -> list[Node]:
        nodes = []
        for node in model_nodes(spec):
            nodes.append(node)
            if node.part == "attn_out":
                inputs = (residual_before(node.layer or 0), node.tap)
                tap = f"layers.{node.layer}.between"
                nodes.append(Node(tap, "add_norm", inputs, spec.hidden_size))
        return nodes

    for module in ("comparison", "definition"):
        monkeypatch.setattr(f"octavo.diff.{module}.model_nodes", with_between)
    result = compare(_Between(broken), _Between(False), SPEC, WEIGHTS, steps=0)
    assert len(result.taps) == len(model_nodes(SPEC)) + len(SPEC.layers) and not result.missing
    assert all(tap.own[0] is not None for tap in result.taps)
    assert result.ok is not broken and "between" in to_json(result) and "between" in render(result)
    for finding in result.findings:
        assert (finding.tap, finding.op) == ("layers.0.between", "add_norm")
        assert finding.mistake == "the sum without the residual"
        assert len(finding.taps) == len(SPEC.layers) and finding.hint
    assert len(result.findings) == broken


def test_nan_counts_as_a_difference() -> None:
    weights = dict(WEIGHTS)
    weights["layers.1.up.weight"] = WEIGHTS["layers.1.up.weight"].copy()
    weights["layers.1.up.weight"][3, 5] = np.nan
    result = compare(
        good_reference(SPEC, weights), good_reference(SPEC, WEIGHTS), SPEC, WEIGHTS, steps=0
    )
    assert result.first_bad.name == "layers.1.up" and result.first_bad.relative == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_has_no_room(value: float) -> None:
    """A broken attention over a bf16 cache, in one number: found, and no other op is."""

    def broken(*arguments: Any) -> Any:
        out = ops.attention(*arguments)
        out[-1, 2, 3] = value
        return out

    with np.errstate(all="ignore"):  # of what comes after it
        result = _compare_roundings(broken, SPEC, WEIGHTS)
    assert result.first_bad.name == "layers.0.attn" and not result.ok
    assert result.first_bad.own[0] > 0.9


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_own_tolerance_does_not_stretch(dtype: str) -> None:
    """Results a ten-thousandth off, in one op alone, are found, in bf16 as well."""

    def slightly_off(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
        return ops.gated_activation(gate, up, activation) * np.float32(1.0001)

    options = {"dtype": dtype, "kv_dtype": dtype}
    model = reference_with(gated_activation=slightly_off).ReferenceModel(SPEC, WEIGHTS, **options)
    right = good_reference(SPEC, WEIGHTS, **options)
    exact = good_reference(SPEC, right.model.weights)
    left = ReferenceImplementation(model, "broken", False)
    result = compare(left, right, SPEC, WEIGHTS, dtype=dtype, truth=exact, steps=0)
    assert [finding.op for finding in result.findings] == ["gated_activation"]
    assert len(result.findings[0].taps) == len(SPEC.layers) and not result.ok


def test_own_tolerance_grows_with_what_is_summed() -> None:
    """Not where fewer than 64 numbers are: exponentials and divisions round, too."""
    spec = replace(small_spec(num_heads=12, intermediate_size=150), hidden_size=100)
    units = {
        node.part: own_tolerance(spec, node, 300, rounds_output=False) * 2**24
        for node in model_nodes(spec)
    }
    summed = {"q": 100, "logits": 100, "attn_out": 96, "mlp_out": 150, "mlp_norm": 100}
    summed |= {"embed": 64, "q_rope": 64, "act": 64, "out": 64, "final_norm": 100}
    for part, count in summed.items():
        assert units[part] == pytest.approx(8 * count**0.5), part
    assert units["attn"] == pytest.approx(24 * (8 + 300) ** 0.5)


def test_a_broken_definition_is_suspected_when_both_agree() -> None:
    """Both are right and the yardstick is wrong: the report must not send anyone to either."""
    left, right = good_reference(SPEC, WEIGHTS), good_reference(SPEC, WEIGHTS)
    left.is_definition = right.is_definition = False
    left.name, right.name = "octavo", "Hugging Face"
    judge_weights = dict(WEIGHTS)
    judge_weights["layers.0.up.weight"] = 2 * WEIGHTS["layers.0.up.weight"]
    result = compare(left, right, SPEC, judge_weights, steps=0)
    assert [(finding.tap, finding.side) for finding in result.findings] == [("layers.0.up", "")]
    assert result.findings[0].title == "the definition of linear stands alone"


@pytest.mark.parametrize(("nudge", "tie"), [(0.02, True), (3.0, False)])
def test_greedy_tokens_may_differ_in_bf16_where_rounding_explains_it(
    monkeypatch: pytest.MonkeyPatch, nudge: float, tie: bool
) -> None:
    """The right one's second choice is lifted over its first by `nudge`."""
    options = {"dtype": "bf16", "kv_dtype": "bf16"}
    left, right = good_reference(SPEC, WEIGHTS, **options), good_reference(SPEC, WEIGHTS, **options)
    exact = good_reference(SPEC, left.model.weights)
    feed = right.feed

    def feed_nudged(token_ids: np.ndarray, **wanted: bool) -> StepResult:
        step = feed(token_ids, **wanted)
        if len(token_ids) > 1:
            return step
        logits = step.logits.copy()
        first, second = np.argsort(logits[0])[:-3:-1]
        logits[0, second] = logits[0, first] + nudge
        return StepResult(logits, int(second), step.taps)

    monkeypatch.setattr(right, "feed", feed_nudged)
    result = compare(left, right, SPEC, WEIGHTS, dtype="bf16", truth=exact, steps=12)
    assert result.greedy.parted_at == 1
    wide = result.greedy.left_margin > 0.05
    assert result.greedy.tie is (tie and not wide)
    assert result.ok is result.greedy.tie


def test_greedy_tokens_may_not_differ_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = good_reference(SPEC, WEIGHTS), good_reference(SPEC, WEIGHTS)
    feed = right.feed

    def feed_other(token_ids: np.ndarray, **wanted: bool) -> StepResult:
        step = feed(token_ids, **wanted)
        return StepResult(step.logits, 7, step.taps) if len(token_ids) == 1 else step

    monkeypatch.setattr(right, "feed", feed_other)
    result = compare(left, right, SPEC, WEIGHTS)
    assert result.first_bad is None and not result.greedy.tie and not result.ok
