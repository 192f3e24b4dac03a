"""What becomes of matrices that a file holds in formats of other programs, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from octavo.models.layer import weight_shapes
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.quantization.plan import describe_format, matrix_bytes
from octavo.weights.tensor import Stored

_FLOATS, _INT8 = ("f32", "f16", "bf16"), WeightFormat("int8")
_QUIET = ("the same numbers", "rounded to bf16")


class Conversion(NamedTuple):
    """Matrices that a file holds in one format, and that run in one format.

    kind: the file's name of its format. parts: the kinds of matrices. running: how they run.
    stored_bytes, bytes, int8_bytes: of all of them, in the file, in memory, and in memory as int8.
    effect: on the numbers.
    """

    kind: str
    parts: tuple[str, ...]
    running: str
    stored_bytes: int
    bytes: int
    int8_bytes: int
    effect: str

    @property
    def is_worth_a_line(self) -> bool:
        """Whether it changes the numbers, or takes a fifth more memory than the file."""
        return self.bytes > 1.2 * self.stored_bytes or self.effect not in _QUIET

    def __str__(self) -> str:
        sizes = f"{_mebibytes(self.stored_bytes)} in the file, {_mebibytes(self.bytes)} in memory"
        text = f"{self.kind} ({', '.join(self.parts)}) as {self.running}, {self.effect}: {sizes}"
        if self.running in _FLOATS:
            text += f", with --quantize int8 {_mebibytes(self.int8_bytes)}"
        return text


def describe_stored(
    spec: ModelSpec,
    stored: Mapping[str, Stored],
    formats: Mapping[str, WeightFormat],
    dtype: str,
) -> list[Conversion]:
    """What becomes of the matrices that `stored` names, most bytes first.

    formats: of the matrices as they run. dtype: of those that it does not name.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    shapes = weight_shapes(spec)
    for name, held in stored.items():
        if name + ".weight" in shapes:
            format = formats.get(name)
            running = dtype if format is None else describe_format(format)
            groups.setdefault((held.kind, running, _effect(held, format, dtype)), []).append(name)
    found = [
        Conversion(
            kind,
            tuple(dict.fromkeys(name.rpartition(".")[2] for name in names)),
            running,
            sum(stored[name].num_bytes for name in names),
            sum(matrix_bytes(shapes[name + ".weight"], formats.get(name), dtype) for name in names),
            sum(matrix_bytes(shapes[name + ".weight"], _INT8, dtype) for name in names),
            effect,
        )
        for (kind, running, effect), names in groups.items()
    ]
    return sorted(found, key=lambda each: -each.stored_bytes)


def _effect(held: Stored, format: WeightFormat | None, dtype: str) -> str:
    if format is None and held.rounded:
        return "rounded to bf16"
    if format is None:
        return "the same numbers" if dtype == "f32" else f"rounded to {dtype}"
    if format == held.format:
        return held.difference or "the same numbers"
    return "rounded again"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
