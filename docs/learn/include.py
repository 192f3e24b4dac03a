"""Copies programs, their output and tables into the chapters, so that they cannot differ.

    python docs/learn/include.py            # rewrites the chapters
    python docs/learn/include.py --check    # ends with an error where a chapter is out of date

A chapter says where: `<!-- program toys/FILE.py -->`, `<!-- output toys/FILE.py -->`,
`<!-- table experiments/FILE.json -->` (or a file of benchmarks/), each with `<!-- end -->` behind
what was put there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PLACE = re.compile(r"<!-- (program|output|table) (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def output_of(program: Path) -> str:
    """What a program prints."""
    command = [sys.executable, str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table_of(file: Path) -> str:
    """The table of a file of figures, in Markdown: numbers to the right."""
    record = json.loads(file.read_text(encoding="utf-8"))
    head, *rows = record["table"]
    lines = [head, ["---:"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    stamp = record["machine"]
    measured = f"{stamp['cores']} cores of {stamp['processor']}, {stamp['isa']}, {stamp['date']}"
    return f"{text}\n\n*Measured on {measured}. Yours will differ.*\n"


def included(kind: str, path: str) -> str:
    """What stands between the marks."""
    file = FOLDER / path
    if kind == "table":
        return table_of(file)
    if kind == "program":
        return f"```python\n{file.read_text(encoding='utf-8')}```\n"
    return f"```text\n{output_of(file)}```\n"


def filled(text: str) -> str:
    """A chapter's text with all its places filled anew."""

    def fill(place: re.Match[str]) -> str:
        kind, path = place.groups()
        return f"<!-- {kind} {path} -->\n{included(kind, path)}<!-- end -->"

    return PLACE.sub(fill, text)


def main() -> None:
    """Rewrite or check all chapters."""
    for chapter in sorted(FOLDER.glob("*.md")):
        old = chapter.read_text(encoding="utf-8")
        new = filled(old)
        if new != old and "--check" in sys.argv:
            sys.exit(f"{chapter.name} is out of date: run `python docs/learn/include.py`")
        chapter.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
