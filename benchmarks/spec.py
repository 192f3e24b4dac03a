"""What a run measures: a YAML file, read into frozen dataclasses. specs/quick.yaml explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from systems import BITS, Measure, Row

from octavo.errors import InvalidArgumentError
from octavo.files import read_text

ENGINES = {
    "octavo": ("f32", "bf16", "int8", "w8a8", "int4", "int4-nonuniform", "int4-g128"),
    "reference": ("f32",),
    "transformers": ("f32", "bf16"),
    "llama.cpp": ("f32", "bf16", "q8_0", "q4_0"),
    "vllm": ("bf16",),
    "openvino": ("bf16", "int8", "int4-g128"),
}
VARIANTS = {"octavo": ("cuda",), "transformers": ("static", "compiled", "cuda")}
MEASURES: tuple[str, ...] = (*get_args(Measure), "load", "quality")


@dataclass(frozen=True)
class SystemSpec:
    """One system: an engine, the format of its weights, and variants.

    measures: those that it takes part in. tokens, prompt: the most of a row that it is asked for,
    where the whole would take minutes; a speed in tokens a second is then in its favour.
    """

    name: str
    measures: tuple[str, ...] = MEASURES
    tokens: int = 1 << 30
    prompt: int = 1 << 30

    @property
    def engine(self) -> str:
        return self.name.split()[0]

    @property
    def format(self) -> str:
        """The format of its weights, by the engine's own name."""
        return self.name.split()[1]

    @property
    def variants(self) -> list[str]:
        return self.name.split()[2:]

    @property
    def device(self) -> str:
        return "cuda" if "cuda" in self.variants else "cpu"

    @property
    def bits(self) -> float:
        return BITS[self.format]

    def row(self, row: Row) -> Row:
        """The row as this system is asked for it."""
        return replace(
            row, prompt=min(row.prompt, self.prompt), generated=min(row.generated, self.tokens)
        )


@dataclass(frozen=True)
class LoadSpec:
    """Servers under load. users: closed loops; rates: requests that arrive in a second (Poisson).

    systems: those of the list that have a server. prompt, answer: lengths as `octavo bench serve`
    takes them. each: requests of each user, or 8 in all at least. vocabulary: llama.cpp's name for
    how the tokenizer splits text.
    """

    systems: tuple[str, ...]
    users: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    prompt: str = "32-128"
    answer: str = "16-48"
    each: int = 2
    context: int = 1024
    vocabulary: str = "smollm"


@dataclass(frozen=True)
class QualitySpec:
    """`octavo eval` in these formats, on so many windows of its text; None: on all of it."""

    formats: tuple[str, ...]
    windows: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One model (a name or folder, as octavo takes it), its systems and what is measured.

    seconds: after which nothing new is begun. left_out: system -> why it is not among them.
    """

    model: str
    systems: tuple[SystemSpec, ...]
    rows: tuple[Row, ...]
    load_format: str = "auto"
    seconds: float = 3600.0
    load: LoadSpec | None = None
    quality: QualitySpec | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A whole run. slow: seconds; what takes longer is measured in one round only."""

    title: str
    models: tuple[ModelSpec, ...]
    rounds: int = 3
    slow: float = 25.0


def read_spec(path: Path) -> Spec:
    """Raises FileError and InvalidArgumentError, which names the key and what was expected."""
    text = read_text(path, "a benchmark's YAML file")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"{path} is no YAML: {error}") from error
    return make_spec(content, str(path))


def make_spec(content: Any, where: str) -> Spec:
    """From what YAML holds. where: for messages."""
    given = _mapping(content, where, ("title", "rounds", "slow", "models"))
    models = given.get("models")
    if not isinstance(models, list) or not models:
        raise InvalidArgumentError(f"{where}: models is {models!r}; expected a list of models")
    made = tuple(_model(each, f"{where}, model {i}") for i, each in enumerate(models, 1))
    return _fill(Spec, {**given, "models": made}, where)


def _model(content: Any, where: str) -> ModelSpec:
    own = ("model", "systems", "load_format", "seconds", "left_out")
    given = _mapping(content, where, (*own, *MEASURES))
    if not isinstance(given.get("systems"), list) or not given["systems"]:
        raise InvalidArgumentError(
            f"{where}: systems is {given.get('systems')!r}; expected a list, as - octavo bf16"
        )
    systems = tuple(_system(each, where) for each in given["systems"])
    rows = [row for name in get_args(Measure) for row in _rows(name, given.get(name), where)]
    made: dict[str, Any] = {key: given[key] for key in own if key in given}
    made |= {"systems": systems, "rows": tuple(rows)}
    for name, kind in (("load", LoadSpec), ("quality", QualitySpec)):
        if name in given:
            part = _mapping(given[name], f"{where}: {name}", tuple(f.name for f in fields(kind)))
            made[name] = _fill(kind, part, f"{where}: {name}")
    return _fill(ModelSpec, made, where)


def _system(content: Any, where: str) -> SystemSpec:
    """ "octavo int8", or {system: "octavo int8", measures: [...], tokens: ..., prompt: ...}."""
    if isinstance(content, str):
        content = {"system": content}
    given = _mapping(content, f"{where}: systems", ("system", "measures", "tokens", "prompt"))
    name = str(given.pop("system", ""))
    engine, form, *variants = [*name.split(), "", ""][: max(2, len(name.split()))]
    if form not in ENGINES.get(engine, ()):
        known = "; ".join(f"{each} {', '.join(forms)}" for each, forms in ENGINES.items())
        raise InvalidArgumentError(f"{where}: the system is {name!r}; expected one of {known}")
    for variant in variants:
        if variant not in VARIANTS.get(engine, ()):
            raise InvalidArgumentError(
                f"{where}: {name!r} has {variant!r}; of {engine} there is "
                f"{', '.join(VARIANTS.get(engine, ('nothing behind the format',)))}"
            )
    for measure in given.get("measures", ()):
        _known(measure, MEASURES, f"{where}: measures of {name}")
    return _fill(SystemSpec, {"name": name, **given}, f"{where}: {name}")


_ROW_KEYS = {
    "decode": ("tokens",),
    "prefill": ("prompt",),
    "requests": ("requests", "prompt", "tokens"),
    "batch": ("sizes", "prompt", "tokens"),
    "context": ("lengths", "tokens"),
    "latency": ("prompt", "tokens"),
}


def _rows(name: Any, content: Any, where: str) -> list[Row]:
    if content is None:
        return []
    keys = _ROW_KEYS[name]
    given = _mapping(content, f"{where}: {name}", keys)
    for key in keys:
        values = given.get(key)
        for value in values if isinstance(values, list) and values else [values]:
            if not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(
                    f"{where}: {name} has {key} {value!r}; expected a whole number of 1 or more"
                )
    tokens = given.get("tokens", 1)
    if name == "context":
        return [Row(name, length, tokens) for length in _list(given["lengths"])]
    prompt = given.get("prompt", 1)
    sizes = _list(given.get("sizes", given.get("requests", 1)))
    return [Row(name, prompt, tokens, size) for size in sizes]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mapping(content: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InvalidArgumentError(f"{where} is {content!r}; expected {', '.join(known)} in it")
    for key in content:
        _known(key, known, where)
    return dict(content)


def _known(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        near = get_close_matches(str(value), known, 1)
        meant = f" (do you mean {near[0]}?)" if near else ""
        raise InvalidArgumentError(
            f"{where} has {value!r}{meant}; expected some of {', '.join(known)}"
        )


_KINDS: dict[str, tuple[type, ...]] = {
    **{"int": (int,), "float": (int, float), "str": (str,), "int | None": (int, type(None))},
    **{"tuple[str, ...]": (list, tuple), "tuple[int, ...]": (list, tuple)},
    **{"tuple[float, ...]": (list, tuple), "Mapping[str, str]": (dict,)},
}


def _fill(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    """A dataclass of what was given, lists as tuples; a wrong or missing value by its name."""
    made = {}
    for each in fields(kind):
        if each.name not in given:
            continue
        value, expected = given[each.name], _KINDS.get(str(each.type))
        if expected is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise InvalidArgumentError(f"{where}: {each.name} is {value!r}; expected {each.type}")
        made[each.name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except TypeError as error:
        raise InvalidArgumentError(f"{where}: {error}") from error
