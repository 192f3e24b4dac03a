"""One model's part of a run: start, gate, rounds, memory, servers under load, quality."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agreement import PROMPT, check_agreement, error_of, is_compared
from catalog import Absent, Catalog
from common import in_turns
from energy import Meter
from record import ROOFS, Record, Samples
from spec import ModelSpec, Spec, SystemSpec
from systems import Process, Row, output_of
from under_load import measure_load, octavo_options

from octavo.bench.cases import Peak
from octavo.progress import Bar
from octavo.report.convert import quality_of_eval

# What may go wrong in a system without ending the run.
FAILURES = (Exception, SystemExit)
# w8a8 decodes as int8 does: it is of use where arithmetic is the limit.
NOT_MEASURED = {("decode", "w8a8"), ("latency", "w8a8"), ("context", "w8a8")}
LEAST = 3.0  # seconds that have to be left for another sample


class ModelRun:
    """Systems by name, and what they gave. keep: writes the record."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        spec: Spec,
        model: ModelSpec,
        path: Path,
        record: Record,
        meter: Meter,
        bar: Bar,
        keep: Callable[[], None],
    ) -> None:
        self._arguments, self._spec, self._model, self._record = arguments, spec, model, record
        self._meter, self._bar, self._keep = meter, bar, keep
        self.name = path.name
        self._catalog = Catalog(arguments, model, path, arguments.folder)
        self._end = time.perf_counter() + model.seconds
        self._systems: dict[str, tuple[SystemSpec, Process]] = {}
        self._entries: dict[str, dict[str, Any]] = {}  # of the record's "systems"
        self._samples: dict[tuple[str, Row], Samples] = {}
        self._works: dict[tuple[str, Row], Any] = {}  # of octavo's: bytes and operations
        self._seconds: dict[tuple[str, Row], float] = {}  # that a sample took, at most
        self._done = 0

    def run(self) -> None:
        """Everything that the spec asks of this model."""
        for system, why in self._model.left_out.items():
            self._record.gap(self.name, system, "all of it", why)
        self._record.content["models"].append(
            {"model": self.name, "load_format": self._model.load_format}
        )
        try:
            for system in self._model.systems:
                self._guarded(system.name, "all of it", self._start, system)
            self._guarded("", "log-probabilities beside float32", self._agree)
            self._round(0)
            self._context()
            self._serve_and_score()
            # More rounds last: where time is short, every measure has one sample.
            for number in range(1, self._spec.rounds):
                self._round(number)
        finally:
            for _, process in self._systems.values():
                process.close()
        self._keep()

    def _serve_and_score(self) -> None:
        if self._model.load is not None:
            self._show("servers under load")
            parts = (self._catalog, self._record, self._arguments, self._left)
            measure_load(self._model.load, *parts)
        if self._model.quality is not None:
            for form in self._model.quality.formats:
                self._guarded(f"octavo {form}", "quality", self._quality, form)

    def _left(self) -> float:
        return self._end - time.perf_counter()

    def _show(self, what: str) -> None:
        rows = len(self._model.rows) * len(self._model.systems) * self._spec.rounds
        self._bar.update(self.name, min(self._done, rows), rows, what)

    def _guarded(self, system: str, what: str, work: Callable[..., None], *settings: Any) -> None:
        """Do some work on a system; what goes wrong in it becomes a gap."""
        self._show(f"{what if what != 'all of it' else 'starting'}: {system}")
        if self._left() < LEAST:
            seconds = f"the {self._model.seconds:.0f} s for this model were used up before"
            self._record.gap(self.name, system, what, seconds)
            return
        try:
            work(*settings)
        except FAILURES as error:
            self._record.gap(self.name, system, what, error)

    def _rows(self, system: SystemSpec) -> list[tuple[Row, Row]]:
        """The rows that a system takes part in: as the spec has them, and as it is asked."""
        return [
            (row, system.row(row))
            for row in self._model.rows
            if row.name in system.measures and (row.name, system.format) not in NOT_MEASURED
        ]

    def _start(self, system: SystemSpec) -> None:
        """Start a system and check its gate."""
        rows = [asked for row, asked in self._rows(system) if row.name != "context"]
        process = self._catalog.start(system, rows or [Row("decode", 1, 1)])
        entry: dict[str, Any] = {
            "model": self.name,
            "system": system.name,
            "engine": system.engine,
            "format": system.format,
            "bits": system.bits,
            "device": system.device,
            "start_seconds": round(process.start_seconds, 2),
            "load_seconds": round(process.load_seconds, 2),
            "gate": {},
            **process.describe(),
        }
        self._record.content["systems"].append(entry)
        self._entries[system.name] = entry
        try:
            self._check(system, process, entry, rows)
        except FAILURES:
            process.close()
            raise
        self._systems[system.name] = (system, process)

    def _check(
        self, system: SystemSpec, process: Process, entry: dict[str, Any], rows: list[Row]
    ) -> None:
        """The shape, and octavo's bits in every row. Raises RuntimeError where they are wrong."""
        expected = next(
            (e["num_parameters"] for e in self._entries.values() if "num_parameters" in e), None
        )
        if entry.get("num_parameters", expected) != expected:
            raise RuntimeError(f"has {entry['num_parameters']} parameters; expected {expected}")
        for row in rows:
            found = dict(process.check(row))
            if not found.get("passed", True):
                entry["gate"]["passed"] = False
                raise RuntimeError(f"its bits depend on what shares the batch ({row}: {found})")
            if "logits" in found:
                hashes = entry["gate"].setdefault("logits", {})
                hashes[f"{row.name} {row.requests}"] = found["logits"]
                entry["gate"] |= {"passed": True, "how": "the same bits alone and in company"}
            if system.engine == "octavo":
                self._works[system.name, row] = process.works(row)

    def _agree(self) -> None:
        """Log-probabilities of all from float32; who computes another model is closed."""
        if self._model.load_format == "dummy":
            reason = "dummy weights differ from system to system: only shapes and bits are checked"
            self._record.gap(self.name, "", "log-probabilities beside float32", reason)
            return
        compared = {n: s for n, s in self._systems.items() if is_compared(s[0].format)}
        if not compared:
            return
        truth, judge = self._truth()
        errors: dict[str, float] = {}
        for name, (_, process) in compared.items():
            try:
                told = process.logprobs(PROMPT)
                if told is not None:
                    errors[name] = error_of(truth, told)
            except FAILURES as error:
                self._drop(name, error)
        forms = {name: self._systems[name][0].format for name in errors}
        wrong = check_agreement(errors, forms)
        for name, error in errors.items():
            gate = {"logprob_error": error, "judge": judge, "passed": name not in wrong}
            self._entries[name]["gate"] |= gate
            if name in wrong:
                self._drop(name, wrong[name])

    def _truth(self) -> tuple[dict[int, float], str]:
        """Log-probabilities in float32, by transformers where they are, else by the definition."""
        for name in ("transformers f32", "reference f32"):
            self._show(f"float32 by {name}")
            try:
                process = self._catalog.start(SystemSpec(name), [])
            except Absent:
                continue
            try:
                return process.logprobs(PROMPT), name
            finally:
                process.close()
        raise RuntimeError("neither transformers nor the reference is there")

    def _drop(self, name: str, why: object) -> None:
        self._record.gap(self.name, name, "all of it", why)
        self._systems.pop(name)[1].close()

    def _round(self, number: int) -> None:
        """One sample of every row by every system, as far as time is left."""
        for row in self._model.rows:
            if row.name == "context":
                continue
            for name, (system, process) in in_turns(self._systems.items(), number):
                asked = next((a for r, a in self._rows(system) if r == row), None)
                if asked is not None and self._is_worth_it(name, asked, number):
                    what = f"{row.name}, {row.requests} at once" if row.requests > 1 else row.name
                    self._guarded(name, what, self._sample, system, process, asked)
                self._done += 1
        if number == 0:
            self._note_memory()  # before the limits: what measures them takes memory, too
        self._measure_limits()
        self._write_rows()

    def _is_worth_it(self, name: str, row: Row, number: int) -> bool:
        """Whether it is measured in this round: what is slow, once; what failed, no more."""
        if number == 0:
            return True
        took = self._seconds.get((name, row))
        return took is not None and took < min(self._spec.slow, self._left())

    def _sample(self, system: SystemSpec, process: Process, row: Row) -> None:
        key = (system.name, row)
        samples = self._samples.get(key)
        if samples is None:
            process.warm_up(row)
            samples = Samples(self.name, system, row)
        start, before = time.perf_counter(), self._meter.joules()
        sample = process.run(row)
        after = self._meter.joules()
        self._seconds[key] = time.perf_counter() - start
        samples.add(sample, {part: after[part] - before[part] for part in after})
        self._samples[key] = samples

    def _context(self) -> None:
        """Memory behind long prompts, by systems that are started for each."""
        for row in self._model.rows:
            for system in self._model.systems if row.name == "context" else ():
                if row.name in system.measures and system.name in self._systems:
                    what = f"{row.name} of {row.prompt}"
                    self._guarded(system.name, what, self._fresh, system, row)

    def _fresh(self, system: SystemSpec, row: Row) -> None:
        process = self._catalog.start(system, [row])
        try:
            samples = Samples(self.name, system, row)
            samples.add(process.run(row), {})
            samples.memory = process.memory()
            self._samples[system.name, row] = samples
        finally:
            process.close()

    def _measure_limits(self) -> None:
        """What the machine can do in each of octavo's formats: the best seen in this run."""
        for name, (system, process) in self._systems.items():
            if system.engine == "octavo" and self._left() > LEAST:
                self._guarded(name, "the machine's limits", self._note_limits, name, process)

    def _note_limits(self, name: str, process: Process) -> None:
        best = self._entries[name].setdefault("limits", {})
        for limit, value in process.limits().items():
            is_number = not isinstance(value, str)
            best[limit] = max(best.get(limit, 0.0), value) if is_number else value

    def _roof(self, samples: Samples) -> Any:
        """Whose work a row is held against, that work and the limits; None where not known."""
        system = samples.system
        on = " cuda" if system.device == "cuda" else ""
        name = f"octavo {ROOFS.get(system.format, system.format)}{on}"
        row, limits = samples.row, self._entries.get(name, {}).get("limits")
        # A row that is shorter for a slow system is held against the work a token of the whole one.
        like = [
            each
            for who, each in self._works
            if (who, each.name, each.requests, each.prompt)
            == (name, row.name, row.requests, row.prompt)
        ]
        if not like or not limits:
            return None
        whole = row if row in like else like[0]
        works = [
            (num_bytes / whole.tokens, operations / whole.tokens)
            for num_bytes, operations in self._works[name, whole]
        ]
        return name, works, Peak(limits["bandwidth"], limits["flops"])

    def _write_rows(self) -> None:
        """Every row so far into the record, in the spec's order."""
        own = {row.name for row in self._model.rows}
        others = [
            row
            for row in self._record.content["rows"]
            if row["model"] != self.name or row["measure"] not in own
        ]
        order = [system.name for system in self._model.systems]
        found = sorted(
            self._samples.values(),
            key=lambda s: (
                self._order(s.row.name),
                s.row.requests,
                s.row.prompt,
                order.index(s.system.name),
            ),
        )
        rows = [samples.to_json(self._roof(samples)) for samples in found if len(samples)]
        self._record.content["rows"] = others + rows
        self._keep()

    def _order(self, measure: str) -> int:
        return [row.name for row in self._model.rows].index(measure)  # type: ignore[arg-type]

    def _note_memory(self) -> None:
        """The most memory of every system over one round."""
        for name, (_, process) in list(self._systems.items()):
            try:
                memory: Mapping[str, int] = process.memory()
            except FAILURES as error:
                self._record.gap(self.name, name, "peak memory", error)
                continue
            self._entries[name] |= {f"{place}_bytes": count for place, count in memory.items()}

    def _quality(self, form: str) -> None:
        """`octavo eval` in a format, in a process of its own."""
        command = [sys.executable, "-m", "octavo", "eval", str(self._catalog.path), "--json"]
        command += octavo_options(form)
        if self._model.quality is not None and self._model.quality.windows:
            command += ["--max-windows", str(self._model.quality.windows)]
        output, _ = output_of(command, max(30.0, self._left()))
        self._record.content["quality"].append(
            {**quality_of_eval(json.loads(output)), "model": self.name, "system": f"octavo {form}"}
        )
