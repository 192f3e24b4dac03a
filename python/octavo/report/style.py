"""Colours, lines and marks of the plots: the same for a system everywhere.

The colour tells the engine, the line and the mark tell the format, so that nothing rests on colour
alone. Colours are those of Okabe and Ito (2008), which people who see few colours can tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Engine -> its colour on a light page and on a dark one.
ENGINES = {
    "octavo": ("#0072b2", "#56b4e9"),
    "transformers": ("#b86e00", "#e69f00"),
    "llama.cpp": ("#00805a", "#2bc596"),
    "vllm": ("#c24e00", "#ff8f4d"),
    "openvino": ("#a8578b", "#dd9fc6"),
    "reference": ("#6b6b6b", "#b5b5b5"),
}
# What the page draws with its own colours, by the colour that stands for it in a drawing.
INK, MUTED, GRID, PAPER = "#111417", "#5b6570", "#d5dae0", "#fefeff"
DARK = {INK: "#eef1f4", MUTED: "#a4aeb8", GRID: "#39424c", PAPER: "#14181d"}

# Bits of a weight, at least -> line and mark.
_FORMATS: tuple[tuple[float, Any, str], ...] = (
    (32, (0, (1, 1)), "D"),
    (16, "solid", "o"),
    (7, (0, (5, 2)), "s"),
    (0, (0, (2, 1.5)), "^"),
)
_BITS = {"f32": 32.0, "bf16": 16.0, "f16": 16.0, "int8": 8.0, "w8a8": 8.0, "q8": 8.0}


@dataclass(frozen=True)
class Look:
    """How a system is drawn."""

    color: str
    line: Any
    mark: str


def look(system: str) -> Look:
    """By its name, "llama.cpp q4_0" as an example."""
    engine, _, form = system.partition(" ")
    word = form.lower().split(" ")[0]
    bits = next((value for name, value in _BITS.items() if word.startswith(name)), 4.0)
    line, mark = next((line, mark) for least, line, mark in _FORMATS if bits >= least)
    return Look(ENGINES.get(engine, ENGINES["reference"])[0], line, mark)


def variables() -> dict[str, tuple[str, str, str]]:
    """Colour in a drawing -> name of the page's variable, on a light page, on a dark one."""
    found = {
        light: (f"c-{name.replace('.', '')}", light, dark)
        for name, (light, dark) in ENGINES.items()
    }
    names = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
    return found | {color: (names[color], color, DARK[color]) for color in names}
