"""The KV cache: what each step computes without and with it."""

from picture import Picture

p = Picture(430, "Without a cache each step computes all rows; with one, only the new row")
WORDS = ["The", "cat", "sat", "on", "the"]


def steps(top: int, title: str, computes_all: bool) -> None:
    p.label(16, top, title, colour="ink", size=15)
    for step in range(3):
        y = top + 16 + step * 40
        known = 3 + step
        p.label(16, y + 19, f"step {step + 1}")
        for place in range(known):
            new = computes_all or step == 0 or place == known - 1
            p.box(
                74 + place * 58, y, 54, 28, WORDS[place], "orange" if new else "blue",
                dashed=not new,
            )  # fmt: skip
        p.arrow((76 + known * 58, y + 14), (98 + known * 58, y + 14))
        p.label(104 + known * 58, y + 19, ["on", "the", "mat"][step], colour="ink", size=14)


steps(30, "Without: 3 + 4 + 5 rows", True)
steps(186, "With a cache: 3 + 1 + 1 rows", False)
p.box(74, 334, 20, 20, "", "orange")
p.label(102, 349, "computed in this step")
p.box(264, 334, 20, 20, "", "blue", dashed=True)
p.label(292, 349, "keys and values read")
p.label(16, 384, "Keys and values of a token never change: it sees only earlier tokens.")
p.label(16, 404, "So they are computed once, kept, and read again in every later step.")
p.save()
