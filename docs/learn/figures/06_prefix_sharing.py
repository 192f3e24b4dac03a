"""A shared prefix: three sequences whose tables name the same first two blocks."""

from picture import Picture

p = Picture(372, "Three block tables name the same two blocks of the common prefix")
NAMES = [
    ("A", "blue", "Is it raining?"),
    ("B", "orange", "Name a river."),
    ("C", "green", "2 + 2 ?"),
]
p.label(16, 28, "Three questions behind one system prompt", colour="ink", size=15)
for number, (name, colour, question) in enumerate(NAMES):
    y = 44 + number * 42
    p.text(28, y + 20, name, bold=True)
    p.box(46, y, 128, 30, "You are a helpful", "purple", size=13)
    p.box(174, y, 128, 30, "and brief assistant.", "purple", size=13)
    p.box(302, y, 128, 30, question, colour, size=13)
p.label(16, 200, "The pool", colour="ink", size=15)
POOL = [
    ("0", "purple", "You are a\nhelpful"),
    ("1", "purple", "and brief\nassistant."),
    ("2", "blue", "Is it\nraining?"),
    ("3", "orange", "Name a\nriver."),
    ("4", "green", "2 + 2 ?"),
    ("5", "box", "free"),
]
HOLDERS = ["A B C", "A B C", "A", "B", "C", ""]
for block, (number, colour, text) in enumerate(POOL):
    x = 16 + block * 75
    p.text(x + 36, 226, number, size=13, bold=True)
    p.box(x, 234, 72, 50, text, colour, size=13)
    p.text(x + 36, 304, HOLDERS[block], size=13, colour="soft")
p.label(16, 326, "below each block: who holds it", size=12)
p.label(
    16,
    354,
    "5 blocks instead of 9. B and C compute 1 block each instead of 3.",
    colour="ink",
    size=13,
)
p.save()
