"""A cluster as its YAML file describes it: where jobs go, what they load, where things lie.

Every value is read as text and checked here: YAML would make 16:00:00 the number 57600, and `no` a
truth value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from octavo.errors import InvalidArgumentError
from octavo.files import read_text
from octavo.plan.devices import NAMES

_WORD = r"[A-Za-z0-9][\w.:@/=&|,*+\[\]()-]*"
_PATH = r"(~|\$\w+|\$\{\w+\})?[\w./@:+=,-]*"
_TIME = r"(?:(?P<days>\d+)-(?P<of_days>\d+(?::\d+){0,2})|(?P<plain>\d+(?::\d+){0,2}))"


def parse_time(text: str, what: str) -> int:
    """Seconds of a time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    what: the option or key, for the message. Raises InvalidArgumentError.
    """
    found = re.fullmatch(_TIME, text.strip())
    if found is None:
        raise InvalidArgumentError(
            f"{what} is {text!r}; expected a time as Slurm writes it: minutes, H:MM:SS, or D-HH:MM"
        )
    days = int(found["days"] or 0)
    parts = [int(part) for part in (found["of_days"] or found["plain"]).split(":")]
    if found["days"] is None and len(parts) < 3:
        parts = [0, *parts]  # minutes come first
    hours, minutes, seconds = [*parts, 0, 0][:3]
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 60:
        raise InvalidArgumentError(f"{what} is {text!r}; expected a minute or more")
    return total


def format_time(seconds: float) -> str:
    """93784 -> "1-02:03:04", as Slurm writes it."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{rest:02}"


def _word(value: Any, what: str) -> str:
    return _matching(value, what, _WORD, "one word, as sbatch takes it")


def _path(value: Any, what: str) -> str:
    expected = "a path without spaces or quotes; it may begin with ~ or $NAME"
    return _matching(value, what, _PATH, expected)


def _matching(value: Any, what: str, pattern: str, expected: str) -> str:
    if not isinstance(value, str) or not value or not re.fullmatch(pattern, value):
        raise InvalidArgumentError(f"{what} is {_shown(value)}; expected {expected}")
    return value


def _number(value: Any, what: str) -> int:
    if not isinstance(value, str) or not value.isdecimal() or not 0 < int(value) < 10**6:
        raise InvalidArgumentError(f"{what} is {_shown(value)}; expected a number, 1 or more")
    return int(value)


def _truth(value: Any, what: str) -> bool:
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise InvalidArgumentError(f"{what} is {_shown(value)}; expected true or false")
    return known[value.lower()]


def _memory(value: Any, what: str) -> str:
    return _matching(value, what, r"\d+[KMGT]?", "a size as sbatch takes it, as in 64G")


def _time(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} is {_shown(value)}; expected a time, as in 4:00:00")
    parse_time(value, what)
    return value


def _list(value: Any, what: str, each: Callable[[Any, str], str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InvalidArgumentError(f"{what} is {_shown(value)}; expected a list, as in [a, b]")
    return tuple(each(item, f"{what}[{index}]") for index, item in enumerate(value))


def _sbatch_line(value: Any, what: str) -> str:
    return _matching(value, what, r"-[^\n\r]*", "an option of sbatch, as in --mail-type=FAIL")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a table" if isinstance(value, dict) else "a list"
    return repr(value) if value else "empty"


_words = partial(_list, each=_word)
_lines = partial(_list, each=_sbatch_line)


def _key(read: Callable[[Any, str], Any], default: Any = None) -> Any:
    """A field of the YAML file. read: (value, its name) -> the value, checked."""
    return field(default=default, metadata={"read": read})


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind, under `nodes:`; what is left out is as the site has it.

    name: as `octavo plan --gpu` calls the device, "cpu" for nodes without one, or any word where
    `device` says which. gres: what sbatch asks for to get one GPU. gpus: how many a node has; None:
    not told.
    """

    name: str
    device: str = _key(_word, "")
    gres: str | None = _key(_word)
    gpus: int | None = _key(_number)
    constraint: str | None = _key(_word)
    partition: str | None = _key(_word)
    account: str | None = _key(_word)
    qos: str | None = _key(_word)
    modules: tuple[str, ...] | None = _key(_words)
    cpus: int | None = _key(_number)
    memory: str | None = _key(_memory)
    time: str | None = _key(_time)
    max_time: str | None = _key(_time)
    sbatch: tuple[str, ...] = _key(_lines, ())

    @property
    def has_gpu(self) -> bool:
        return self.device != "cpu"


def _nodes(value: Any, what: str) -> dict[str, NodeType]:
    if not isinstance(value, dict) or not value:
        raise InvalidArgumentError(
            f"{what} is {_shown(value)}; expected a table with the site's kinds of nodes, as in\n"
            "nodes:\n  h100: {gres: gpu:h100:1}"
        )
    found = {}
    for name, keys in value.items():
        _word(name, f"a name in {what}")
        node = NodeType(name, **_read_keys(NodeType, keys or {}, f"{what}.{name}"))
        device = node.device or name
        if device not in NAMES:
            raise InvalidArgumentError(
                f"{what}.{name} is no device that octavo plans for{_nearest(device, NAMES)}; "
                f"expected one of {', '.join(NAMES)}, or `device:` with one of them"
            )
        node = replace(node, device=device)
        if node.has_gpu and node.gres is None:
            raise InvalidArgumentError(
                f"{what}.{name} has no gres; expected what sbatch needs to give a job one GPU, as "
                f"in gres: gpu:{name}:1 (`sinfo -o '%P %G %f'` shows the site's)"
            )
        found[name] = node
    return found


@dataclass(frozen=True)
class Site:
    """A cluster. Paths may begin with ~ or $NAME, which the job's shell replaces.

    environment: the Python environment that has octavo. source: a checkout of octavo, built once
    for each type of node; None: the environment's octavo is run as it is. scratch: on a file system
    that all nodes see. home: of pulled models (OCTAVO_HOME). local_scratch: on the node, where
    weights are copied first; None: they are read where they lie. sbatch: more options of every job.
    login_host: what `ssh` reaches from outside.
    """

    name: str = _key(_word, MISSING)
    nodes: Mapping[str, NodeType] = _key(_nodes, MISSING)
    environment: str = _key(_path, MISSING)
    scratch: str = _key(_path, MISSING)
    source: str | None = _key(_path)
    home: str | None = _key(_path)
    local_scratch: str | None = _key(_path)
    login_host: str | None = _key(_word)
    offline: bool = _key(_truth, True)
    account: str | None = _key(_word)
    partition: str | None = _key(_word)
    qos: str | None = _key(_word)
    modules: tuple[str, ...] = _key(_words, ())
    cpus: int = _key(_number, 4)
    memory: str = _key(_memory, "32G")
    time: str = _key(_time, "1:00:00")
    max_time: str | None = _key(_time)
    sbatch: tuple[str, ...] = _key(_lines, ())

    def node(self, name: str) -> NodeType:
        """The nodes of a name. Raises InvalidArgumentError for what the site does not have."""
        if name not in self.nodes:
            raise InvalidArgumentError(
                f"--gpu is {name!r}, which {self.name} does not have"
                f"{_nearest(name, self.nodes)}; expected one of {', '.join(self.nodes)}"
            )
        return self.nodes[name]

    def of(self, node: NodeType, key: str) -> Any:
        """A key that nodes of a kind may have of their own, else the site's."""
        own = getattr(node, key)
        return getattr(self, key) if own is None else own


def read_site(path: Path) -> Site:
    """Read a cluster's YAML file.

    Raises FileError for a file that cannot be read, InvalidArgumentError for anything in it that
    is unknown, missing, or not of its type: the message names the file and the key.
    """
    text = read_text(path, "a YAML file that describes a cluster")
    try:
        found = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return Site(**_read_keys(Site, found, ""))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from error


def _read_keys(kind: type, given: Any, inside: str) -> dict[str, Any]:
    """The fields of a dataclass from a table of the file, each checked."""
    where = inside or "the file"
    if not isinstance(given, dict):
        raise InvalidArgumentError(f"{where} is {_shown(given)}; expected a table of keys")
    known = {each.name: each for each in fields(kind) if "read" in each.metadata}
    for name in given:
        if name not in known:
            raise InvalidArgumentError(
                f"{where} has the unknown key {name!r}{_nearest(name, known)}; "
                f"expected {', '.join(known)}"
            )
    missing = [name for name, each in known.items() if each.default is MISSING]
    for name in missing:
        if name not in given:
            raise InvalidArgumentError(f"{where} has no {name!r}, which has to be there")
    start = f"{inside}." if inside else ""
    return {name: known[name].metadata["read"](each, start + name) for name, each in given.items()}


def _nearest(name: Any, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    longer = [each for each in known if each.startswith(str(name))]
    found = longer or difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""
