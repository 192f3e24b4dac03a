"""What the experiments share: SmolLM2, a plot in two themes, and a file with the figures."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo import _native
from octavo.config import EngineConfig, read_environment
from octavo.machine import processor
from octavo.models.kv_groups import with_kv_groups
from octavo.reference.llama import ReferenceModel
from octavo.runtime.loader import LoadedRuntime, load_runtime
from octavo.runtime.session import Session
from octavo.text.tokenizer import Tokenizer
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
from picture import THEMES, theme_css

if TYPE_CHECKING:
    from matplotlib.axes import Axes

if find_spec("matplotlib") is None:  # before anything is measured
    sys.exit(
        "error: the plot needs matplotlib, which is not installed: "
        f"{sys.executable} -m pip install matplotlib"
    )
MODEL = "smollm2-135m"
COLOURS = {name: light for name, (light, _) in THEMES.items()}


def load_reference() -> tuple[ReferenceModel, Tokenizer]:
    """SmolLM2 in NumPy, float32, and its tokenizer."""
    files = read_model(resolve_model(MODEL, read_environment()))
    checkpoint = open_checkpoint(files)
    weights = {name: checkpoint[name].to_float32() for name in checkpoint}
    return ReferenceModel(files.spec, weights), Tokenizer(files.folder)


def load_tokenizer() -> Tokenizer:
    """SmolLM2's."""
    return Tokenizer(resolve_model(MODEL, read_environment()))


def load_core(**options: Any) -> LoadedRuntime:
    """SmolLM2 in octavo's native core; options: of EngineConfig."""
    config = EngineConfig(**{"max_model_len": 1024, **options})
    files = read_model(resolve_model(MODEL, read_environment()))
    files = replace(files, spec=with_kv_groups(files.spec, config.max_model_len))
    return load_runtime(files, open_checkpoint(files), config)


def load_session(**options: Any) -> Session:
    """The same, to be stepped by hand."""
    return Session(load_core(**options))


def seconds_of(work: Callable[[], Any], repetitions: int = 3) -> float:
    """The least time of some runs: what else the machine does can only add to it."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def axes(width: float = 4.8, height: float = 3.3) -> Axes:
    """The axes of a new plot; sizes in inches. Colours are those of COLOURS."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({
        **{"svg.fonttype": "none", "svg.hashsalt": "octavo", "font.size": 10},
        **{"text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["ink"]},
        **{"axes.edgecolor": COLOURS["line"], "axes.facecolor": COLOURS["paper"]},
        **{"xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"]},
        **{"xtick.labelcolor": COLOURS["ink"], "ytick.labelcolor": COLOURS["ink"]},
        **{"grid.color": COLOURS["box"], "axes.grid": True, "axes.axisbelow": True},
        **{"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2},
        **{"legend.frameon": False},
    })  # fmt: skip
    return Figure(
        figsize=(width, height), layout="constrained", facecolor=COLOURS["paper"]
    ).subplots()


def save(plot: Axes, figures: dict[str, Any], table: list[list[str]]) -> None:
    """Write NAME.svg and NAME.json beside the script, and print the table.

    figures: everything that was measured. table: its head and its rows, as the chapter shows them.
    """
    script = Path(sys.argv[0]).resolve()
    text = io.StringIO()
    plot.figure.savefig(text, format="svg", metadata={"Date": None}, facecolor=COLOURS["paper"])
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    width, height = map(float, re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups())
    svg = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"',
        f'width="600" height="{600 * height / width:.0f}" role="img" font-family="system-ui"',
        svg,
        count=1,
    )
    svg = svg.replace(">", f">\n<style>{theme_css()}</style>", 1)
    svg = "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
    script.with_suffix(".svg").write_text(svg, encoding="utf-8")
    record = {"machine": machine(), "figures": figures, "table": table}
    script.with_suffix(".json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def machine() -> dict[str, Any]:
    """What belongs beside the figures."""
    info = _native.build_info()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": processor(),
        "cores": info["physical_cores"],
        "isa": info["isa"],
        "numpy": np.__version__,
    }
