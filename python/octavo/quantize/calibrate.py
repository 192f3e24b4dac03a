"""Quantizing a model layer by layer, each matrix for the inputs that it will really meet.

The order of things in a layer is that of the forward pass: matrices with the same input are rounded
together, and the next ones then meet what comes of them. So one pass over the text is enough, and
every matrix is fitted to the errors of all those before it.

And makes up for them, as far as it can: its target is not W on those inputs but what the float
model has in that place. The weights that come nearest to it are, by least squares,

    W' = W + (H + c I)^-1 (T - H W)      H = mean x x^T, T = mean x y^T

with x the matrix's input in the quantized model and y the output in the float model; for o and
down, y is what brings the quantized residual stream to the float one. W' is what is then rounded.
Li et al. 2025 (GPTAQ, arXiv 2504.02692) and Zhang et al. 2025 (Qronos, arXiv 2505.11695) correct
so; they have the plain output for y.

An expert's matrices are rounded for the tokens that go to it (`octavo.quantize.experts`); the y of
its down is the expert's own output in the float model. What a layer consists of is read from
`octavo.models.layer`; every op is the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

import numpy as np

from octavo.errors import InvalidArgumentError
from octavo.models.layer import Node, layer_nodes, model_nodes, residual_before
from octavo.models.rope import at_length
from octavo.models.spec import LayerSpec, ModelSpec, MoeSpec, WeightFormat
from octavo.progress import StageProgress
from octavo.quantization.grid import Float32
from octavo.quantization.rounding import QuantizedMatrix, quantize_matrix
from octavo.quantize.awq import find_factors, representable_factors, same_columns, shared_rows
from octavo.quantize.calibration import (
    CalibratedWeights,
    Calibration,
    Int32,
    check_finite,
    read_windows,
)
from octavo.quantize.experts import (
    LEAST_TOKENS,
    activate,
    note_on_few,
    rows_of_experts,
    split_experts,
)
from octavo.quantize.gptq import check_hessian, damp, gptq, round_by_search
from octavo.reference.nodes import add, op_call
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles

# How firmly W' holds to W, as a share of H's mean diagonal.
_HOLD = 1.0
_QUERIES = 128  # of a block of attention


def calibrate(
    files: ModelFiles,
    checkpoint: Checkpoint,
    formats: Mapping[str, WeightFormat],
    calibration: Calibration,
    progress: StageProgress = lambda *_: None,
) -> CalibratedWeights:
    """Round every matrix that `formats` names, as the calibration says.

    Memory beside the checkpoint, in float32: for each token of the text, the hidden state some ten
    times and the widest activation once (twice with AWQ); a layer's weights three times; for one
    group of matrices at a time, H (inputs squared) and three float64 arrays of that size; and the
    codes. Raises InvalidArgumentError for a text that will not do (`read_windows`) or formats
    without int4, WeightsError for weights that hold a NaN or an infinity or lead to one.
    """
    if not any(format.dtype == "int4" for format in formats.values()):
        raise InvalidArgumentError(
            "a calibration text was given for int8, which loses next to nothing without one; "
            "expected int4, or no text"
        )
    tokens, notes = read_windows(calibration, files)
    spec = at_length(files.spec, tokens.shape[1])
    run = LayerByLayer(spec, checkpoint, formats, calibration.method, tokens)
    count = len(files.spec.layers)
    for index in range(count):
        progress("calibrating", index, count)
        run.quantize_layer(index)
    progress("calibrating", count, count)
    return CalibratedWeights(run.matrices, run.vectors, (*notes, *note_on_few(run.few)))


class Stream:
    """The text on its way through one model, a layer at a time.

    weights: float32, by name, of the present layer. known: the taps that are at hand, of all
    tokens: name -> (tokens, width). Every other one is computed from them.
    """

    def __init__(self, window: int, embedded: Float32) -> None:
        self.weights: dict[str, Float32] = {}
        self.known = {residual_before(0): embedded}
        self._nodes: dict[str, Node] = {}
        self._layer: LayerSpec | None = None
        self._positions = np.arange(window)

    def enter(self, layer: LayerSpec, nodes: Sequence[Node], weights: dict[str, Float32]) -> None:
        """Begin a layer; all that is kept of the one before is the residual stream."""
        residual = nodes[0].inputs[0]
        self.known = {residual: self.tap(residual)}
        self._layer, self._nodes, self.weights = layer, {node.tap: node for node in nodes}, weights

    def tap(self, name: str) -> Float32:
        """A tap of all tokens, (tokens, width), at hand from now on; window by window."""
        if name not in self.known:
            count, window = len(next(iter(self.known.values()))), len(self._positions)
            values = np.empty((count, self._nodes[name].width), np.float32)
            for begin in range(0, count, window):
                rows = slice(begin, begin + window)
                values[rows] = self._compute(name, rows)
            self.known[name] = values
        return self.known[name]

    def drop(self, name: str) -> None:
        """Let go of a tap."""
        self.known.pop(name, None)

    def _compute(self, name: str, rows: slice) -> Float32:
        """A tap of one window, (window, width)."""
        found = {known: values[rows] for known, values in self.known.items()}

        def find(tap: str) -> Float32:
            if tap not in found:
                node = self._nodes[tap]
                operands = [find(source) for source in node.inputs]
                call = op_call(node, operands, self.weights, self._layer, self._positions)
                value = attend(call) if node.op == "attention" else call()
                found[tap] = value.reshape(len(value), -1)
            return found[tap]

        return find(name)


def attend(call: partial[Float32]) -> Float32:
    """Attention by its definition, in blocks of queries: little is computed to be masked."""
    q, k, v = (call.keywords[name] for name in "qkv")
    blocks = [(begin, min(begin + _QUERIES, len(q))) for begin in range(0, len(q), _QUERIES)]
    return np.concatenate([call(q=q[a:b], k=k[:b], v=v[:b]) for a, b in blocks])


class LayerByLayer:
    """One calibration: both models' streams on their way, and what has been made so far.

    tokens: int32 (windows, window). exact, rough: of the float model and of the quantized one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        formats: Mapping[str, WeightFormat],
        method: str,
        tokens: Int32,
    ) -> None:
        self.matrices: dict[str, QuantizedMatrix] = {}
        self.vectors: dict[str, Float32] = {}
        self.few: dict[int, list[int]] = {}  # by layer, experts that saw too few tokens
        self._divisors: dict[str, Float32] = {}  # of a matrix's outputs, where AWQ divided them
        self._spec, self._checkpoint, self._formats = spec, checkpoint, formats
        self._folds, self._compensates = "awq" in method, "gptq" in method
        embed, window = model_nodes(spec)[0], tokens.shape[1]
        places = np.tile(np.arange(window), len(tokens))
        call = op_call(embed, (), self._read([embed]), None, places, token_ids=tokens.reshape(-1))
        self.exact, self.rough = Stream(window, call()), Stream(window, call())

    def quantize_layer(self, index: int) -> None:
        """Quantize the next layer."""
        layer = self._spec.layers[index]
        nodes = layer_nodes(layer, index, self._spec.hidden_size)
        weights = self._read(nodes)
        self.exact.enter(layer, nodes, weights)
        self.rough.enter(layer, nodes, dict(weights))
        products = [node for node in nodes if node.op == "linear" and not node.matrix.is_router]
        for source, group in groupby(products, key=lambda node: node.inputs[0]):
            self._quantize_group(nodes, source, list(group))
        if layer.moe is not None:
            self._quantize_experts(nodes, layer, layer.moe)
        for name, values in self.rough.weights.items():
            is_kept = values.ndim == 1 or name.endswith(".router.weight")
            if is_kept and values is not weights[name]:
                self.vectors[name] = values

    def _quantize_group(self, nodes: Sequence[Node], source: str, group: Sequence[Node]) -> None:
        """Quantize the matrices that the tap `source` goes into."""
        x, names = self.rough.tap(source), [node.matrix.name for node in group]
        hessian = x.T @ x / np.float32(len(x))
        check_hessian(hessian)
        sums = [node for node in nodes if node.op == "add_norm" and group[0].tap in node.inputs]
        if self._folds:
            factors = self._fold(nodes, source, group, hessian)
            x /= factors
            hessian /= np.outer(factors, factors)
        cross = self._cross(source, group, sums) if self._compensates else None
        self._round(names, hessian, cross)
        if sums:  # the next taps are found from the sum, or from what is added
            self.rough.tap(group[0].tap if sums[0].norm else sums[0].tap)
            self.exact.drop(source)
            self.rough.drop(source)

    def _cross(self, source: str, group: Sequence[Node], sums: Sequence[Node]) -> Float32:
        """T, (inputs, outputs of all). sums: where the outputs go into the residual stream."""
        exact, rough, own = self.exact, self.rough, group[0]
        x, through = rough.tap(source), None
        if sums:
            terms, scale = sums[0].inputs if sums[0].norm else (sums[0].tap,), sums[0].scale
            y = add([exact.tap(tap) for tap in terms], scale)
            y = y - add([rough.tap(tap) for tap in sums[0].inputs if tap != own.tap], scale)
            y /= np.float32(scale)
            if own.matrix.bias:
                y -= exact.weights[f"{own.matrix.name}.bias"]
        else:
            y = exact.tap(source)
            through = self._exact_matrices([node.matrix.name for node in group])
        cross: Float32 = x.T @ y / np.float32(len(x))
        return cross if through is None else cross @ through

    def _exact_matrices(self, names: Sequence[str]) -> Float32:
        """The float model's matrices side by side; outputs are divided as the rough model's are."""
        weights = self.exact.weights
        return _side_by_side(
            [
                (weights[f"{name}.weight"].T / self._divisors.get(name, np.float32(1))).T
                for name in names
            ]
        )

    def _quantize_experts(self, nodes: Sequence[Node], layer: LayerSpec, moe: MoeSpec) -> None:
        """Quantize the experts of a layer, each for the tokens that go to it in the rough model."""
        mix = next(node for node in nodes if node.op == "moe")
        router = next(node for node in nodes if node.tap == mix.inputs[1])
        experts = split_experts(mix)
        x, wanted = (stream.tap(mix.inputs[0]) for stream in (self.rough, self.exact))
        if self._folds:
            hessian = x.T @ x / np.float32(len(x))
            check_hessian(hessian)
            halves = [node for gate, up, _ in experts for node in (gate, up)]
            x /= self._fold_norm(mix.inputs[0], halves, hessian, router)
        tokens = rows_of_experts(self.rough.tap(router.tap), moe)
        for index, ((gate, up, down), rows) in enumerate(zip(experts, tokens, strict=True)):
            if len(rows) < LEAST_TOKENS:
                self.few.setdefault(mix.layer or 0, []).append(index)
                self._round_without_text([gate, up, down])
                continue
            inner = activate(self.exact.weights, gate, up, wanted[rows], layer.activation)
            if self._folds:
                columns = self._factors(inner.T @ inner / np.float32(len(rows)), [down])
                self._move(up.matrix.name, columns, [down], columns)
            self._round_for([gate, up], x[rows], wanted[rows])
            made = activate(self.rough.weights, gate, up, x[rows], layer.activation)
            self._round_for([down], made, inner)

    def _round_for(self, group: Sequence[Node], x: Float32, wanted: Float32) -> None:
        """Round matrices for the inputs x; wanted: the same in the float model. (rows, inputs)."""
        names = [node.matrix.name for node in group]
        hessian = x.T @ x / np.float32(len(x))
        check_hessian(hessian)
        cross = None
        if self._compensates:
            cross = (x.T @ wanted / np.float32(len(x))) @ self._exact_matrices(names)
        self._round(names, hessian, cross)

    def _round_without_text(self, group: Sequence[Node]) -> None:
        for name in [node.matrix.name for node in group if node.matrix.name in self._formats]:
            format, weight = self._formats[name], self.rough.weights[f"{name}.weight"]
            self.matrices[name] = quantize_matrix(weight, format)
            self.rough.weights[f"{name}.weight"] = self.matrices[name].decode(format)

    def _round(self, names: Sequence[str], hessian: Float32, cross: Float32 | None) -> None:
        """Quantize matrices with the same inputs; `rough` then has what their codes stand for.

        cross: T for all their outputs side by side; None: the weights are rounded as they are.
        """
        weight = _side_by_side([self.rough.weights[f"{name}.weight"] for name in names])
        if cross is not None:
            gap = cross - hessian @ weight
            held = damp(hessian, _HOLD)
            weight += np.linalg.solve(held, gap.astype(np.float64)).astype(np.float32)
        sizes = [len(self.rough.weights[f"{name}.weight"]) for name in names]
        parts = dict(zip(names, np.split(weight, np.cumsum(sizes)[:-1], axis=1), strict=True))
        for format in {self._formats[name]: None for name in names if name in self._formats}:
            members = [name for name in names if self._formats.get(name) == format]
            if format.dtype == "int4":
                method = gptq if self._compensates else round_by_search
                own = np.concatenate([parts[name] for name in members], axis=1)
                found = method(own, hessian, format).split([parts[n].shape[1] for n in members])
            else:
                found = [quantize_matrix(np.ascontiguousarray(parts[n].T), format) for n in members]
            for name, matrix in zip(members, found, strict=True):
                self.matrices[name] = matrix
                self.rough.weights[f"{name}.weight"] = matrix.decode(format)

    def _fold(
        self, nodes: Sequence[Node], source: str, group: Sequence[Node], hessian: Float32
    ) -> Float32:
        """AWQ: fold factors into what makes the inputs of this group, and of those behind it.

        hessian: of this group's input. Returns what that input was divided by, (inputs,).
        """
        by_tap = {node.tap: node for node in nodes}
        factors = np.ones(len(hessian), np.float32)
        if by_tap[source].normalizes:
            factors = self._fold_norm(source, group, hessian)
        for node in group:
            for tap in [other.tap for other in nodes if same_columns(other) == node.tap]:
                behind = [other for other in nodes if other.op == "linear" and tap in other.inputs]
                values = self.exact.tap(tap)
                shared = values.shape[1] // node.width
                head_dim = self._spec.layers[node.layer or 0].head_dim if shared > 1 else 1
                driven = values.T @ values / np.float32(len(values))
                columns = self._factors(driven, behind, shared, head_dim)
                self._move(
                    node.matrix.name, shared_rows(columns, shared, head_dim), behind, columns
                )
        return factors

    def _fold_norm(
        self, source: str, group: Sequence[Node], hessian: Float32, *others: Node
    ) -> Float32:
        """Fold factors into the norm `source` before a group; others: are behind it, unrounded."""
        factors = self._factors(hessian, group)
        factors = representable_factors(factors, self.rough.weights[f"{source}.weight"])
        self._move(source, factors, [*group, *others], factors)
        return factors

    def _move(self, name: str, divisors: Float32, behind: Sequence[Node], factors: Float32) -> None:
        """Divide what a norm or matrix puts out, and multiply the inputs of the matrices behind."""
        weights = self.rough.weights
        self._divisors[name] = divisors
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in weights:
                weights[part] = (weights[part].T / divisors).T
        for node in behind:
            weights[f"{node.matrix.name}.weight"] = weights[f"{node.matrix.name}.weight"] * factors

    def _factors(
        self, hessian: Float32, group: Sequence[Node], shared: int = 1, head_dim: int = 1
    ) -> Float32:
        formats = {node.matrix.name: self._formats.get(node.matrix.name) for node in group}
        chosen = {name: f for name, f in formats.items() if f is not None and f.dtype == "int4"}
        matrices = [self.rough.weights[f"{name}.weight"].T for name in chosen]
        return find_factors(hessian, matrices, list(chosen.values()), shared, head_dim)

    def _read(self, nodes: Sequence[Node]) -> dict[str, Float32]:
        """The weights of nodes; WeightsError where one holds a NaN or an infinity."""
        weights = {}
        for name in (weight.name for node in nodes for weight in node.weights()):
            check_finite(name, tensor := self._checkpoint[name])
            weights[name] = tensor.to_float32()
        return weights


def _side_by_side(matrices: Sequence[Float32]) -> Float32:
    """Matrices (outputs, inputs) turned and side by side, (inputs, outputs of all); a copy."""
    return np.ascontiguousarray(np.concatenate(matrices).T)
