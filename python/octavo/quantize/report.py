"""The table of `octavo quantize --sensitivity`."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.table import Table

from octavo.quantize.sensitivity import Sensitivity


def print_sensitivity(sensitivity: Sensitivity, chosen: Collection[str] = ()) -> None:
    """Every part with what quantizing it alone costs, on standard output.

    chosen: matrices that take int8, marked.
    """
    title = (
        f"Each part alone in 4 bits, by what int8 would save: mean KL over "
        f"{sensitivity.num_scored:,} tokens"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for heading in ("weights", "bits", "KL", "KL saved a Mbit", "takes"):
        table.add_column(heading, justify="right")
    for part in sensitivity.parts:
        eight = part.bits >= 8 or set(part.matrices) <= set(chosen)
        table.add_row(
            part.name,
            f"{part.weights:,}",
            f"{part.bits:.2f}",
            f"{part.kl:.5f}",
            f"{part.kl_per_megabit:.5f}",
            "int8" if eight else "4 bits",
        )
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    console.print(f"{sensitivity.bits:.3f} bits a weight, without int8 for any of them")
