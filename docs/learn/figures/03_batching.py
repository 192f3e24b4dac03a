"""Batching: the weights are read once, for one row or for eight."""

from picture import Picture

p = Picture(400, "One row and eight rows need the same reading of the weights")


def product(top: int, rows: int, title: str, result: str) -> None:
    p.label(16, top, title, colour="ink", size=15)
    first = top + 62 - rows * 6
    for row in range(rows):
        p.box(16, first + row * 12, 96, 10, "", "blue", radius=2)
        p.box(352, first + row * 12, 110, 10, "", "green", radius=2)
    p.text(132, top + 66, "×", size=22)
    p.box(152, top + 14, 170, 96, "weights\nread from memory\nonce", "orange")
    p.text(337, top + 66, "=", size=22)
    p.label(16, top + 136, result)


product(32, 1, "One sequence: 1 row", "269 MB read for 1 token")
product(214, 8, "Eight sequences: 8 rows", "269 MB read for 8 tokens")
p.text(240, 384, "The reading takes most of the time, so the eight are almost free.", size=13)
p.save()
