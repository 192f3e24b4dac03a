"""A tile of a matrix product: what is read once, and how often it is used."""

from picture import Picture

p = Picture(
    420, "A tile of results reads a strip of A and a strip of B, and uses each number 4 times"
)
SIDE, CELLS = 15, 8


def grid(x: float, y: float, name: str, marked: set[tuple[int, int]], colour: str) -> None:
    for row in range(CELLS):
        for column in range(CELLS):
            chosen = (row, column) in marked
            p.box(
                x + column * SIDE, y + row * SIDE, SIDE, SIDE, "", colour if chosen else "paper",
                radius=0,
            )  # fmt: skip
    p.text(x + 60, y + 140, name, size=14, bold=True)


def product(top: int, tile: int, title: str, note: str) -> None:
    p.label(16, top, title, colour="ink", size=15)
    rows, columns = range(2, 2 + tile), range(3, 3 + tile)
    grid(16, top + 14, "A", {(row, k) for row in rows for k in range(CELLS)}, "blue")
    p.text(153, top + 80, "×", size=22)
    grid(170, top + 14, "B", {(k, column) for column in columns for k in range(CELLS)}, "orange")
    p.text(309, top + 80, "=", size=22)
    grid(328, top + 14, "C", {(row, column) for row in rows for column in columns}, "green")
    p.label(16, top + 172, note)


product(28, 1, "One result at a time", "16 numbers read for 1 result: 16 a result")
product(232, 4, "A tile of 4 × 4 results", "64 numbers read for 16 results: 4 a result")
p.save()
