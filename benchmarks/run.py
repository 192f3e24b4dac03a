"""Measure systems as a spec says, in turn, each behind its gate; write JSON and print tables.

    python benchmarks/run.py benchmarks/specs/quick.yaml     # what `make bench` runs
    python benchmarks/run.py benchmarks/specs/cpu.yaml --llama-bench PATH --vllm-python PATH
    python benchmarks/run.py SPEC --model FOLDER --systems "octavo int8,llama.cpp q8_0" \\
        --measures decode,prefill --output FILE.json
    octavo report FILE.json -o report.html                                     # plots

Each system is a process of its own. They take turns in every round, and the order turns round too.
Nothing is timed before the gates have passed: octavo's bits alone and in company, the peers'
shapes, and where weights are read the log-probabilities of all (agreement.py). A system that is
absent, fails or is late costs only itself: it is a gap in the results. benchmarks/README.md says
what each measure is.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from common import ROOT, add_common, make_parser, slug, stamp
from energy import Meter
from model_run import ModelRun
from record import Record
from spec import MEASURES, ModelSpec, Spec, read_spec

from octavo.config import read_environment
from octavo.errors import InvalidArgumentError, OctavoError
from octavo.machine import processor
from octavo.progress import Bar
from octavo.report.markdown import tables
from octavo.report.results import read_results
from octavo.weights.hub import resolve_model


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("spec", type=Path, help="a YAML file, as benchmarks/specs/quick.yaml")
    add("--model", help="this one in place of the spec's, with what the spec asks of its first")
    add("--load-format", choices=("auto", "dummy"), help="of that model")
    add("--systems", help="of the spec's, those named, with commas between them")
    add("--measures", help=f"of the spec's, those named: {', '.join(MEASURES)}")
    add("--rounds", type=int)
    add("--seconds", type=float, help="for each model; nothing new is begun afterwards")
    add_common(parser)
    add("--llama-bench", help="path of the binary; left out: beside this Python, or on the PATH")
    add("--vllm-python", type=Path, help="a Python that has vLLM for CPUs")
    add("--vllm-eager", action="store_true", help="vLLM without torch.compile: starts sooner")
    add("--openvino-python", type=Path, help="a Python that has openvino-genai and optimum-intel")
    kept = ROOT / "build" / "bench"
    add("--folder", type=Path, default=kept, help="keep GGUF files and OpenVINO's here")
    return parser


def chosen(spec: Spec, arguments: argparse.Namespace) -> Spec:
    """The spec with what the command line changes in it; raises InvalidArgumentError."""
    models = spec.models
    if arguments.model:
        load_format = arguments.load_format or "auto"
        models = (replace(models[0], model=arguments.model, load_format=load_format),)
    elif arguments.load_format:
        raise InvalidArgumentError("--load-format is of --model; expected both")
    made = tuple(_chosen(model, arguments) for model in models)
    return replace(spec, models=made, rounds=arguments.rounds or spec.rounds)


def _chosen(model: ModelSpec, arguments: argparse.Namespace) -> ModelSpec:
    names = _names(arguments.systems, {each.name for each in model.systems}, "--systems")
    measures = _names(arguments.measures, set(MEASURES), "--measures")
    return replace(
        model,
        systems=tuple(each for each in model.systems if not names or each.name in names),
        left_out={} if names else model.left_out,
        rows=tuple(row for row in model.rows if not measures or row.name in measures),
        load=model.load if not measures or "load" in measures else None,
        quality=model.quality if not measures or "quality" in measures else None,
        seconds=arguments.seconds or model.seconds,
    )


def _names(text: str | None, known: set[str], option: str) -> list[str]:
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    for name in names:
        if name not in known:
            raise InvalidArgumentError(
                f"{option} has {name!r}; expected some of {', '.join(sorted(known))}"
            )
    return names


def run(spec: Spec, arguments: argparse.Namespace, bar: Bar) -> Record:
    """Measure everything; the file is written after each part."""
    plain = {**asdict(spec), "command": command_line(sys.argv)}
    record = Record(spec.title, plain, stamp(arguments.threads))
    meter, started = Meter(), time.perf_counter()
    for part, why in meter.missing.items():
        record.gap("", "", f"joules of the {part}", why)

    def keep() -> None:
        record.content["seconds"] = round(time.perf_counter() - started, 1)
        if arguments.output is not None:
            record.write(arguments.output)

    for model in spec.models:
        try:
            path = resolve_model(model.model, read_environment())
            ModelRun(arguments, spec, model, path, record, meter, bar, keep).run()
        except OctavoError as error:
            record.gap(model.model, "", "all of it", error)
        keep()
    return record


def command_line(arguments: list[str]) -> str:
    """The command, without this machine's folders."""
    parts = [Path(part).name if Path(part).is_absolute() else part for part in arguments[1:]]
    return f"python benchmarks/run.py {shlex.join(parts)}"


def main() -> None:
    """Exit code 1 where a gate of octavo's failed, 2 where something cannot be read."""
    arguments = options().parse_args()
    try:
        spec = chosen(read_spec(arguments.spec), arguments)
    except OctavoError as error:
        sys.exit(f"error: {error}")
    if arguments.output is None:
        name = f"{arguments.spec.stem}-{slug(processor())}-{arguments.threads}t.json"
        arguments.output = ROOT / "build" / "bench" / name
    with Bar("count") as bar:
        record = run(spec, arguments, bar)
    for line in tables(read_results(arguments.output)):
        print(line)
    print(f"\nwritten: {arguments.output}")
    failed = [each for each in record.content["systems"] if each["gate"].get("passed") is False]
    if any(each["engine"] == "octavo" for each in failed):
        sys.exit("error: a gate of octavo's failed; the results say which")


if __name__ == "__main__":
    main()
