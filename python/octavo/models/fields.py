"""Reading the fields of a Hugging Face `config.json`: types and ranges checked, errors by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.folder import FolderFile

MAX_JSON_BYTES = 64 * 1024 * 1024  # far above any real configuration or index


class Limit:
    """Bounds far above any model of the next years.

    They report a mistyped digit by the name of its field, before an allocation fails.
    """

    VOCAB = 2**22
    WIDTH = 2**18
    INTERMEDIATE = 2**20
    LAYERS = 1024
    HEADS = 4096
    EXPERTS = 4096
    HEAD_DIM = 1024
    POSITIONS = 2**24  # float32 must hold them exactly


def read_json_object(path: FolderFile, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; UnsupportedModelError says what is wrong with the file."""
    try:
        size = path.stat().st_size if isinstance(path, Path) else 0  # text made in memory is small
        if size > max_bytes:
            raise UnsupportedModelError(
                f"{path} has {size} bytes; expected a JSON file of at most {max_bytes}"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(
            f"{path} holds {describe(value)}; expected a JSON object, {{...}}"
        )
    return value


def describe(value: object) -> str:
    """A JSON value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(name: str) -> str:
    """A name from a file for a message: as it is, or escaped if a terminal cannot show it."""
    return name if name.isprintable() and len(name) <= 200 else describe(name)


class FieldError(UnsupportedModelError):
    """A field that octavo cannot use, and its name."""

    def __init__(self, message: str, field: str, is_missing: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.is_missing = is_missing


class Fields:
    """The fields of one JSON object, read with their types and ranges checked.

    `source` is put before every message ("config.json" or "config.json: rope_scaling").
    A default of None makes a field required unless `optional` says otherwise.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def error(self, name: str, value: object, expected: str) -> FieldError:
        """The error for a field that octavo cannot use."""
        return FieldError(
            f"{self.source}: {name} is {describe(value)}; supported: {expected}", name
        )

    def _get(self, name: str, default: Any, expected: str) -> Any:
        if name in self.values:
            return self.values[name]
        if default is None:
            raise FieldError(f"{self.source}: {name} is missing; expected {expected}", name, True)
        return default

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in low..high; 32.0 and true are not integers."""
        expected = f"an integer from {low} to {high}"
        value = self._get(name, default, expected)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, value, expected)
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """As `integer`, but None where the field is missing or null."""
        return None if self.values.get(name) is None else self.integer(name, low, high)

    def number(
        self,
        name: str,
        low: float,
        high: float = math.inf,
        default: float | None = None,
        *,
        exclude_low: bool = False,
    ) -> float:
        """A finite number from low (or above it) to high."""
        end = "" if math.isinf(high) else f" to {high:g}"
        expected = f"a finite number {'above' if exclude_low else 'from'} {low:g}{end}"
        value = self._get(name, default, expected)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(name, value, expected)
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        in_range = math.isfinite(number) and low <= number <= high
        if not in_range or (exclude_low and number == low):
            raise self.error(name, value, expected)
        return number

    def boolean(self, name: str, default: bool) -> bool:
        """true or false, and nothing else."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def refuse_unless(self, name: str, allowed: tuple[object, ...], advice: str) -> None:
        """Refuse a field whose value is neither allowed nor null; it may be missing."""
        value = self.values.get(name)
        if value is None:
            return
        # type() too: in Python 1 == True == 1.0, in a configuration they are different.
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise self.error(name, value, advice)
