"""The one reader of weights: from any source of tensors, by a family's map, run by run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.family import WeightSource
from octavo.weights.tensor import Tensor, TensorInfo, TensorSource


def weight_info(source: TensorSource, wanted: WeightSource) -> TensorInfo:
    """Type, shape and bytes of a weight, before it is read."""
    stored, count = source.infos[wanted.tensor], math.prod(wanted.shape)
    if wanted.transform == "plus_one":
        return TensorInfo("f32", wanted.shape, 4 * count)
    num_bytes = stored.num_bytes * count // max(1, stored.num_elements)
    return TensorInfo(stored.dtype, wanted.shape, num_bytes)


def read_weight(source: TensorSource, wanted: WeightSource) -> Tensor:
    """The whole weight: a view if the file holds it unchanged, else a copy made run by run."""
    runs = read_runs(source, wanted)
    first = next(runs)
    if len(first.data) == wanted.shape[0]:
        return first
    whole = np.empty((wanted.shape[0], *first.shape[1:]), first.data.dtype)
    row = 0
    for run in chain((first,), runs):
        whole[row : row + len(run.data)] = run.data
        row += len(run.data)
    return Tensor(whole, first.dtype)


def read_runs(source: TensorSource, wanted: WeightSource) -> Iterator[Tensor]:
    """The weight in runs of rows, in order, so that a big table needs little memory.

    A transposed matrix is one run.
    """
    name, num_rows = wanted.tensor, wanted.shape[0]
    first = wanted.rows[0] if wanted.rows else 0
    if wanted.transform == "transpose":
        tensor = source.read(name)
        columns = tensor.data[:, first : first + num_rows]
        yield Tensor(np.ascontiguousarray(columns.T), tensor.dtype)
        return
    step = rows_at_once(source, wanted)
    for row in range(first, first + num_rows, step):
        run = source.read_rows(name, row, min(row + step, first + num_rows))
        if wanted.transform == "plus_one":
            run = Tensor(run.to_float32() + np.float32(1), "f32")
        elif wanted.transform == "unpermute":
            run = Tensor(unpermute_rows(run.data, wanted.head_dim), run.dtype)
        yield run


def rows_at_once(source: TensorSource, wanted: WeightSource) -> int:
    """How many rows of the weight `read_runs` reads in one go."""
    if wanted.transform == "transpose":
        return wanted.shape[0]
    step = source.rows_at_once(wanted.tensor)
    if wanted.transform == "unpermute":
        return max(1, step // wanted.head_dim) * wanted.head_dim  # whole heads
    return step


def whole_tensor(
    parts: Sequence[tuple[WeightSource, npt.NDArray[Any]]],
) -> npt.NDArray[Any]:
    """The tensor of a checkpoint that holds these weights: the inverse of `read_weight`.

    parts: all weights of one tensor in the order of its rows, which are numbers of one type;
    float32 where the transform is "plus_one". No family writes "unpermute", which is GGUF's.
    """
    place, values = parts[0]
    if len(parts) > 1:
        values = np.concatenate([part for _, part in parts])
    if place.transform == "plus_one":
        values = values - np.float32(1)
    return np.ascontiguousarray(values.T if place.transform == "transpose" else values)


def unpermute_rows(values: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """From llama.cpp's order of the rows (heads * head_dim, ...) of q or k to Hugging Face's.

    In each head, rows 2i and 2i + 1 become rows i and i + head_dim/2.
    """
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
