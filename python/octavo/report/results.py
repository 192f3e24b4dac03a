"""Results of a benchmark in one form, read from files that octavo's tools write.

`results.schema.json` describes that form, which benchmarks/run.py writes; `convert.py` makes it of
the other files.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from octavo.errors import InvalidArgumentError
from octavo.files import read_text

SCHEMA = "octavo-results/1"
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")


@dataclass(frozen=True)
class Distribution:
    """Latencies in milliseconds. quantiles: 101 of them, from the least to the most; or none."""

    p50: float
    p99: float
    count: int = 0
    p90: float | None = None
    quantiles: Sequence[float] = ()


@dataclass(frozen=True)
class System:
    """One system with one model. gate, limits: as the schema describes them."""

    model: str
    system: str
    engine: str
    format: str
    gate: Mapping[str, Any] = field(default_factory=dict)
    bits: float | None = None
    device: str = "cpu"
    version: str = ""
    weight_bytes: int | None = None
    start_seconds: float | None = None
    load_seconds: float | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What one system was measured to do. samples: of every round, in `unit`.

    bytes, operations: the least that the row reads and computes; percent_of_limit: how near its
    speed is to the machine's limits for them.
    """

    model: str
    system: str
    measure: str
    prompt: int
    tokens: int
    requests: int
    unit: str
    samples: Sequence[float]
    users: int | None = None
    rate: float | None = None
    percent_of_limit: float | None = None
    limit: str | None = None
    bytes: float | None = None
    operations: float | None = None
    operations_per_second: float | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None
    cpu_joules_per_token: float | None = None
    gpu_joules_per_token: float | None = None
    first_ms: Distribution | None = None
    between_ms: Distribution | None = None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Quality:
    """What a format costs. bits: of a weight, on average; KL in nats from float32."""

    model: str
    system: str
    bits: float
    perplexity: float
    bytes: int | None = None
    perplexity_ratio: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None
    top_agreement: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Gap:
    """Something that is not in the results, and why."""

    model: str
    system: str
    what: str
    why: str


@dataclass(frozen=True)
class Results:
    """One file. machine: as the schema describes it."""

    file: str
    title: str
    machine: Mapping[str, Any]
    systems: tuple[System, ...]
    rows: tuple[Row, ...]
    quality: tuple[Quality, ...]
    gaps: tuple[Gap, ...]
    seconds: float | None = None
    command: str = ""

    @property
    def models(self) -> list[str]:
        """Every model that something was measured of."""
        names = [row.model for row in self.rows] + [each.model for each in self.quality]
        return list(dict.fromkeys(names))

    def of(self, model: str, *measures: str) -> list[Row]:
        """The rows of a model in some measures."""
        return [row for row in self.rows if row.model == model and row.measure in measures]

    def system(self, model: str, name: str) -> System | None:
        """What is known of a system."""
        found = (each for each in self.systems if (each.model, each.system) == (model, name))
        return next(found, None)


def read_results(path: Path) -> Results:
    """Read a results file of any of octavo's tools.

    Raises FileError, and InvalidArgumentError for another file, which says what is expected.
    """
    from octavo.report.convert import convert

    text = read_text(path, "results in JSON")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{path} is no JSON ({error}); expected results in JSON"
        ) from error
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{path} holds a {type(content).__name__}; expected an object")
    if content.get("schema") != SCHEMA:
        content = convert(content, str(path))
    return _results(content, path)


def _results(content: Mapping[str, Any], path: Path) -> Results:
    where, schema = str(path), json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    if content.get("machine") is None:
        raise InvalidArgumentError(
            f"{where} has no machine; expected an object, as {SCHEMA} has it"
        )
    check = _Check({f"#/$defs/{name}": each for name, each in schema["$defs"].items()})
    found = {
        key: check(content[key], each, f"{where}: {key}")
        for key, each in schema["properties"].items()
        if content.get(key) is not None
    }
    rows = _all(Row, found.get("rows", []))
    for index, row in enumerate(rows):
        if row.measure == "load" and not (row.users or row.rate):
            raise InvalidArgumentError(
                f"{where}: rows[{index}] is of a load and has neither users nor a rate; expected "
                "one of them"
            )
    return Results(
        file=path.name,
        title=found.get("title") or path.stem,
        machine=found["machine"],
        systems=_all(System, found.get("systems", [])),
        rows=rows,
        quality=_all(Quality, found.get("quality", [])),
        gaps=_all(Gap, found.get("gaps", [])),
        seconds=found.get("seconds"),
        command=str(found.get("spec", {}).get("command", "")),
    )


_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "object": ("an object", (dict,)),
    "array": ("a list", (list,)),
    "string": ("text", (str,)),
    "integer": ("a whole number", (int,)),
    "number": ("a number", (int, float)),
    "boolean": ("true or false", (bool,)),
}


@dataclass(frozen=True)
class _Check:
    """Compares values with their place in results.schema.json. definitions: what "$ref" names.

    Its words for types, names, and how many there are of something are obeyed. null stands for a
    value that is not there. Raises InvalidArgumentError, which names the place.
    """

    definitions: Mapping[str, Any]

    def __call__(self, value: Any, schema: Mapping[str, Any], where: str) -> Any:
        """The value, without every null in it."""
        schema = self.definitions.get(schema.get("$ref", ""), schema)
        given = schema.get("type", ())
        types = [given] if isinstance(given, str) else [each for each in given if each != "null"]
        choices, least = schema.get("enum", (value,)), schema.get("minItems", 0)
        if types and not any(_is_of(value, each) for each in types):
            expected = " or ".join(_TYPES[each][0] for each in types)
        elif value not in choices:
            expected = f"one of {', '.join(map(str, choices))}"
        elif least and not least <= len(value) <= schema.get("maxItems", len(value)):
            expected = f"{least} of them" if "maxItems" in schema else f"{least} of them or more"
        elif isinstance(value, dict):
            return self._object(value, schema, where)
        elif isinstance(value, list):
            items = schema.get("items", {})
            return [self(each, items, f"{where}[{i}]") for i, each in enumerate(value)]
        else:
            return value
        raise InvalidArgumentError(f"{where} is {value!r:.80}; expected {expected}")

    def _object(self, value: dict[str, Any], schema: Mapping[str, Any], where: str) -> Any:
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if value.get(name) is None and "null" not in known[name].get("type", ()):
                raise InvalidArgumentError(f"{where} has no {name}; expected it, as {SCHEMA} has")
        other = schema.get("additionalProperties", {})
        return {
            name: self(each, known.get(name, other), f"{where}.{name}")
            for name, each in value.items()
            if each is not None
        }


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float) and math.isnan(value):  # infinite may be a perplexity
        return False
    return isinstance(value, _TYPES[name][1])


_Kind = TypeVar("_Kind")


def _all(kind: type[_Kind], given: Sequence[Mapping[str, Any]]) -> tuple[_Kind, ...]:
    return tuple(_one(kind, each) for each in given)


def _one(kind: type[_Kind], given: Mapping[str, Any]) -> _Kind:
    """A dataclass of an object's known fields."""
    known = {each.name: str(each.type) for each in fields(kind)}  # type: ignore[arg-type]
    return kind(
        **{
            name: _one(Distribution, value) if known[name].startswith("Distribution") else value
            for name, value in given.items()
            if name in known
        }
    )
