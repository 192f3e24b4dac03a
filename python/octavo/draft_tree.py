"""Trees of drafts by rank: which guesses of a place are checked, as vLLM's speculative_token_tree.

A node is named by the ranks on the way to it: (0,) is the best guess of the next token, (1,) the
second best one, (0, 1) the second best guess of the token after (0,). A tree is kept as its chains,
the ways to its leaves, in the order of a depth-first walk; the first chain has the best guesses.
"""

from __future__ import annotations

import ast
import heapq
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from octavo.errors import InvalidArgumentError

Ranks = tuple[int, ...]
MOST_RANKS = 8  # guesses of one place
MOST_NODES = 64
_EXAMPLE = "[(0,), (1,), (0, 0)]"


def read_tree(given: object, most_tokens: int) -> tuple[Ranks, ...]:
    """The chains of a tree that is given by all of its nodes, as lists or as a text of Python's.

    most_tokens: the most drafts of a chain. Raises InvalidArgumentError for what is no tree.
    """
    expected = f"the nodes of a tree, each as the ranks on the way to it, as in {_EXAMPLE}"
    nodes: object = given
    if isinstance(given, str):
        try:
            nodes = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            raise _error(given, expected) from None
    if not isinstance(nodes, list | tuple) or not nodes:
        raise _error(given, expected)
    found: set[Ranks] = set()
    for node in nodes:
        if not isinstance(node, list | tuple) or not 1 <= len(node) <= most_tokens:
            raise _error(given, f"{expected}, and at most {most_tokens} ranks long")
        for rank in node:
            if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < MOST_RANKS:
                raise _error(given, f"ranks from 0 to {MOST_RANKS - 1}, not {rank!r}")
        found.add(tuple(node))
    if len(found) > MOST_NODES:
        raise _error(given, f"at most {MOST_NODES} nodes, not {len(found)}")
    for node in sorted(found):
        parent, rank = node[:-1], node[-1]
        needed = [parent] if parent else []
        needed += [(*parent, rank - 1)] if rank else []
        for other in needed:
            if other not in found:
                raise _error(given, f"{other}, too, without which there is no {node}")
    return leaves(found)


def leaves(nodes: Iterable[Ranks]) -> tuple[Ranks, ...]:
    """The chains of a tree: those of its nodes that no other one begins with, in order."""
    ordered = sorted(nodes)
    behind = [*ordered[1:], ()]
    return tuple(
        one for one, other in zip(ordered, behind, strict=True) if other[: len(one)] != one
    )


def num_nodes(paths: SequenceOf[Ranks]) -> int:
    """How many nodes the tree of these chains has."""
    return len({path[:length] for path in paths for length in range(1, len(path) + 1)})


def most_probable(
    chances: SequenceOf[SequenceOf[float]], num_chains: int, most_nodes: int
) -> tuple[Ranks, ...]:
    """The chains of the most probable tree, where guesses of different places are independent.

    chances[i]: of the guesses of place i, best first. A node's probability is the product of those
    on the way to it. Nodes are taken from the most probable one down, up to most_nodes of them, as
    long as they make no more than num_chains chains.
    """
    heap: list[tuple[float, Ranks]] = [(-chances[0][0], (0,))]
    taken: set[Ranks] = set()
    has_child: set[Ranks] = set()
    num_chains_now = 0
    while heap and len(taken) < most_nodes:
        negative, node = heapq.heappop(heap)
        parent, rank, place = node[:-1], node[-1], len(node) - 1
        if rank + 1 < len(chances[place]) and chances[place][rank] > 0:
            sibling = negative * chances[place][rank + 1] / chances[place][rank]
            heapq.heappush(heap, (sibling, (*parent, rank + 1)))
        if (parent in has_child or not parent) and num_chains_now == num_chains:
            continue
        num_chains_now += parent in has_child or not parent
        has_child.add(parent)
        taken.add(node)
        if len(node) < len(chances):
            heapq.heappush(heap, (negative * chances[len(node)][0], (*node, 0)))
    return leaves(taken)


def second_guesses(depth: int, count: int, num_places: int) -> list[Ranks]:
    """So many chains of length `depth`, each with one guess that is not the best, in order.

    The guess is the second best one of the first place, of the second, and so on, for num_places
    places; then come the third best ones.
    """
    places = min(depth, num_places)
    chains = []
    for index in range(min(count, places * (MOST_RANKS - 1))):
        rank, place = divmod(index, places)
        chains.append((0,) * place + (rank + 1,) + (0,) * (depth - place - 1))
    return sorted(chains)


def _error(given: object, expected: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"speculative_config's speculative_token_tree is {given!r}; expected {expected}"
    )
