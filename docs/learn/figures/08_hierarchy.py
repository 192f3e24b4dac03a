"""Where numbers lie: the nearer to the arithmetic, the faster and the smaller."""

from picture import Picture

p = Picture(268, "Registers, caches and memory: the nearer, the faster and the smaller")
p.label(16, 28, "Where a core finds its numbers (rough figures)", colour="ink", size=15)
LEVELS = [
    ("registers", "2 KB", "at once", "green", 90),
    ("L1 cache", "32 to 48 KB", "4 cycles away", "blue", 190),
    ("L2 cache", "1 to 2 MB", "14 cycles", "purple", 300),
    ("memory", "gigabytes", "about 300 cycles", "orange", 448),
]
for number, (name, size, speed, colour, width) in enumerate(LEVELS):
    y = 44 + number * 50
    p.box(16, y, width, 38, "", colour)
    p.label(26, y + 24, name, colour="ink", size=14)
    x = 16 + width + 12 if width < 300 else 128
    p.label(x, y + 24, f"{size}, {speed}", colour="ink" if width >= 300 else "soft", size=13)
p.label(16, 256, "A tile is what such a level holds, used there as often as possible.")
p.save()
