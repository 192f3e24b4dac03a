"""Quantizing a model layer by layer, each matrix for the inputs that it will really meet.

The order of things in a layer is that of the forward pass: q, k and v are rounded, then o on what
attention returns with them, then gate and up, then down; after that the next layer. So one pass
over the text is enough, and every matrix is fitted to the errors of all those before it.

And makes up for them, as far as it can: its target is not W on those inputs but what the float
model has in that place. The weights that come nearest to it are, by least squares,

    W' = W + (H + c I)^-1 (T - H W)      H = mean x x^T, T = mean x y^T

with x the matrix's input in the quantized model and y the output in the float model; for o and
down, y is what brings the quantized residual stream to the float one. W' is what is then rounded.
Li et al. 2025 (GPTAQ, arXiv 2504.02692) and Zhang et al. 2025 (Qronos, arXiv 2505.11695) correct
so; they have the plain output for y.

Matrices are turned, (inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError, WeightsError
from octavo.models.spec import LayerSpec, WeightFormat
from octavo.quantization.rounding import QuantizedMatrix, quantize_matrix
from octavo.quantize.awq import find_factors, representable_factors, shared_rows
from octavo.quantize.calibration import CalibratedWeights, Calibration, Int32, read_windows
from octavo.quantize.gptq import Rounded, check_finite, damp, gptq, round_by_search
from octavo.quantize.streams import LayerWeights, activate, attend, chunks
from octavo.reference import ops
from octavo.reference.quantization import dequantize
from octavo.weights.checkpoint import Checkpoint, has_non_finite
from octavo.weights.model_files import ModelFiles

Float32 = npt.NDArray[np.float32]
Stages = Callable[[str, int, int], None]
"""Called with what is going on, and how much of how much is done."""

# How firmly W' holds to W, as a share of H's mean diagonal.
_HOLD = 1.0


def calibrate(
    files: ModelFiles,
    checkpoint: Checkpoint,
    formats: Mapping[str, WeightFormat],
    calibration: Calibration,
    stages: Stages = lambda *_: None,
) -> CalibratedWeights:
    """Round every matrix that `formats` names, as the calibration says.

    Memory beside the checkpoint: for each token of the text, the hidden state three times and the
    widest activation once, in float32; for one matrix at a time, H (float32, inputs squared) and
    three float64 arrays of that size; and the codes. Raises InvalidArgumentError for a text that
    will not do (`read_windows`) or formats without int4, WeightsError for weights that hold a NaN
    or an infinity or lead to one.
    """
    if not any(format.dtype == "int4" for format in formats.values()):
        raise InvalidArgumentError(
            "a calibration text was given for int8, which loses next to nothing without one; "
            "expected int4, or no text"
        )
    tokens, notes = read_windows(calibration, files)
    run = LayerByLayer(checkpoint, formats, calibration.method, tokens)
    count = len(files.spec.layers)
    for index, layer in enumerate(files.spec.layers):
        stages("calibrating", index, count)
        run.quantize_layer(index, layer)
    stages("calibrating", count, count)
    return CalibratedWeights(run.matrices, run.vectors, tuple(notes))


class _Statistics:
    """Sums over the inputs x of a matrix (or of several that share them) and its targets y."""

    def __init__(self, inputs: int, targets: int) -> None:
        self.hessian = np.zeros((inputs, inputs), np.float32)
        self.cross = np.zeros((inputs, targets), np.float32)
        self._count = 0

    def add(self, x: Float32, y: Float32) -> None:
        """x: (tokens, inputs) in the quantized model; y: (tokens, targets) in the float model."""
        self.hessian += x.T @ x
        self.cross += x.T @ y
        self._count += len(x)

    def finish(self) -> None:
        """From sums to means; WeightsError where they are no numbers."""
        check_finite(self.hessian)
        self.hessian /= np.float32(self._count)
        self.cross /= np.float32(self._count)


class LayerByLayer:
    """One calibration: the streams on their way, and what has been made so far.

    tokens: int32 (windows, window). exact, rough: float32 (tokens, hidden), what the float model
    and the quantized one have behind the last layer that was done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, WeightFormat],
        method: str,
        tokens: Int32,
    ) -> None:
        self.matrices: dict[str, QuantizedMatrix] = {}
        self.vectors: dict[str, Float32] = {}
        self._checkpoint, self._formats = checkpoint, formats
        self._folds, self._compensates = "awq" in method, "gptq" in method
        self._windows, self._window = tokens.shape
        self.exact = _embed(checkpoint, tokens)
        self.rough = self.exact.copy()

    def quantize_layer(self, index: int, layer: LayerSpec) -> None:
        """Quantize the next layer, and take both streams through it."""
        self._check(index)
        prefix = f"layers.{index}."
        exact = LayerWeights.read(self._checkpoint, index)
        rough = exact.copy()
        self._attention(prefix, layer, exact, rough)
        self._mlp(prefix, layer, exact, rough)
        if self._folds:
            for name, values in rough.vectors.items():
                if values is not exact.vectors[name]:
                    self.vectors[prefix + name] = values

    def _attention(
        self, prefix: str, layer: LayerSpec, exact: LayerWeights, rough: LayerWeights
    ) -> None:
        hidden = self.exact.shape[1]
        normed = _Statistics(hidden, hidden)
        heads = np.empty((len(self.exact), layer.q_size), np.float32)  # of the exact stream
        for rows in self._chunks():
            normed.add(
                rough.normed("attn_norm", layer, self.rough[rows]),
                exact.normed("attn_norm", layer, self.exact[rows]),
            )
            heads[rows] = attend(layer, exact, self.exact[rows], self._window)
        normed.finish()
        if self._folds:
            self._fold_norm(prefix, rough, normed, "attn_norm", ("q", "k", "v"))
            self._fold_values(prefix, layer, rough, heads)
        self._round(prefix, ("q", "k", "v"), rough, normed, _joined(exact, ("q", "k", "v")))
        inputs = np.empty_like(heads)
        output = _Statistics(layer.q_size, hidden)
        for rows in self._chunks():
            inputs[rows] = attend(layer, rough, self.rough[rows], self._window)
            self.exact[rows] += heads[rows] @ exact.matrices["o"]
            output.add(inputs[rows], self.exact[rows] - self.rough[rows])
        output.finish()
        self._round(prefix, ("o",), rough, output)
        bias = exact.vectors.get("o.bias", np.float32(0))
        for rows in self._chunks():
            self.exact[rows] += bias
            self.rough[rows] += rough.linear("o", inputs[rows])

    def _mlp(self, prefix: str, layer: LayerSpec, exact: LayerWeights, rough: LayerWeights) -> None:
        hidden, wide = self.exact.shape[1], layer.intermediate_size
        first = ("gate", "up") if layer.gated else ("up",)
        normed = _Statistics(hidden, hidden)
        folds = self._folds and layer.gated
        driven = np.zeros((wide, wide) if folds else (0, 0), np.float32)
        for rows in self._chunks():
            n = exact.normed("mlp_norm", layer, self.exact[rows])
            normed.add(rough.normed("mlp_norm", layer, self.rough[rows]), n)
            act = activate(layer, exact, n)
            if folds:
                driven += act.T @ act
            self.exact[rows] += act @ exact.matrices["down"]
        normed.finish()
        if self._folds:
            self._fold_norm(prefix, rough, normed, "mlp_norm", first)
        if folds:
            driven /= np.float32(len(self.exact))
            self._fold_rows(prefix, rough, driven, "up", "down")
        self._round(prefix, first, rough, normed, _joined(exact, first))
        inputs = np.empty((len(self.exact), wide), np.float32)
        output = _Statistics(wide, hidden)
        for rows in self._chunks():
            n = rough.normed("mlp_norm", layer, self.rough[rows])
            inputs[rows] = activate(layer, rough, n)
            output.add(inputs[rows], self.exact[rows] - self.rough[rows])
        output.finish()
        self._round(prefix, ("down",), rough, output)
        bias = exact.vectors.get("down.bias", np.float32(0))
        for rows in self._chunks():
            self.exact[rows] += bias
            self.rough[rows] += rough.linear("down", inputs[rows])

    def _round(
        self,
        prefix: str,
        parts: Sequence[str],
        rough: LayerWeights,
        seen: _Statistics,
        through: Float32 | None = None,
    ) -> None:
        """Quantize matrices with the same inputs; `rough` then has what their codes stand for.

        through: what makes targets of the y that were seen (the float matrices); None: nothing.
        """
        weight = _joined(rough, parts)
        if self._compensates:
            cross = seen.cross if through is None else seen.cross @ through
            held = damp(seen.hessian, _HOLD)
            gap = cross - seen.hessian @ weight
            weight += np.linalg.solve(held, gap.astype(np.float64)).astype(np.float32)
        columns, begin = {}, 0
        for part in parts:
            end = begin + rough.matrices[part].shape[1]
            columns[part] = slice(begin, end)
            begin = end
        by_format: dict[WeightFormat, list[str]] = {}
        for part in parts:
            if prefix + part in self._formats:
                by_format.setdefault(self._formats[prefix + part], []).append(part)
        for format, members in by_format.items():
            if format.dtype != "int4":
                for part in members:
                    self._round_plainly(prefix + part, part, rough, weight[:, columns[part]])
                continue
            own = np.concatenate([weight[:, columns[part]] for part in members], axis=1)
            method = gptq if self._compensates else round_by_search
            rounded = method(own, seen.hessian, format)
            self._keep(prefix, members, rough, rounded)

    def _keep(
        self, prefix: str, parts: Sequence[str], rough: LayerWeights, rounded: Rounded
    ) -> None:
        values, begin = rounded.weights(), 0
        for part in parts:
            end = begin + rough.matrices[part].shape[1]
            self.matrices[prefix + part] = rounded.outputs(slice(begin, end))
            rough.matrices[part] = np.ascontiguousarray(values[:, begin:end])
            begin = end

    def _round_plainly(self, name: str, part: str, rough: LayerWeights, weight: Float32) -> None:
        format = self._formats[name]
        matrix = quantize_matrix(np.ascontiguousarray(weight.T), format)
        self.matrices[name] = matrix
        values = dequantize(matrix.codes, matrix.scales, format)
        rough.matrices[part] = np.ascontiguousarray(values.T)

    def _fold_norm(
        self, prefix: str, rough: LayerWeights, seen: _Statistics, norm: str, parts: Sequence[str]
    ) -> None:
        """AWQ's factors, out of a norm into the matrices behind it."""
        factors = self._factors(prefix, seen.hessian, rough, parts)
        factors = representable_factors(factors, rough.vectors[norm + ".weight"])
        for name in (norm + ".weight", norm + ".bias"):
            if name in rough.vectors:
                rough.vectors[name] = rough.vectors[name] / factors
        for part in parts:
            rough.matrices[part] = rough.matrices[part] * factors[:, None]
        seen.hessian /= np.outer(factors, factors)
        seen.cross /= factors[:, None]

    def _fold_values(
        self, prefix: str, layer: LayerSpec, rough: LayerWeights, heads: Float32
    ) -> None:
        """AWQ's factors, out of the rows of v into the columns of o."""
        driven = heads.T @ heads / np.float32(len(heads))
        shared = layer.num_heads // layer.num_kv_heads
        factors = self._factors(prefix, driven, rough, ("o",), shared, layer.head_dim)
        rows = shared_rows(factors, layer.num_heads, layer.num_kv_heads)
        _fold(rough, "v", rows, "o", factors)

    def _fold_rows(
        self, prefix: str, rough: LayerWeights, driven: Float32, before: str, after: str
    ) -> None:
        factors = self._factors(prefix, driven, rough, (after,))
        _fold(rough, before, factors, after, factors)

    def _factors(
        self,
        prefix: str,
        hessian: Float32,
        rough: LayerWeights,
        parts: Sequence[str],
        shared: int = 1,
        head_dim: int = 1,
    ) -> Float32:
        names = [part for part in parts if self._is_int4(prefix + part)]
        matrices = [rough.matrices[part] for part in names]
        formats = [self._formats[prefix + part] for part in names]
        return find_factors(hessian, matrices, formats, shared, head_dim)

    def _is_int4(self, name: str) -> bool:
        return name in self._formats and self._formats[name].dtype == "int4"

    def _chunks(self) -> Iterator[slice]:
        return chunks(self._windows, self._window)

    def _check(self, index: int) -> None:
        for name in self._checkpoint:
            if name.startswith(f"layers.{index}.") and has_non_finite(self._checkpoint[name]):
                raise WeightsError(
                    f"{name} holds a NaN or an infinity, which cannot be rounded. Fetch or convert "
                    "the model again"
                )


def _joined(weights: LayerWeights, parts: Sequence[str]) -> Float32:
    """Matrices side by side, (inputs, outputs of all); a copy."""
    return np.concatenate([weights.matrices[part] for part in parts], axis=1)


def _fold(weights: LayerWeights, before: str, rows: Float32, after: str, columns: Float32) -> None:
    """Divide a matrix's outputs (and bias), and multiply the inputs of the one behind it."""
    weights.matrices[before] = weights.matrices[before] / rows
    if before + ".bias" in weights.vectors:
        weights.vectors[before + ".bias"] = weights.vectors[before + ".bias"] / rows
    weights.matrices[after] = weights.matrices[after] * columns[:, None]


def _embed(checkpoint: Checkpoint, tokens: Int32) -> Float32:
    """What enters the first layer, (tokens, hidden)."""
    table = checkpoint["embed.weight"].to_float32()
    positions = None
    if "positions.weight" in checkpoint:
        positions = checkpoint["positions.weight"].to_float32()
    places = np.tile(np.arange(tokens.shape[1]), tokens.shape[0])
    x: Float32 = ops.embed(table, tokens.reshape(-1), positions, places)
    return np.ascontiguousarray(x, np.float32)
