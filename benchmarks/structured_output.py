"""What structured outputs cost: the first token of a new schema, and the masks beside a step.

    git clone https://github.com/guidance-ai/jsonschemabench    # 11,000 public schemas
    python benchmarks/structured_output.py delay jsonschemabench/maskbench/data --every 10
    python benchmarks/structured_output.py masks --batch 1,64
    python benchmarks/structured_output.py libraries jsonschemabench/maskbench/data --every 50

`delay`: how much later the first token comes with a schema that is new. `masks`: the part of a step
that goes into masks, while SmolLM2-135M (or --model) writes JSON. `libraries`: llguidance beside
xgrammar, on the same schemas and texts; xgrammar needs torch (`pip install xgrammar`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from octavo.config import read_environment
from octavo.engine.steering import Steering
from octavo.errors import InvalidArgumentError
from octavo.grammar.compiler import Grammars
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputs
from octavo.text.tokenizer import Tokenizer
from octavo.weights.hub import resolve_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "visits": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "year": {"type": "integer"}},
                "required": ["city", "year"],
            },
        },
    },
    "required": ["name", "age", "mail", "visits"],
}


def schemas_of(folder: Path, every: int) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Each n-th schema and the texts that are known to be valid."""
    for path in sorted(folder.glob("*.json"))[::every]:
        content = json.loads(path.read_text(encoding="utf-8"))
        tests = content.get("tests", [])
        yield content["schema"], [test["data"] for test in tests if test["valid"]]


def line(name: str, seconds: list[float]) -> None:
    if not seconds:
        return
    values = np.percentile(np.array(seconds) * 1e3, [50, 95, 99, 100])
    print(
        f"{name}: p50 {values[0]:.3f}, p95 {values[1]:.3f}, p99 {values[2]:.3f}, "
        f"most {values[3]:.3f} ms ({len(seconds)})"
    )


def measure_delay(options: argparse.Namespace) -> None:
    tokenizer, grammars = open_grammars(options)
    start = time.perf_counter()
    grammars.prepare()
    print(
        f"the vocabulary, once: {time.perf_counter() - start:.2f} s, {tokenizer.vocab_size} tokens"
    )
    for strict in (True, False):
        seconds, refused = [], 0
        for schema, _ in schemas_of(options.folder, options.every):
            start = time.perf_counter()
            try:
                grammar = grammars.compile(StructuredOutputs(json=schema, strict=strict))
            except InvalidArgumentError:
                refused += 1
                continue
            grammar.matcher(continues=True).allowed()
            seconds.append(time.perf_counter() - start)
        line(f"strict {strict}: refused {refused}, delay of the others", seconds)


def open_grammars(options: argparse.Namespace) -> tuple[Tokenizer, Grammars]:
    tokenizer = Tokenizer(str(resolve_model(options.model, read_environment())))
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def measure_masks(options: argparse.Namespace) -> None:
    llm = LLM(options.model, max_model_len=1024, num_threads=options.threads)
    spent = [0.0]
    arrays = Steering.arrays

    def timed(self: Steering, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return arrays(self, *arguments)
        finally:
            spent[0] += time.perf_counter() - start

    Steering.arrays = timed  # type: ignore[method-assign]
    talk = [{"role": "user", "content": "Tell me about Ada Lovelace, as JSON."}]
    for size in map(int, options.batch.split(",")):
        for wanted in (None, StructuredOutputs(json=SCHEMA)):
            params = [
                SamplingParams(
                    temperature=0.8,
                    seed=seed,
                    max_tokens=options.tokens,
                    structured_outputs=wanted,
                    ignore_eos=wanted is None,
                )
                for seed in range(size)
            ]
            llm.chat([talk] * size, params, progress=False)  # warm
            before, spent[0], start = llm.engine.num_steps, 0.0, time.perf_counter()
            outputs = llm.chat([talk] * size, params, progress=False)
            seconds = time.perf_counter() - start
            steps = llm.engine.num_steps - before
            sampled = sum(len(output.outputs[0].token_ids) for output in outputs)
            share = f"; masks {spent[0] / seconds:.2%} of the time, "
            share += f"{spent[0] / sampled * 1e6:.0f} us a token"
            print(
                f"batch {size}, {'JSON' if wanted else 'plain'}: {sampled / seconds:.1f} tokens/s, "
                f"{seconds / steps * 1e3:.2f} ms a step{share if wanted else ''}"
            )


def measure_libraries(options: argparse.Namespace) -> None:
    tokenizer, grammars = open_grammars(options)
    grammars.prepare()
    found: dict[str, list[list[float]]] = {}
    refused: dict[str, int] = {}
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "llguidance": lambda schema: _Own(grammars, schema),
        "xgrammar": _xgrammar(tokenizer),
    }
    for schema, texts in schemas_of(options.folder, options.every):
        for name, make in makers.items():
            first, compiling, masks = found.setdefault(name, [[], [], []])
            start = time.perf_counter()
            try:
                matcher = make(schema)
            except Exception:
                refused[name] = refused.get(name, 0) + 1
                continue
            compiling.append(time.perf_counter() - start)
            matcher.fill()
            first.append(time.perf_counter() - start)
            for text in texts[:1]:
                for token in tokenizer.encode(json.dumps(text, indent=1), False)[:300]:
                    start = time.perf_counter()
                    matcher.fill()
                    masks.append(time.perf_counter() - start)
                    if not matcher.accept(token):
                        break
    for name, (first, compiling, masks) in found.items():
        print(f"{name}: refused {refused.get(name, 0)}")
        line("  compile", compiling)
        line("  compile and first mask", first)
        line("  mask", masks)


class _Own:
    def __init__(self, grammars: Grammars, schema: dict[str, Any]) -> None:
        wanted = StructuredOutputs(json=schema, strict=False)
        self._matcher = grammars.compile(wanted).matcher(continues=True)

    def fill(self) -> None:
        self._matcher.allowed()

    def accept(self, token: int) -> bool:
        try:
            self._matcher.accept(token)
        except ValueError:
            return False
        return True


def _xgrammar(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], Any]:
    import xgrammar

    words = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
    info = xgrammar.TokenizerInfo(words, stop_token_ids=list(tokenizer.eos_token_ids))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bitmask = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)

    class Matcher:
        def __init__(self, schema: dict[str, Any]) -> None:
            compiled = compiler.compile_json_schema(json.dumps(schema))
            self._matcher = xgrammar.GrammarMatcher(compiled)

        def fill(self) -> None:
            self._matcher.fill_next_token_bitmask(bitmask)

        def accept(self, token: int) -> bool:
            return bool(self._matcher.accept_token(token))

    return Matcher


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("delay", measure_delay), ("libraries", measure_libraries)):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path, help="jsonschemabench's maskbench/data")
        command.add_argument("--every", type=int, default=10, help="only each n-th schema")
        command.set_defaults(function=function)
    command = commands.add_parser("masks")
    command.add_argument("--batch", default="1,64")
    command.add_argument("--tokens", type=int, default=96)
    command.add_argument("--threads", type=int, default=2)
    command.set_defaults(function=measure_masks)
    for command in commands.choices.values():
        command.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    options.function(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
