"""Quantization to 4 bits: eight weights, the scale of their group, and the codes."""

from picture import Picture

p = Picture(424, "Eight weights become whole numbers from -7 to 7 and one scale")
WEIGHTS = [0.31, -0.52, 0.08, 0.70, -0.11, 0.24, -0.66, 0.02]
SCALE = max(map(abs, WEIGHTS)) / 7
CODES = [round(weight / SCALE) for weight in WEIGHTS]
WIDTH = 56
p.label(16, 28, "A group of weights, 16 bits each", colour="ink", size=15)
p.row(16, 40, [f"{weight:.2f}" for weight in WEIGHTS], "blue", width=WIDTH)
p.label(16, 96, "The largest, 0.70, becomes 7. So a step is 0.70 / 7 = 0.10: the scale.")


def across(value: float) -> float:
    return 240 + value * 290


p.line((across(-0.76), 154), (across(0.76), 154), colour="line")
for code in range(-7, 8):
    x = across(code * SCALE)
    p.line((x, 149), (x, 159), colour="soft")
    p.text(x, 176, str(code), size=12, colour="soft")
for weight, code in zip(WEIGHTS, CODES, strict=True):
    p.line((across(weight), 122), (across(weight), 134), colour="blue", width=3)
    p.arrow((across(weight), 134), (across(code * SCALE), 148), colour="orange")
p.label(16, 212, "Codes, 4 bits each, and one scale, 16 bits", colour="ink", size=15)
p.row(16, 224, [str(code) for code in CODES], "orange", width=46)
p.box(396, 224, 68, 28, "× 0.10", "purple", radius=0)
p.label(16, 276, "Kept: 8 × 4 + 16 = 48 bits instead of 128.")
p.label(16, 316, "What the model computes with, and the error", colour="ink", size=15)
p.row(16, 328, [f"{code * SCALE:.2f}" for code in CODES], "green", width=WIDTH)
errors = [code * SCALE - weight for code, weight in zip(CODES, WEIGHTS, strict=True)]
p.row(16, 360, [f"{error:+.2f}" for error in errors], "box", width=WIDTH)
p.label(16, 410, "No error is larger than half a step.")
p.save()
