"""Paging: two sequences, their block tables, and the blocks of the pool that they name."""

from picture import Picture

p = Picture(540, "Block tables name the blocks of a common pool in which keys and values lie")
SEQUENCES = [
    (
        "A",
        "blue",
        [["The", "cat", "sat", "on"], ["the", "mat", "and", "it"], ["slept"]],
        [4, 6, 1],
        40,
    ),
    ("B", "orange", [["Once", "upon", "a", "time"], ["a", "king"]], [2, 5], 280),
]
TABLE, POOL = 150, 226
in_pool: dict[int, tuple[str, list[str]]] = {}
for name, colour, blocks, table, x in SEQUENCES:
    p.label(x - 20, 26, f"Sequence {name}", colour="ink", size=15)
    for number, words in enumerate(blocks):
        p.label(x - 20, 53 + number * 26, f"{number}", size=12)
        for place, word in enumerate(words):
            p.box(x + place * 40, 38 + number * 26, 39, 22, word, colour, size=12, radius=2)
        in_pool[table[number]] = (colour, words)
    p.text(x - 20, TABLE - 8, f"block table of {name}", anchor="start", size=13, colour="soft")
    p.row(x - 2, TABLE, [str(block) for block in table], colour, width=36)

p.label(
    20, POOL + 4, "The pool: 8 blocks of 4 tokens, taken from memory once", colour="ink", size=15
)
for block in range(8):
    y = POOL + 18 + block * 31
    p.text(34, y + 18, str(block), size=14, bold=True)
    colour, words = in_pool.get(block, ("box", []))
    for place in range(4):
        word = words[place] if place < len(words) else ""
        p.box(52 + place * 54, y, 54, 26, word, colour if word else "box", size=13, radius=0)
    owner = next(
        (f"{n}, block {t.index(block)}" for n, _, _, t, _ in SEQUENCES if block in t), "free"
    )
    p.label(282, y + 18, owner, colour="ink" if block in in_pool else "soft")
p.label(372, POOL + 18 + 1 * 31 + 10, "three places", size=12)
p.label(372, POOL + 18 + 1 * 31 + 24, "wait for A's", size=12)
p.label(372, POOL + 18 + 1 * 31 + 38, "next tokens", size=12)
p.text(240, 512, "Where is A's token 5, “mat”? 5 = 1 × 4 + 1: in A's block 1, at place 1.", size=13)
p.text(240, 530, "The table's entry 1 is 6. So it is in block 6 of the pool, place 1.", size=13)
p.save()
