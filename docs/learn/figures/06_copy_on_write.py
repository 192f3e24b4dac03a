"""Copy on write: a fork shares all blocks, until one of the two writes."""

from picture import Picture

p = Picture(430, "A fork shares all blocks; the first to write gets a copy of the last one")


def table(x: float, y: float, name: str, blocks: list[str], colour: str) -> None:
    p.text(x - 14, y + 18, name, bold=True)
    p.row(x, y, blocks, colour, width=32, height=26)


def pool(y: float, blocks: list[tuple[str, str, str]]) -> None:
    for place, (number, text, colour) in enumerate(blocks):
        x = 16 + place * 114
        p.text(x + 53, y - 5, f"block {number}", size=12, colour="soft")
        p.box(x, y, 106, 28, text, colour, size=13)


p.label(16, 28, "1. A is forked: B is a second way to go on from here", colour="ink", size=15)
table(46, 42, "A", ["0", "1"], "blue")
table(196, 42, "B", ["0", "1"], "orange")
pool(
    98,
    [("0", "I like to eat", "purple"), ("1", "warm", "purple"), ("2", "", "box"), ("3", "", "box")],
)
p.label(16, 148, "Nothing was copied. Blocks 0 and 1 have two holders.")

p.label(16, 192, "2. A writes “bread”: block 1 has two holders, A copies it", colour="ink", size=15)
table(46, 206, "A", ["0", "2"], "blue")
table(196, 206, "B", ["0", "1"], "orange")
pool(
    262,
    [
        ("0", "I like to eat", "purple"),
        ("1", "warm", "orange"),
        ("2", "warm bread", "blue"),
        ("3", "", "box"),
    ],
)
p.arrow((193, 292), (193, 306), (294, 306), (294, 294), colour="blue")
p.text(243, 322, "copied", size=12, colour="blue")

p.label(16, 352, "3. B writes “soup”: block 1 is B's alone, no copy", colour="ink", size=15)
pool(
    380,
    [
        ("0", "I like to eat", "purple"),
        ("1", "warm soup", "orange"),
        ("2", "warm bread", "blue"),
        ("3", "", "box"),
    ],
)
p.save()
