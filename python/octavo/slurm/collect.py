"""Results of jobs, from their folders into one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import FileError, InvalidArgumentError
from octavo.files import reading
from octavo.slurm.work import SCHEMA, read_runs

COLLECTED = "collected.json"
COLLECTED_SCHEMA = "octavo-slurm-collected-1"
# What `octavo report` draws.
REPORTED = ("bench", "eval")


@dataclass(frozen=True)
class Result:
    """A row that is done. content: what it gave, and under "job" what ran it."""

    path: Path
    content: dict[str, Any]

    @property
    def job(self) -> dict[str, Any]:
        return self.content["job"]  # type: ignore[no-any-return]

    @property
    def figure(self) -> str:
        """What a table shows of it."""
        content, kind = self.content, self.job["kind"]
        if kind == "bench":
            rows = content.get("rows", [])
            return ", ".join(f"{row['name']} {_speed(row['mean'])}" for row in rows)
        if kind == "eval":
            return f"perplexity {content['model']['perplexity']['value']:.3f}"
        if kind == "batch":
            return f"{content['num_answers']:,} answers"
        return f"exit code {self.job['exit_code']}"


def _speed(mean: float | None) -> str:
    """Of a row of `octavo bench`, which times nothing whose gate failed."""
    return "gate failed" if mean is None else f"{mean:,.1f} tokens/s"


@dataclass(frozen=True)
class Collected:
    """All rows of some folders. unfinished: names of those that began and are not done -> runs."""

    results: tuple[Result, ...]
    unfinished: dict[str, list[dict[str, Any]]]
    builds: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": COLLECTED_SCHEMA,
            "results": [{"file": str(each.path), **each.content} for each in self.results],
            "unfinished": self.unfinished,
        }


def collect(folders: Sequence[Path]) -> Collected:
    """Read every result below the folders.

    Raises FileError for a folder that is none, InvalidArgumentError where nothing is in them or a
    result is damaged.
    """
    results, unfinished = [], {}
    for folder in folders:
        if not folder.is_dir():
            raise FileError(f"{folder} is no folder; expected one that a job's --results named")
        results += list(_results(folder))
        for path in sorted(folder.rglob("*.runs.jsonl")):
            name = path.name.removesuffix(".runs.jsonl")
            if not (path.parent / f"{name}.json").is_file():
                unfinished[str(path.parent / name)] = read_runs(path.parent, name)
    if not results and not unfinished:
        raise InvalidArgumentError(
            f"{', '.join(map(str, folders))}: there are no results of jobs; expected folders that "
            "jobs of `octavo slurm render` have written to"
        )
    builds = {str(each.job["build"]) for each in results if each.job["build"]}
    return Collected(tuple(results), unfinished, tuple(sorted(builds)))


def _results(folder: Path) -> Iterator[Result]:
    for path in sorted(folder.rglob("*.json")):
        if path.name == COLLECTED or path.name.startswith("."):
            continue
        with reading(path, "a job's result"):
            text = path.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InvalidArgumentError(f"{path} is no JSON ({error}): delete it") from error
        job = content.get("job") if isinstance(content, dict) else None
        if isinstance(job, dict) and job.get("schema") == SCHEMA:
            yield Result(path, content)
