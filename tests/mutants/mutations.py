"""Where a mistake can be planted in Python or C++: the places of one file and what each becomes.

Kinds: comparisons (`<` and `<=`, `>` and `>=`, `==` and `!=`), signs (`+` and `-`, `*` and `/`),
and (`and` and `or`), not (dropped), numbers (an integer by one) and booleans. What does not run is
left alone: comments, strings, annotations, decorators, C++ preprocessor lines and templates.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """One mistake that can be planted."""

    path: str  # of the file, from the root of the tree
    line: int
    start: int  # bytes [start, end) of the file give way to `after`
    end: int
    before: str
    after: str
    kind: str
    function: int  # Python: first line of the innermost function around it; 0 outside of all


_SWAPS = {
    "comparison": [("<", "<="), (">", ">="), ("==", "!=")],
    "sign": [("+", "-"), ("+=", "-="), ("*", "//"), ("*=", "//=")],
    "and": [("and", "or"), ("&&", "||")],
    "boolean": [("True", "False"), ("true", "false")],
}
_KINDS = {word: kind for kind, pairs in _SWAPS.items() for pair in pairs for word in pair}
_SWAPPED = {a: b for pairs in _SWAPS.values() for pair in pairs for a, b in (pair, pair[::-1])}
_SWAPPED |= {"/": "*", "/=": "*="}
_KINDS |= {"/": "sign", "/=": "sign"}


def places(path: str, source: bytes) -> list[Place]:
    """All places of a file, by its name's ending: .py, or C++."""
    found = _PythonPlaces(path, source).found if path.endswith(".py") else _cpp(path, source)
    return sorted(found, key=lambda place: place.start)


def planted(source: bytes, place: Place) -> bytes:
    """The file with that mistake in it."""
    return source[: place.start] + place.after.encode() + source[place.end :]


def _by_one(number: int, start: int) -> str:
    """The integer one up, or one down at every second place."""
    return str(number - 1 if number > 0 and start % 2 else number + 1)


class _PythonPlaces(ast.NodeVisitor):
    """Collects places from the syntax tree. Positions are in bytes, as `ast` gives columns."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.line_starts = [0]
        for line in source.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.function = 0
        self.found: list[Place] = []
        self.visit(ast.parse(source))

    def start_of(self, node: ast.expr) -> int:
        return self.line_starts[node.lineno - 1] + node.col_offset

    def end_of(self, node: ast.expr) -> int:
        return self.line_starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)

    def add(self, start: int, end: int, after: str, kind: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        before = self.source[start:end].decode()
        self.found.append(Place(self.path, line, start, end, before, after, kind, self.function))

    def swap_between(self, left: ast.expr, right: ast.expr) -> None:
        """The operator between two operands, which `ast` gives no position of."""
        start, end = self.end_of(left), self.start_of(right)
        found = re.search(rb"and|or|//=?|[<>=!]=|[-+*/]=?|[<>]", self.source[start:end])
        if found and b"#" not in self.source[start:end] and (word := found[0].decode()) in _SWAPPED:
            at = start + found.start()
            self.add(at, at + len(word), _SWAPPED[word], _KINDS[word])

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            if not isinstance(operator, (ast.Is, ast.IsNot, ast.In, ast.NotIn)):
                self.swap_between(left, right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.swap_between(left, right)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)) and not (
            _is_text(node.left) or _is_text(node.right)
        ):
            self.swap_between(node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not _is_text(node.value):
            self.swap_between(node.target, node.value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start = self.start_of(node)
        if isinstance(node.op, ast.Not):
            self.add(start, start + len("not"), "", "not")
        elif isinstance(node.op, ast.USub):
            self.add(start, start + len("-"), "", "sign")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.start_of(node), self.end_of(node)
        if isinstance(node.value, bool):
            self.add(start, end, str(not node.value), "boolean")
        elif isinstance(node.value, int):
            self.add(start, end, _by_one(node.value, start), "number")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Not into f-strings: they are texts, and before Python 3.12 their parts have no place."""

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer = self.function
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        self.function = first
        defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        for each in [*defaults, *node.body]:
            self.visit(each)
        self.function = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


# What is no code, or none that runs: comments, strings, characters (but not the separators of
# digits), preprocessor lines, and declarations that only the compiler reads.
_CPP_BLANK = re.compile(
    rb"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<!\w)'(?:\\.|[^'\\\n])*'"""
    rb"""|^[ \t]*\#(?:\\.|[^\\\n])*|\bstatic_assert\s*\(.*?;|^[ \t]*(?:template|using)\b[^\n]*""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
# Operators have blanks on both sides, as clang-format leaves them; a number beside an angle bracket
# is an argument of a template.
_CPP_PLACE = re.compile(
    rb"""(?<=[ ])(?P<operator>[<>=!]=|[-+*/]=?|[<>]|&&|\|\|)(?=\s)"""
    rb"""|(?<![\w.<'])(?P<number>\d+)(?![\w.>'])"""
    rb"""|\b(?P<boolean>true|false)\b|(?P<not>!)(?=[\w(])""",
    re.VERBOSE,
)


def _cpp(path: str, source: bytes) -> Iterator[Place]:
    def blanks(found: re.Match[bytes]) -> bytes:
        return re.sub(rb"[^\n]", b" ", found[0])

    for found in _CPP_PLACE.finditer(_CPP_BLANK.sub(blanks, source)):
        word, kind = found[0].decode(), found.lastgroup or ""
        if kind == "operator":
            # Division of integers and of floats is the same word.
            after, kind = {"*": "/", "*=": "/="}.get(word, _SWAPPED[word]), _KINDS[word]
        else:
            after = "" if kind == "not" else _SWAPPED.get(word) or _by_one(int(word), found.start())
        line = source.count(b"\n", 0, found.start()) + 1
        yield Place(path, line, found.start(), found.end(), word, after, kind, 0)
