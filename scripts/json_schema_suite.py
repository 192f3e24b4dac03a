"""What octavo enforces of JSON Schema, keyword by keyword, by the official test suite.

    pip download --no-deps --no-binary :all: jsonschema && tar xzf jsonschema-*.tar.gz
    python scripts/json_schema_suite.py jsonschema-*/json

The source package of jsonschema holds the suite, github.com/json-schema-org/JSON-Schema-Test-Suite.
Prints docs/structured_output.md's table. Each schema is compiled as a strict one over a vocabulary
of single bytes; the suite's instances are then followed byte by byte, with their members in the
order of the schema. Ends with 1 if an instance is accepted that the suite calls invalid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from octavo.errors import InvalidArgumentError
from octavo.grammar.compiler import Grammars
from octavo.structured_outputs import StructuredOutputs


class Bytes:
    """A tokenizer whose tokens are bytes."""

    special_ids: frozenset[int] = frozenset()

    def bytes_of(self, token: int, *, at_start: bool = False) -> bytes:
        return bytes([token])

    def token(self, token: int) -> str:
        return chr(token)


def accepts(grammars: Grammars, wanted: StructuredOutputs, text: str) -> bool:
    matcher = grammars.compile(wanted).matcher(continues=True)
    for byte in text.encode():
        allowed, _ = matcher.allowed()
        if not int(allowed[byte >> 5]) >> (byte & 31) & 1:
            return False
        matcher.accept(byte)
    return matcher.allowed()[1]


def ordered(value: Any, schema: str) -> Any:
    """The value with the members of its objects in the order in which the schema names them."""
    if isinstance(value, list):
        return [ordered(each, schema) for each in value]
    if not isinstance(value, dict):
        return value
    places = {key: schema.find(f"{json.dumps(key)}:") for key in value}
    keys = sorted(value, key=lambda key: (places[key] < 0, places[key]))
    return {key: ordered(value[key], schema) for key in keys}


def examine(folder: Path, draft: str, show: bool) -> dict[str, Counter[str]]:
    grammars = Grammars(Bytes(), 256, (0,))  # type: ignore[arg-type]
    found: dict[str, Counter[str]] = {}
    for path in sorted((folder / "tests" / draft).glob("*.json")):
        counts = found[path.stem] = Counter()
        for case in json.loads(path.read_text(encoding="utf-8")):
            counts["schemas"] += 1
            try:
                wanted = StructuredOutputs(json=case["schema"])
                grammars.compile(wanted)
            except InvalidArgumentError as error:
                counts["refused"] += 1
                if show:
                    print(f"{path.stem}: {case['description']}: {error}", file=sys.stderr)
                continue
            for test in case["tests"]:
                text = json.dumps(ordered(test["data"], str(wanted.json)), ensure_ascii=False)
                got = accepts(grammars, wanted, text)
                counts[f"{'valid' if test['valid'] else 'invalid'} {got}"] += 1
                if show and got != test["valid"]:
                    print(
                        f"{path.stem}: {case['description']}: {test['description']}: {text[:80]} "
                        f"of {str(wanted.json)[:300]}: {got}",
                        file=sys.stderr,
                    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the suite: the folder that holds tests/")
    parser.add_argument("--draft", default="draft2020-12")
    parser.add_argument("--show", action="store_true", help="say what differs, on stderr")
    options = parser.parse_args()
    found = examine(options.folder, options.draft, options.show)
    print("| keyword | schemas followed | invalid instances refused | valid ones possible |")
    print("|---|---:|---:|---:|")
    total: Counter[str] = Counter()
    for name, counts in found.items():
        total += counts
        print(row(name, counts))
    print(row("together", total))
    return 1 if total["invalid True"] else 0


def row(name: str, counts: Counter[str]) -> str:
    followed = counts["schemas"] - counts["refused"]
    refused, wrong = counts["invalid False"], counts["invalid True"]
    possible, missing = counts["valid True"], counts["valid False"]
    parts = [
        f"{followed} of {counts['schemas']}",
        f"{refused} of {refused + wrong}",
        f"{possible} of {possible + missing}",
    ]
    return f"| {name} | {' | '.join(parts if followed else [parts[0], '', ''])} |"


if __name__ == "__main__":
    sys.exit(main())
