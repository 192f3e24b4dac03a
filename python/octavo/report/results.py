"""Results of a benchmark in one form, read from files that octavo's tools write.

`results.schema.json` describes that form, which benchmarks/run.py writes; `convert.py` makes it of
the other files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
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
    where = str(path)
    machine = content.get("machine")
    if not isinstance(machine, Mapping):
        raise InvalidArgumentError(
            f"{where} has no machine; expected an object, as {SCHEMA} has it"
        )
    return Results(
        file=path.name,
        title=str(content.get("title") or path.stem),
        machine=machine,
        systems=_all(System, content, "systems", where),
        rows=_all(Row, content, "rows", where),
        quality=_all(Quality, content, "quality", where),
        gaps=_all(Gap, content, "gaps", where),
        seconds=content.get("seconds"),
        command=str((content.get("spec") or {}).get("command", "")),
    )


_Kind = TypeVar("_Kind")
_CHECKS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "Sequence[float]": (list,),
    "Mapping[str, Any]": (dict,),
}


def _all(kind: type[_Kind], content: Mapping[str, Any], key: str, where: str) -> tuple[_Kind, ...]:
    given = content.get(key, [])
    if not isinstance(given, list):
        raise InvalidArgumentError(f"{where}: {key} is {given!r:.80}; expected a list")
    return tuple(_one(kind, each, f"{where}: {key}[{i}]") for i, each in enumerate(given))


def _one(kind: type[_Kind], given: Any, where: str) -> _Kind:
    """A dataclass of an object's known fields; what is missing or of another type is named."""
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f"{where} is {given!r:.80}; expected an object")
    made: dict[str, Any] = {}
    for each in fields(kind):  # type: ignore[arg-type]
        value = given.get(each.name)
        expected, optional = str(each.type), str(each.type).endswith(" | None")
        if value is None:
            if each.default is MISSING and each.default_factory is MISSING:
                raise InvalidArgumentError(f"{where} has no {each.name}; expected {expected}")
            continue
        if expected == "Distribution | None":
            made[each.name] = _one(Distribution, value, f"{where}.{each.name}")
            continue
        types = _CHECKS[expected.removesuffix(" | None") if optional else expected]
        if not isinstance(value, types) or isinstance(value, bool):
            raise InvalidArgumentError(f"{where}.{each.name} is {value!r:.80}; expected {expected}")
        if expected == "Sequence[float]" and not _are_numbers(
            given[each.name], each.name == "samples"
        ):
            raise InvalidArgumentError(
                f"{where}.{each.name} is {value!r:.80}; expected numbers, one at least"
            )
        made[each.name] = value
    return kind(**made)


def _are_numbers(values: Sequence[Any], needs_one: bool) -> bool:
    return (bool(values) or not needs_one) and all(isinstance(v, (int, float)) for v in values)
