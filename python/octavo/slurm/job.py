"""A job as it is asked for, and its rows: the commands that it runs, one after the other.

A row is a name and a command, and is done or not done as a whole: a job that is put back into the
queue goes on at its first row that is not done (`octavo batch` goes on within its row, too).
"""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import PurePath
from typing import Any

from octavo.errors import InvalidArgumentError

# Seconds before the time limit at which Slurm asks a job to stop, and how many of them a batch may
# spend on the answers that are under way.
SIGNAL_SECONDS, DRAIN_SECONDS = 120, 75
_UNQUOTED = r"[\w@%+=:,./{}-]+"
_RANKS_OPTIONS = ("--tensor-parallel-size", "-tp")
FORMATS = ("auto", "f32", "bf16", "f16", "int8", "w8a8", "int4", "int4-nonuniform")


@dataclass(frozen=True)
class Kind:
    """What a job does.

    captures: standard output is a result in JSON. stop: the signal that asks a row to end.
    drains: it then finishes what it has begun. ends: a row that has ended is done; a server is not.
    varies: whether rows differ in number format and in batch size. divides: whether the command
    can divide the model among several GPUs.
    """

    summary: str
    captures: bool = False
    stop: signal.Signals = signal.SIGINT
    drains: bool = False
    ends: bool = True
    varies: tuple[bool, bool] = (False, False)
    divides: bool = True


KINDS = {
    "bench": Kind("measures speed beside the node's limits", captures=True, varies=(True, True)),
    "batch": Kind(
        "answers a file of prompts", stop=signal.SIGUSR1, drains=True, varies=(True, True)
    ),
    "serve": Kind("serves a model over HTTP", stop=signal.SIGTERM, drains=True, ends=False),
    "eval": Kind("measures perplexity and KL divergence", captures=True, varies=(True, False)),
    "diff": Kind(
        "compares octavo with its reference", captures=True, varies=(True, False), divides=False
    ),
    "gpu": Kind("builds, tests and measures on a GPU: benchmarks/gpu.sh", divides=False),
}


@dataclass(frozen=True)
class Row:
    """A command and its name.

    words: `{model}`, `{results}`, … stand for what the node decides, `{{` for one brace.
    """

    name: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.name, *map(_quoted, self.words)))

    def filled(self, places: Mapping[str, str]) -> list[str]:
        """The command with every `{name}` of `places` replaced, and every `{{` by `{`."""
        found = {"{{": "{", **{f"{{{name}}}": value for name, value in places.items()}}
        pattern = "|".join(map(re.escape, found))
        return [re.sub(pattern, lambda match: found[match[0]], word) for word in self.words]


def _quoted(word: str) -> str:
    return word if re.fullmatch(_UNQUOTED, word) else shlex.quote(word)


def read_rows(text: str) -> list[Row]:
    """Rows from lines of a name and a command. Raises InvalidArgumentError."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InvalidArgumentError(f"line {number} of the rows: {error}") from error
        if not words:
            continue
        if len(words) < 2 or not re.fullmatch(r"[\w.-]+", words[0]):
            raise InvalidArgumentError(
                f"line {number} of the rows is {line!r}; expected a name and a command"
            )
        rows.append(Row(words[0], tuple(words[1:])))
    names = [row.name for row in rows]
    if len(set(names)) < len(names) or not rows:
        raise InvalidArgumentError(
            f"the rows are named {', '.join(names) or '(there are none)'}; expected one row or "
            "more, each with a name of its own"
        )
    return rows


@dataclass(frozen=True)
class JobRequest:
    """What `octavo slurm render` was asked for.

    cluster: path of the site's YAML file. node: of its `nodes`. input: of a batch. time: as Slurm
    writes it; "" takes the site's. results: a folder; relative to where `sbatch` is called. array:
    a task of the job for each row; otherwise one job runs all. tensor_parallel_size: among how many
    GPUs of a node the model is divided. extra: more words of the command.
    """

    kind: str
    cluster: str
    node: str
    model: str = "smollm2-135m"
    input: str = ""
    formats: tuple[str, ...] = ("auto",)
    batch_sizes: tuple[int, ...] = ()
    time: str = ""
    results: str = ""
    array: bool = True
    tensor_parallel_size: int = 1
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if kind is None:
            raise InvalidArgumentError(
                f"the kind of job is {self.kind!r}; expected one of {', '.join(KINDS)}"
            )
        for what, values, varies in (
            ("--formats", [each for each in self.formats if each != "auto"], kind.varies[0]),
            ("--batch-sizes", self.batch_sizes, kind.varies[1]),
        ):
            if len(values) and not varies and (what, self.kind) != ("--formats", "serve"):
                raise InvalidArgumentError(
                    f"{what} is {','.join(map(str, values))}, which a {self.kind} job does not "
                    "take: leave it out"
                )
        self._check_ranks()
        self._check_values()

    def _check_ranks(self) -> None:
        ranks = self.tensor_parallel_size
        if ranks < 1:
            raise InvalidArgumentError(
                f"--tensor-parallel-size is {ranks}; expected a number of GPUs, 1 or more"
            )
        if ranks > 1 and not KINDS[self.kind].divides:
            raise InvalidArgumentError(
                f"--tensor-parallel-size is {ranks}, which a {self.kind} job does not take: leave "
                "it out"
            )
        for word in self.extra:
            if KINDS[self.kind].divides and word.partition("=")[0] in _RANKS_OPTIONS:
                raise InvalidArgumentError(
                    f"{word} stands behind `--`, so the job would ask for one GPU only; expected "
                    "--tensor-parallel-size before it, as an option of render"
                )

    def _check_values(self) -> None:
        for each in self.formats:
            if each not in FORMATS:
                raise InvalidArgumentError(
                    f"--formats has {each!r}; expected some of {', '.join(FORMATS)}"
                )
        if self.kind == "serve" and len(self.formats) != 1:
            raise InvalidArgumentError(
                f"--formats is {','.join(self.formats)}; expected one: a job serves one model"
            )
        for values in (self.formats, self.batch_sizes):
            if len(set(values)) < len(values):
                raise InvalidArgumentError(
                    f"{','.join(map(str, values))} names the same twice; expected each once"
                )
        if (self.kind == "batch") != bool(self.input):
            raise InvalidArgumentError(
                "a batch job needs --input IN.jsonl, a file with one prompt a line"
                if self.kind == "batch"
                else f"--input is {self.input!r}, which a {self.kind} job does not take"
            )
        for word in (self.model, self.input, self.results, *self.extra):
            if re.search(r"[\x00-\x1f]", word):
                raise InvalidArgumentError(
                    f"{word!r} has a line break or another control character; a job's script "
                    "cannot hold it"
                )
        for name, path in (("--results", self.results), ("--cluster", self.cluster)):
            if not re.fullmatch(r"[\w./@:+=,~-]*", path):
                raise InvalidArgumentError(
                    f"{name} is {path!r}; expected a path without spaces and quotes"
                )

    @property
    def folder(self) -> str:
        """Where results go."""
        return self.results or f"octavo-results/{self.kind}-{self.node}"

    def to_json(self) -> dict[str, Any]:
        """Without what is left as it is by default."""
        return {
            each.name: value
            for each in fields(self)
            if (value := asdict(self)[each.name]) != each.default
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> JobRequest:
        """The request from what `to_json` gave. Raises InvalidArgumentError."""
        try:
            values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise InvalidArgumentError(f"no request of `octavo slurm render`: {error}") from error


def make_rows(request: JobRequest, has_gpu: bool) -> list[Row]:
    """The rows of a job."""
    device = ["--device", "cuda" if has_gpu else "cpu"]
    if request.tensor_parallel_size > 1:
        device += ["--tensor-parallel-size", str(request.tensor_parallel_size)]
    extra = [_verbatim(word) for word in request.extra]
    if request.kind == "gpu":
        command = ("env", "OUT={results}", "{source}/benchmarks/gpu.sh", *extra)
        return [Row("gpu", command)]
    rows = []
    for number_format, size in product(request.formats, request.batch_sizes or (None,)):
        name = number_format + (f"-b{size}" if size else "")
        engine = (*device, *_format_options(request.kind, number_format, has_gpu))
        if request.kind == "batch":
            sizes: Sequence[str] = ("--max-num-seqs", str(size)) if size else ()
            files = (_verbatim(request.input), f"{{results}}/{name}.jsonl", "--model", "{model}")
            words = ("octavo", "batch", *files, *engine, *sizes, *extra)
        elif request.kind == "serve":
            name = "serve"
            listen = ("--host", "{host}", "--port", "{port}")
            words = ("octavo", "serve", "{model}", *listen, *engine, *extra)
        else:
            sizes = ("--batch", str(size)) if size else ()
            output = ("--output", "json") if request.kind == "bench" else ("--json",)
            words = ("octavo", request.kind, "{model}", *engine, *sizes, *extra, *output)
        rows.append(Row(name, words))
    return rows


def _verbatim(word: str) -> str:
    """A user's own word, in which `Row.filled` then replaces nothing."""
    return word.replace("{", "{{")


def _format_options(kind: str, number_format: str, has_gpu: bool) -> Iterable[str]:
    if number_format == "auto":
        return ()
    if number_format in ("f32", "bf16", "f16"):
        return ("--dtype", number_format)
    # `octavo diff` has its own format for quantized weights.
    dtype = ("--dtype", "bf16") if has_gpu and kind != "diff" else ()
    return (*dtype, "--quantize", number_format)


def staged_name(model: str) -> str:
    """What a model is called where it has been copied to the node: its name, or its folder's."""
    return PurePath(model).name if model.startswith((".", "/", "~")) else model
