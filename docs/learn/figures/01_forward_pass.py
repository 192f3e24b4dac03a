"""The forward pass of SmolLM2-135M: a row of numbers a token, through 30 layers, to scores."""

from picture import Picture

p = Picture(480, "Five tokens become five rows of 576 numbers, pass 30 layers and become scores")
TOKENS = ["The", " capital", " of", " France", " is"]
IDS = ["504", "3575", "282", "4649", "314"]
for number, (token, id_) in enumerate(zip(TOKENS, IDS, strict=True)):
    x = 20 + number * 70
    p.box(x, 18, 62, 28, token, "blue")
    p.text(x + 31, 64, id_, size=13, colour="soft")
    p.arrow((x + 31, 70), (x + 31, 92))
    p.box(x, 94, 62, 24, "576", "box", size=13)
    p.line((x + 31, 118), (x + 31, 336), colour="line", width=4)
    p.box(x, 338, 62, 24, "576", "box", size=13)
p.label(376, 37, "tokens")
p.label(376, 64, "their numbers")
p.label(376, 104, "one row each,")
p.label(376, 120, "from a table")

p.box(10, 134, 364, 186, "", "paper", dashed=True)
p.box(22, 148, 316, 40, "norm, attention: rows look at earlier rows", "orange")
p.text(354, 175, "+", size=20, colour="orange", bold=True)
p.box(22, 214, 316, 40, "norm, MLP: each row by itself", "green")
p.text(354, 241, "+", size=20, colour="green", bold=True)
p.text(185, 288, "What comes out is added to the rows.", size=13, colour="soft")
p.text(185, 306, "30 layers like this one, one after the other", size=13, bold=True)
p.label(384, 172, "a layer", size=15)

p.label(376, 354, "norm, then")
p.label(376, 372, "the head")
p.arrow((331, 364), (331, 386))
for number, (word, share) in enumerate([("Paris", 77), ("the", 6), ("London", 1)]):
    y = 398 + number * 26
    p.text(250, y + 15, word, anchor="end")
    p.box(258, y, max(share * 1.8, 3), 20, "", "blue", radius=2)
    p.label(266 + max(share * 1.8, 3), y + 15, f"{share} %")
p.text(120, 410, "the last row becomes", size=13, colour="soft")
p.text(120, 428, "49,152 scores: one for", size=13, colour="soft")
p.text(120, 446, "every token there is", size=13, colour="soft")
p.save()
