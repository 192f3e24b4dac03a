"""How much the tests see: plants mistakes one at a time and counts those that a test catches.

    make mutants                                 100 mistakes, a third of them in the native core
    make mutants ARGS="--count 20 --seed 7 --only python"
    make mutants ARGS="--resume"                 go on after an interruption
    make mutants ARGS="--again"                  the same, and try the survivors with new tests

Works in copies of the tree under build/mutants; the tree itself is never touched. The first run
builds the copies and notes which functions each file of tests calls (some 15 minutes on two cores).
A mistake in Python is then tried on the files that call its function, the nearest first; one in C++
on the native tests and then on all files that load the native module. A test that hangs has caught
it. A mistake that does not compile is replaced by another. 100 mistakes take two hours or more.

build/mutants/report.json has every mistake with the test that caught it. Look at each survivor:
either nothing that a user could see is different, or a test is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mutant_trees import ROOT, WORK, TestFile, Tree, in_trees, map_tests, output_of, prepare
from mutations import Place, places, planted

PYTHON_ROOMS = ("python/octavo/", "reference/")
NATIVE_ROOMS = ("csrc/core/", "csrc/cpu/")
# The layout of pages and plots is looked at by eye; __main__ is two lines.
NO_RISK = re.compile(r"/(__main__|html|pages|serve_plot)\.py$")
FIRST_SECONDS = 10.0  # of the first group of tests; each further one may take four times as long
NO_SUCH_TEST = 4  # pytest's exit code, for tests whose names are not the same in every run
MEMORY = 8 << 30  # bytes a process may take: a mistake must not take those of the machine


class Outcome(NamedTuple):
    """What became of one mistake."""

    place: Place
    caught: bool
    by: str  # the test, or how it ended; for a survivor, how many files of tests were tried
    seconds: float
    change: tuple[str, ...]  # the line before and after


def sample(root: Path, sources: Iterable[str], seed: int) -> list[Place]:
    """All places in an order by chance in which every room and every kind comes early.

    A room (a folder) has its share of any first part of the list; within it the kinds take turns.
    """
    chance = random.Random(seed)
    rooms: dict[str, list[Place]] = defaultdict(list)
    for path in sorted(sources):
        rooms[os.path.dirname(path)] += places(path, (root / path).read_bytes())
    order: list[tuple[float, Place]] = []
    for inside in rooms.values():
        chance.shuffle(inside)
        seen: Counter[str] = Counter()
        turns: list[tuple[int, Place]] = []
        for place in inside:
            turns.append((seen[place.kind], place))
            seen[place.kind] += 1
        first = chance.random()
        turns.sort(key=lambda turn: turn[0])
        order += [((n + first) / len(inside), place) for n, (_, place) in enumerate(turns)]
    return [place for _, place in sorted(order, key=lambda each: each[0])]


def sources_of(tree: Tree) -> tuple[list[str], list[str]]:
    """The Python files and the C++ files (of those that this machine compiles) with places."""
    names = output_of(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).split("\n")
    python = [n for n in names if n.startswith(PYTHON_ROOMS) and n.endswith(".py")]
    python = [n for n in python if not NO_RISK.search(n) and (ROOT / n).exists()]
    read = tree.must_run(["ninja", "-C", "build", "-t", "deps"])
    compiled = set(re.findall(r"csrc/\S+", read))
    native = [n for n in names if n.startswith(NATIVE_ROOMS) and n in compiled]
    return python, native


def groups(place: Place, files: list[TestFile]) -> Iterator[tuple[list[str], float]]:
    """Tests that could see a mistake, to be run together, and the seconds they take without it.

    First the quickest that call the function themselves; then whole files, the nearest first, since
    what one test calls another may find in a cache or a fixture.
    """
    is_python = place.path.endswith(".py")
    key = f"{place.path}:{place.function}" if is_python else "native"
    module = place.path.removeprefix("python/").removesuffix(".py").replace("/", ".")
    if is_python and not place.function:  # at import
        seeing = [f for f in files if any(c.startswith(place.path + ":") for c in f.callers)]
    else:
        seeing = [f for f in files if key in f.callers]
    is_far = {f.path: (module if is_python else "_native") not in _text(f) for f in seeing}
    seeing.sort(key=lambda f: (is_far[f.path], f.seconds))
    if is_python and place.function and seeing:
        tests = [(is_far[f.path], f.tests[test], test) for f in seeing for test in f.callers[key]]
        yield _quickest(sorted(set(tests)))
    limit, group, seconds = 4 * FIRST_SECONDS, list[str](), 0.0
    for file in seeing:
        group.append(file.path)
        seconds += file.seconds
        if seconds > limit:
            yield group, seconds
            limit, group, seconds = 4 * limit, [], 0.0
    if group:
        yield group, seconds


def _quickest(tests: list[tuple[bool, float, str]]) -> tuple[list[str], float]:
    """From the start of the list, at most three parameters of each test, for FIRST_SECONDS."""
    chosen, total, times = list[str](), 0.0, Counter[str]()
    for _, seconds, test in tests:
        name = test.partition("[")[0]
        if times[name] < 3 and (not chosen or total + seconds < FIRST_SECONDS):
            chosen.append(test)
            total += seconds
            times[name] += 1
    return chosen, total


def _text(file: TestFile) -> str:
    return (ROOT / file.path).read_text()


def judge(tree: Tree, place: Place, files: list[TestFile]) -> Outcome | None:
    """Plant a mistake, run the tests that could see it, and take it out; None: does not compile."""
    source = (tree.root / place.path).read_bytes()
    mistaken = planted(source, place)
    texts = (text.splitlines()[place.line - 1].decode().strip() for text in (source, mistaken))
    change = tuple(texts)
    start = time.monotonic()
    tree.write(place.path, mistaken)
    try:
        caught, by = _try_tests(tree, place, files)
    except _DoesNotCompile:
        return None
    finally:
        tree.write(place.path, source)
    return Outcome(place, caught, by, round(time.monotonic() - start, 1), change)


class _DoesNotCompile(Exception):
    pass


def _try_tests(tree: Tree, place: Place, files: list[TestFile]) -> tuple[bool, str]:
    if not place.path.endswith(".py"):
        if not tree.build():
            raise _DoesNotCompile
        status, printed = tree.native_tests()
        if status:
            failed = re.search(r"FAILED +(.*)", printed)
            return True, f"native tests: {failed[1] if failed else f'exit code {status}'}"
    tried = 0
    for group, seconds in groups(place, files):
        status, printed = tree.pytest(group, 120.0 + 6 * seconds)
        if status not in (0, NO_SUCH_TEST):
            failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
            return True, failed[1] if failed else f"{group[0]} ...: exit code {status}"
        tried += sum("::" not in each for each in group)
    return False, f"{tried} files of tests passed"


def judge_many(
    trees: list[Tree], order: list[Place], count: int, files: list[TestFile], known: list[Outcome]
) -> Iterator[Outcome | None]:
    """The outcomes of the first `count` places that compile; None for each that does not."""
    known_before = {outcome.place: outcome for outcome in known}
    rest = iter(order)
    while count and (now := list(islice(rest, count))):
        judged = in_trees(
            trees, lambda tree, place: known_before.get(place) or judge(tree, place, files), now
        )
        for outcome in judged:
            count -= outcome is not None
            yield outcome


def show(outcome: Outcome) -> str:
    """A mistake in three lines: where, before, after."""
    word = "caught" if outcome.caught else "SURVIVED"
    where = f"{outcome.place.path}:{outcome.place.line}"
    before, after = outcome.change
    return f"{word} {where} {outcome.seconds} s: {outcome.by}\n  - {before}\n  + {after}"


def save(outcomes: list[Outcome]) -> None:
    kept = [{**outcome._asdict(), "place": outcome.place._asdict()} for outcome in outcomes]
    (WORK / "report.json").write_text(json.dumps(kept, indent=1))


def saved() -> list[Outcome]:
    """What an earlier run found."""
    kept = json.loads((WORK / "report.json").read_text())
    return [Outcome(**{**entry, "place": Place(**entry["place"])}) for entry in kept]


def sum_up(outcomes: list[Outcome], not_compiled: int, seed: int) -> str:
    """Survivors, rooms, and the share that was caught."""
    rooms: dict[str, Counter[bool]] = defaultdict(Counter)
    for outcome in outcomes:
        rooms[os.path.dirname(outcome.place.path)][outcome.caught] += 1
    lines = ["", *(show(outcome) for outcome in outcomes if not outcome.caught), ""]
    for room, counts in sorted(rooms.items()):
        lines.append(f"{room:30} {counts[True]:3} caught {counts[False]:3} survived")
    caught = sum(outcome.caught for outcome in outcomes)
    share = caught / max(1, len(outcomes))
    lines.append(
        f"{caught} of {len(outcomes)} mistakes caught ({share:.0%}), seed {seed}; "
        f"{not_compiled} others did not compile"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="mistakes to plant (100)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (1)")
    parser.add_argument("--only", choices=["python", "native"], help="only in this language")
    parser.add_argument("--jobs", type=int, default=2, help="copies at work at a time (2)")
    parser.add_argument("--resume", action="store_true", help="keep what report.json says already")
    parser.add_argument("--again", action="store_true", help="keep of it what was caught")
    options = parser.parse_args()
    # A shell's background has it ignored, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    known = saved() if options.resume or options.again else []
    known = [outcome for outcome in known if outcome.caught or not options.again]
    trees = prepare(options.jobs)
    files = map_tests(trees)
    python, native = sources_of(trees[0])
    native_count = {"python": 0, "native": options.count}.get(options.only, options.count // 3)
    outcomes, not_compiled = list[Outcome](), 0
    # Python first: its tests need a native module without a mistake.
    for sources, count in ((python, options.count - native_count), (native, native_count)):
        order = sample(trees[0].root, sources, options.seed)
        for outcome in judge_many(trees, order, count, files, known):
            if outcome is None:
                not_compiled += 1
            else:
                outcomes.append(outcome)
                save(outcomes)
                print(f"{len(outcomes)}/{options.count} {show(outcome)}", flush=True)
    print(sum_up(outcomes, not_compiled, options.seed))


if __name__ == "__main__":
    main()
