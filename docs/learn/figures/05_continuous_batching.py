"""Static and continuous batching: the same six requests of the chapter's toy, three places."""

from picture import Picture

p = Picture(404, "Static batching leaves places empty until the longest answer ends")
COLOURS = ["blue", "orange", "green", "purple", "blue", "orange"]
STATIC_RUNS = [[(0, 0, 9), (3, 9, 4)], [(1, 0, 2), (4, 9, 7)], [(2, 0, 3), (5, 9, 2)]]
CONTINUOUS_RUNS = [[(0, 0, 9)], [(1, 0, 2), (3, 2, 4), (5, 6, 2)], [(2, 0, 3), (4, 3, 7)]]
STEP = 26


def chart(top: int, title: str, runs: list[list[tuple[int, int, int]]], steps: int) -> None:
    p.label(16, top, title, colour="ink", size=15)
    for place, of_place in enumerate(runs):
        y = top + 14 + place * 36
        p.label(16, y + 20, f"{place + 1}", size=13)
        p.box(34, y, steps * STEP, 30, "", "paper", dashed=True, radius=2)
        for request, begin, length in of_place:
            p.box(
                34 + begin * STEP,
                y,
                length * STEP,
                30,
                "ABCDEF"[request],
                COLOURS[request],
                bold=True,
            )
    p.line((34, top + 128), (34 + steps * STEP, top + 128), arrow=True)
    p.label(40 + steps * STEP - 118, top + 145, f"{steps} steps", colour="ink", size=13)


chart(30, "Static: the batch ends with its longest answer", STATIC_RUNS, 16)
chart(216, "Continuous: whoever waits takes the free place", CONTINUOUS_RUNS, 10)
p.label(16, 382, "A to F are requests; a row is a place in the batch, a column a step.")
p.save()
