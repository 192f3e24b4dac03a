"""A small SVG writer for the pictures of these chapters: boxes, arrows and text in two themes.

A picture is 480 units wide, so that its text can be read on a telephone. It has its own background
and follows the reader's light or dark setting, whatever page it stands on. The colours are near
those of Okabe and Ito (2008), which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

WIDTH = 480
THEMES = {
    # colour: (in light, in dark); "x-fill" is the pale form of "x", for boxes with text in them
    "paper": ("#fbfaf7", "#1c1f26"),
    "ink": ("#23262d", "#e8e6e1"),
    "soft": ("#6a707b", "#a2a8b4"),
    "line": ("#b9bdc6", "#555c69"),
    "box": ("#eeeeeb", "#2a2e37"),
    "blue": ("#0072b2", "#56b4e9"),
    "blue-fill": ("#d3e7f4", "#17405a"),
    "orange": ("#c25400", "#f0a35c"),
    "orange-fill": ("#fbe0c8", "#5c3413"),
    "green": ("#007a5a", "#3ccba0"),
    "green-fill": ("#cfeee3", "#0f4b3a"),
    "purple": ("#a5437d", "#e5a3c9"),
    "purple-fill": ("#f5dcea", "#552843"),
}


def theme_css() -> str:
    """The colours as CSS variables, for light and for dark."""
    light, dark = (
        "".join(f"--{name}:{both[place]};" for name, both in THEMES.items()) for place in (0, 1)
    )
    return f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"


class Picture:
    """A picture that is being drawn. x and y count from the upper left; y grows downwards.

    title: what it shows, for those who do not see it. Colours are names of THEMES.
    """

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", colour: str = "box",
        *, size: float = 14, bold: bool = False, dashed: bool = False, radius: float = 4,
    ) -> None:  # fmt: skip
        """A rectangle with text in its middle, one line for each of the text's lines."""
        edge = "line" if colour in ("box", "paper") else colour
        fill = colour if colour in ("box", "paper") else f"{colour}-fill"
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
            f' style="fill:var(--{fill});stroke:var(--{edge})"{dashes}/>'
        )
        lines = text.split("\n") if text else []
        top = y + height / 2 - (len(lines) - 1) * size * 0.6
        for number, line in enumerate(lines):
            middle = top + number * size * 1.2
            self.text(x + width / 2, middle + size * 0.35, line, size=size, bold=bold)

    def text(
        self, x: float, y: float, text: str, *, size: float = 14, colour: str = "ink",
        anchor: str = "middle", bold: bool = False,
    ) -> None:  # fmt: skip
        """Text whose base line is at y; anchor: what of it is at x: start, middle or end."""
        across = len(text) * size * 0.505
        left = x - across * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        if left < 0 or left + across > WIDTH:
            raise ValueError(
                f"{text!r} at {x:g} runs over the edge; expected at most {WIDTH} units"
            )
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{weight}'
            f' style="fill:var(--{colour})">{escape(text)}</text>'
        )

    def label(
        self, x: float, y: float, text: str, *, colour: str = "soft", size: float = 13
    ) -> None:
        """Text that begins at x."""
        self.text(x, y, text, anchor="start", colour=colour, size=size)

    def line(
        self, *points: tuple[float, float], colour: str = "soft", width: float = 1.5,
        arrow: bool = False, dashed: bool = False,
    ) -> None:  # fmt: skip
        """A line through points, with an arrow's head at its end if asked for."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke-width="{width:g}"'
            f' style="stroke:var(--{colour})"{dashes}/>'
        )
        if arrow:
            self._head(points[-2], points[-1], colour)

    def _head(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        across, down = end[0] - start[0], end[1] - start[1]
        length = (across**2 + down**2) ** 0.5
        a, b = across / length, down / length
        corners = [end, (end[0] - 8 * a - 4 * b, end[1] - 8 * b + 4 * a)]
        corners.append((end[0] - 8 * a + 4 * b, end[1] - 8 * b - 4 * a))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self.parts.append(f'<polygon points="{path}" style="fill:var(--{colour})"/>')

    def arrow(
        self, *points: tuple[float, float], colour: str = "soft", dashed: bool = False
    ) -> None:
        """A line with an arrow's head at its end."""
        self.line(*points, colour=colour, arrow=True, dashed=dashed)

    def row(
        self, x: float, y: float, texts: list[str], colour: str = "box", *, width: float = 40,
        height: float = 28, size: float = 14, dashed: bool = False,
    ) -> None:  # fmt: skip
        """Boxes side by side, without a gap."""
        for number, text in enumerate(texts):
            self.box(
                x + number * width, y, width, height, text, colour,
                size=size, dashed=dashed, radius=0,
            )  # fmt: skip

    def svg(self) -> str:
        """The picture as the text of an SVG file."""
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}"'
            f' width="600" height="{self.height * 600 // WIDTH}" role="img"'
            ' font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, sans-serif">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{theme_css()}</style>",
            f'<rect width="{WIDTH}" height="{self.height}" rx="8" style="fill:var(--paper)"/>',
            *self.parts,
            "</svg>\n",
        ])  # fmt: skip

    def save(self) -> None:
        """Write the SVG beside the script that runs, under the script's name."""
        Path(sys.argv[0]).resolve().with_suffix(".svg").write_text(self.svg(), encoding="utf-8")
