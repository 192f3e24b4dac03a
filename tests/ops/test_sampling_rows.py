"""A row of sampling options is one thing in Python, in the reference and in the native core."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from runtime_helpers import tiny_runtime

from octavo import _native, _native_ops
from octavo.reference.sampling import SAMPLING_ROW, sampling_rows


def batch(**arguments: Any) -> _native.Batch:
    """One token of one sequence."""
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    return _native.Batch(zero, np.array([0, 1], np.int32), one, zero[None, None], zero, **arguments)


def test_what_is_not_given_has_its_default() -> None:
    rows = sampling_rows(2, top_k=[3, 4], seed=2**64 - 1)
    assert rows.dtype == SAMPLING_ROW
    greedy = {"temperature": 0, "top_p": 1, "min_p": 0, "num_logprobs": -1, "state_row": -1}
    for name, value in {**greedy, "sample_index": 0, "position": 0, "seed": 2**64 - 1}.items():
        assert rows[name].tolist() == [value, value]
    assert rows["top_k"].tolist() == [3, 4]
    with pytest.raises(ValueError, match="no field of name top_n"):
        sampling_rows(2, top_n=1)
    with pytest.raises(ValueError, match="shape"):
        sampling_rows(2, top_k=[1, 2, 3])


def test_what_a_batch_leaves_out_is_the_same_in_the_core() -> None:
    assert _native_ops.default_sampling_row() == sampling_rows(1).tobytes()


def description(dtype: np.dtype[Any]) -> dict[str, Any]:
    names, fields = dtype.names or (), dtype.fields or {}
    return {
        "names": list(names),
        "formats": [fields[name][0] for name in names],
        "offsets": [fields[name][1] for name in names],
        "itemsize": dtype.itemsize,
    }


def changed_layouts() -> dict[str, np.dtype[Any]]:
    """Definitions of the row that differ a little from the native core's."""
    layouts = {}
    for index, name in enumerate(SAMPLING_ROW.names or ()):
        renamed, retyped, swapped = (description(SAMPLING_ROW) for _ in range(3))
        renamed["names"][index] = name + "s"
        layouts[f"{name} renamed"] = renamed
        kind = retyped["formats"][index]
        retyped["formats"][index] = np.dtype(f"V{kind.itemsize}" if kind.kind == "u" else "<u4")
        layouts[f"{name} retyped"] = retyped
        other = index - 1
        for values in (swapped["names"], swapped["formats"]):
            values[index], values[other] = values[other], values[index]
        if swapped["formats"] == description(SAMPLING_ROW)["formats"]:
            layouts[f"{name} swapped"] = swapped
    longer = description(SAMPLING_ROW)
    longer["itemsize"] += 8
    added = description(SAMPLING_ROW)
    for field, value in (("names", "tfs_z"), ("formats", np.dtype("<f4")), ("offsets", 64)):
        added[field].append(value)
    added["itemsize"] += 8
    layouts |= {"longer": longer, "a field added": added}
    return {name: np.dtype(layout) for name, layout in layouts.items()}


LAYOUTS = changed_layouts()


def test_rows_of_the_definition_are_taken() -> None:
    batch(sampling=sampling_rows(1))
    batch(sampling=np.zeros(1, np.dtype(description(SAMPLING_ROW))))  # another object, the same row


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_another_layout_are_refused(name: str) -> None:
    expected = r"expected an array of octavo.*SAMPLING_ROW, \(temperature <f4 at 0, top_k <i4 at 4"
    for _ in range(2):
        with pytest.raises(ValueError, match=expected):
            batch(sampling=np.zeros(1, LAYOUTS[name]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 1)], "sampling is <class 'list'>; expected an array of octavo.reference.sampling"),
        (np.zeros(1, np.float32), r"sampling is an array of \(float32\)"),
        (sampling_rows(4)[::2], "gaps between its rows; expected one axis and none"),
        (sampling_rows(1)[None], "sampling has 2 axes"),
    ],
)
def test_what_is_no_array_of_rows_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch(sampling=rows)


def test_the_number_of_rows_is_that_of_the_logit_rows() -> None:
    with pytest.raises(ValueError, match="sampling has 2 entries; expected 1"):
        tiny_runtime().submit(batch(sampling=sampling_rows(2)))


@pytest.mark.parametrize(
    ("field", "wrong", "right", "expected"),
    [
        ("temperature", [-0.5, np.nan], [0.0, 7.0], "0 or more"),
        ("top_k", [-1], [0, 10**6], "0 or more"),
        ("top_p", [0.0, 1.01, np.nan], [1e-6, 1.0], "above 0, at most 1"),
        ("min_p", [-0.01, 1.01, np.nan], [0.0, 1.0], "0 to 1"),
        ("top_n_sigma", [-0.5, np.nan], [0.0, 1e9], "0 or more"),
        ("typical_p", [0.0, 1.01, np.nan], [1e-6, 1.0], "above 0, at most 1"),
        ("xtc_probability", [-0.1, 1.01, np.nan], [0.0, 1.0], "0 to 1"),
        ("xtc_threshold", [-0.1, 1.01, np.nan], [0.0, 1.0], "0 to 1"),
        ("num_logprobs", [-2, 84], [-1, 83], "-1 to 83"),
        ("state_row", [-2], [-1], "-1 to"),
    ],
)
def test_ranges_of_a_row(field: str, wrong: list[float], right: list[float], expected: str) -> None:
    runtime = tiny_runtime()
    for value in wrong:
        with pytest.raises(ValueError, match=rf"sampling\[0\]\.{field} is .*expected {expected}"):
            runtime.step(batch(sampling=sampling_rows(1, **{field: value})))
    for value in right:
        runtime.step(batch(sampling=sampling_rows(1, **{field: value})))
