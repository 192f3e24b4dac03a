"""Make docs/images/diff.svg: a run of `octavo diff`, as the terminal shows it.

    python scripts/diff_picture.py [MODEL]

The model is compared with octavo's NumPy definition.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from octavo.config import read_environment
from octavo.diff.report import print_report
from octavo.diff.setup import DiffRequest, compare

TARGET = Path(__file__).parents[1] / "docs" / "images" / "diff.svg"
LAYERS = 2  # at the start and the end; those between are left out of the picture


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    request = DiffRequest(model=model, prompt="The capital of France is")
    result = compare(request, read_environment(), lambda *_: None)
    whole = Console(file=io.StringIO(), width=96, record=True, force_terminal=True)
    print_report(result, console=whole)
    text = re.sub(r" {3}[\d.]+ s(?=\x1b)", "", whole.export_text(styles=True))
    lines = text.split("\n")  # without the seconds, which say nothing of the reader's machine
    names = [index for index, line in enumerate(lines) if "layers." in line and " taps" in line]
    left_out = set(names[LAYERS:-LAYERS])
    shown = Console(file=io.StringIO(), width=96, record=True, force_terminal=True)
    for index, line in enumerate(lines):
        if index not in left_out:
            shown.print(Text.from_ansi(line))
        elif index == names[LAYERS]:
            shown.print(f"  … {len(left_out)} more layers", style="dim")
    picture = shown.export_svg(title=f"octavo diff {model}")
    # Without the fonts that rich would fetch from another host.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    TARGET.write_text(picture, encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
