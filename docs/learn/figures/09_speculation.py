"""Speculation: four guessed tokens, one pass of the model, and what is kept."""

from picture import Picture

p = Picture(420, "One pass checks four guesses; those up to the first wrong one are kept")
KNOWN, GUESSES = ["The", "cat", "sat"], ["on", "the", "sofa", "and"]
CHOICES = ["on", "the", "mat", "in"]
W = 62
p.label(16, 28, "1. Something cheap guesses four tokens", colour="ink", size=15)
for place, word in enumerate(KNOWN + GUESSES):
    p.box(16 + place * W, 42, W - 6, 28, word, "blue" if place < 3 else "purple", dashed=place > 2)
p.label(16, 114, "2. One pass of the model over “sat” and the guesses", colour="ink", size=15)
for place, word in enumerate([KNOWN[-1], *GUESSES]):
    p.box(
        140 + place * W, 128, W - 6, 28, word, "blue" if place == 0 else "purple", dashed=place > 0
    )
    p.arrow((168 + place * W, 158), (168 + place * W, 190))
p.label(16, 147, "in")
p.label(16, 211, "model's choice")
for place, word in enumerate([*CHOICES, "it"]):
    right = place < 2
    p.box(
        140 + place * W,
        192,
        W - 6,
        28,
        word,
        "green" if right else ("orange" if place == 2 else "box"),
    )
p.label(16, 246, "guessed")
for place, word in enumerate(GUESSES):
    p.text(168 + place * W, 246, word, colour="soft", size=13)
    mark, colour = (
        ("=", "green") if place < 2 else (("≠", "orange") if place == 2 else ("–", "soft"))
    )
    p.text(168 + place * W, 266, mark, colour=colour, size=16, bold=True)
p.label(
    16, 308, "3. Kept: the right guesses, and the model's own next token", colour="ink", size=15
)
for place, word in enumerate([*KNOWN, "on", "the", "mat"]):
    colour = "blue" if place < 3 else ("green" if place < 5 else "orange")
    p.box(16 + place * W, 322, W - 6, 28, word, colour)
p.label(16, 380, "Three tokens for one reading of the weights. What follows a wrong")
p.label(16, 400, "guess is thrown away: its row looked at a word that is not there.")
p.save()
