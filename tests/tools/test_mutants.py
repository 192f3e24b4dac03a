"""tests/mutants/mutations.py: mistakes are planted in what runs, and nowhere else."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "mutants"

PYTHON = '''"""Grüße: 1 < 2 and not 3."""

import os  # 1 + 1

@decorated(frozen=True, most=9)
def first(a: Literal[1], b: bool = False) -> Literal[2]:
    """Gives 1 - 1."""
    ä = "ä < 1" if a <b else f"{a + 1}"  # a == b
    if (a) == (b) and not os.x[-1]:
        a += 1
    return a * 0x10 if a is not b else "x" + a

class Second:
    field: Literal[3] = 4
'''
# line, before, after, first line of the function
PYTHON_PLACES = [
    (6, "False", "True", 5),
    (8, "<", "<=", 5),
    (9, "==", "!=", 5),
    (9, "and", "or", 5),
    (9, "not", "", 5),
    (9, "-", "", 5),
    (9, "1", "one off", 5),
    (10, "+=", "-=", 5),
    (10, "1", "one off", 5),
    (11, "*", "//", 5),
    (11, "0x10", "one off", 5),
    (14, "4", "one off", 0),
]

CPP = """// 1 + 1
#include <vector>
#define TWO \\
  (1 + 1)
template <int N = 4>
bool first(const float* x, std::vector<int>& y, Vector<8> z) {
  static_assert(N > 1, "1 + 1");
  /* a && b
     1 < 2 */
  for (long i = 0; i < 16; i += N) y[-1] = x[i] * 1.5f + 0x10 - 1'000;
  return !y.empty() && a->b != 'x' ||
         true;
}
"""
CPP_PLACES = [
    (10, "0", "one off"),
    (10, "<", "<="),
    (10, "16", "one off"),
    (10, "+=", "-="),
    (10, "1", "one off"),
    (10, "*", "/"),
    (10, "+", "-"),
    (10, "-", "+"),
    (11, "!", ""),
    (11, "&&", "||"),
    (11, "!=", "=="),
    (11, "||", "&&"),
    (12, "true", "false"),
]


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", SCRIPTS / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_direction(before: str, after: str) -> str:
    """An integer goes one up or one down, by its place: either is right."""
    is_one_off = before.isalnum() and before[0].isdigit() and abs(int(before, 0) - int(after)) == 1
    return "one off" if is_one_off else after


def test_places_of_python(mutations: ModuleType) -> None:
    found = mutations.places("a.py", PYTHON.encode())
    assert [
        (p.line, p.before, without_direction(p.before, p.after), p.function) for p in found
    ] == PYTHON_PLACES


def test_places_of_cpp(mutations: ModuleType) -> None:
    found = mutations.places("a.h", CPP.encode())
    assert [(p.line, p.before, without_direction(p.before, p.after)) for p in found] == CPP_PLACES


@pytest.mark.parametrize("name, text", [("a.py", PYTHON), ("a.h", CPP)])
def test_a_mistake_changes_its_place_alone(mutations: ModuleType, name: str, text: str) -> None:
    source = text.encode()
    for place in mutations.places(name, source):
        assert source[place.start : place.end].decode() == place.before
        changed = mutations.planted(source, place)
        assert changed[: place.start] == source[: place.start]
        assert changed[place.start :] == place.after.encode() + source[place.end :]
        if name.endswith(".py"):
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


def test_a_sample_visits_every_room_and_kind_early(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rooms have their share of the first mistakes, and the kinds of a room take turns."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    mutants = importlib.import_module("mutants")
    rooms = {"large": "x = [1, 2, 3, 4, 5, 6] + y < 7 and z\n" * 3, "small": "x = 1 < y + 2\n" * 3}
    for room, text in rooms.items():
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text(text)
    order = mutants.sample(tmp_path, [f"{room}/a.py" for room in rooms], seed=1)
    assert len(order) == len(set(order)) == 3 * 10 + 3 * 4
    assert order == mutants.sample(tmp_path, [f"{room}/a.py" for room in rooms], seed=1)
    assert order != mutants.sample(tmp_path, [f"{room}/a.py" for room in rooms], seed=2)
    first = [place.path for place in order[:14]]
    assert 3 <= first.count("small/a.py") <= 5
    large = [place.kind for place in order if place.path == "large/a.py"]
    assert len(set(large[:4])) == 4
