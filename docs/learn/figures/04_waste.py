"""What reserving the longest possible length costs, beside blocks that are taken when needed."""

from picture import Picture

p = Picture(306, "Reserved rooms are mostly empty; blocks are taken when a token needs them")
ROOMS = [("A", "blue", 9), ("B", "orange", 6), ("C", "green", 14)]
p.label(16, 28, "One room a sequence, as long as an answer may get", colour="ink", size=15)
for number, (name, colour, used) in enumerate(ROOMS):
    y = 42 + number * 30
    p.text(24, y + 16, name, size=13)
    p.box(40, y, 424, 22, "", "paper", dashed=True, radius=0)
    p.box(40, y, used * 10.6, 22, "", colour, radius=0)
p.label(16, 152, "29 of 120 places hold a token: 24 %. A fourth sequence has to wait.")
p.label(16, 196, "The same three in blocks of 4", colour="ink", size=15)
place = 0
for _name, colour, used in ROOMS:
    for block in range(-(-used // 4)):
        held = min(4, used - block * 4)
        p.box(40 + place * 42.4, 210, 42.4, 22, "", "paper", dashed=True, radius=0)
        p.box(40 + place * 42.4, 210, held * 10.6, 22, "", colour, radius=0)
        place += 1
p.text(24, 226, "", size=13)
p.label(16, 262, "29 of 36 places hold a token: 81 %. The rest of the memory is free,")
p.label(16, 282, "and the empty places are at most three a sequence.")
p.save()
