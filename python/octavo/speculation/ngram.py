"""Drafts from the sequence itself: what followed when its last tokens were there before.

Prompt lookup (Saxena 2023; Yang et al. 2023, "Inference with Reference"). The search for an earlier
occurrence is that of deflate (RFC 1951, section 4): a table from a hash of the last tokens to their
latest position, and for every position the one before it with the same hash. Adding a token takes
constant time; a search follows a chain of bounded length.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

from octavo.draft_tree import Ranks
from octavo.engine.request import Sequence
from octavo.speculation.source import DraftSource

LONGEST_MATCH = 16  # longer matches are told apart no further
_CHAIN = 16  # earlier positions tried in one search
_MOST_TOKENS = 1 << 17  # later ones are not indexed: memory stays below 1 MiB a sequence


class NgramIndex:
    """Finds where the last tokens of a sequence occurred before.

    It refers to the sequence's own list of tokens and keeps no copy.

    shortest: how many tokens must agree, 1 or more. sought: from so many on a later occurrence is
    preferred to a longer one. The index takes 4 bytes a token, and 8 to 16 for the table.

    After `extend`, `source` is the position whose token is the draft that comes next, and `length`
    says how many tokens before it agree with the sequence's last ones, at most LONGEST_MATCH;
    without a match they are -1 and 0. As long as the tokens of an occurrence come true, it is kept.
    """

    def __init__(self, shortest: int, sought: int) -> None:
        self.source = -1
        self.length = 0
        self._shortest = shortest
        self._sought = sought
        self._tokens: SequenceOf[int] = ()
        self._count = 0  # tokens taken in
        self._previous = array("i")  # of each position, the one before it with the same hash
        self._table = array("i", [-1]) * 256

    def extend(self, token_ids: SequenceOf[int]) -> None:
        """Take in the sequence's new tokens; token_ids: all of them, which only ever grow."""
        first, self._count = self._count, len(token_ids)
        if first == self._count:
            return
        self._tokens = tokens = token_ids
        if self._count > len(self._table):
            self._grow()
        for position in range(first, self._count):
            self._add(position)
        for position in range(first, self._count):  # does what was drafted last come true?
            if self.source < 0 or tokens[self.source] != tokens[position]:
                self.source, self.length = -1, 0
                break
            self.source += 1
            self.length = min(self.length + 1, LONGEST_MATCH)
        if self.length < self._sought:
            self._search()

    def draft(self, count: int) -> list[int]:
        """The next `count` tokens after the occurrence; one that ends here repeats itself."""
        if self.source < 0:
            return []
        drafts = list(self._tokens[self.source : min(self.source + count, self._count)])
        period = len(drafts)
        while len(drafts) < count:
            drafts.append(drafts[-period])
        return drafts

    def others(self, count: int, most: int) -> list[list[int]]:
        """At most `most` other continuations, of up to `count` tokens, the best first.

        They follow other occurrences, begin with different tokens, and none as `draft` does.
        """
        if self.source < 0:
            return []
        tokens, last = self._tokens, self._count - 1
        found: list[tuple[int, int]] = []
        candidate = self._previous[last] if last < len(self._previous) else -1
        for _ in range(_CHAIN):
            if candidate < 0:
                break
            length = self._match(candidate, last)
            if length >= self._shortest:
                found.append((-length, candidate + 1))
            candidate = self._previous[candidate]
        chains: list[list[int]] = []
        begun = {tokens[self.source]}
        for _, source in sorted(found, key=lambda each: each[0]):  # of equal ones the latest
            if len(chains) < most and tokens[source] not in begun:
                begun.add(tokens[source])
                chains.append(list(tokens[source : min(source + count, self._count)]))
        return chains

    def _match(self, candidate: int, last: int) -> int:
        """How many tokens up to one position agree with those up to another."""
        tokens, length = self._tokens, 0
        most = min(LONGEST_MATCH, candidate + 1)
        while length < most and tokens[candidate - length] == tokens[last - length]:
            length += 1
        return length

    def _search(self) -> None:
        """Take the longest match, of equally long ones the latest."""
        last = self._count - 1
        candidate = self._previous[last] if last < len(self._previous) else -1
        longest, found = self.length, self.source
        for _ in range(_CHAIN):
            if candidate < 0 or longest >= self._sought:
                break
            length = self._match(candidate, last)
            if length > longest and length >= self._shortest:
                longest, found = length, candidate + 1
            candidate = self._previous[candidate]
        self.length, self.source = longest, found

    def _add(self, position: int) -> None:
        if position >= _MOST_TOKENS:
            return
        place = self._place(position)
        self._previous.append(self._table[place])
        self._table[place] = position

    def _place(self, position: int) -> int:
        """Where the table keeps the tokens that end at a position; others may share the place."""
        tokens = self._tokens
        hashed = tokens[position] * 0x9E3779B1
        if self._shortest > 1 and position:
            hashed += tokens[position - 1] * 0x85EBCA6B
        return (hashed ^ hashed >> 15) & (len(self._table) - 1)

    def _grow(self) -> None:
        """A table of at least twice as many places as there are tokens, made anew."""
        size = len(self._table)
        while size < min(2 * self._count, _MOST_TOKENS):
            size *= 2
        if size == len(self._table):
            return
        count = len(self._previous)
        self._table = array("i", [-1]) * size
        self._previous = array("i")
        for position in range(count):
            self._add(position)


class NgramSource(DraftSource):
    """Drafts for any number of sequences; each keeps its index. Drafts cost next to nothing."""

    is_free = True
    num_classes = LONGEST_MATCH + 1
    num_places = 1  # other occurrences go on in other ways from the first draft on

    def __init__(self, shortest: int, sought: int) -> None:
        self._shortest = shortest
        self._sought = sought

    def create(self, sequence: Sequence) -> NgramIndex:
        """A sequence's index."""
        return NgramIndex(self._shortest, self._sought)

    def look(self, sequence: Sequence, own: NgramIndex) -> int:
        """The length of the match; the next draft, if it comes true, makes it longer by one."""
        own.extend(sequence.token_ids)
        return own.length if own.source >= 0 else -1

    def draft(
        self, wanted: SequenceOf[tuple[Sequence, NgramIndex, int]]
    ) -> SequenceOf[SequenceOf[int]]:
        """What followed before."""
        return [own.draft(count) for _, own, count in wanted]

    def draft_trees(
        self, wanted: SequenceOf[tuple[Sequence, NgramIndex, SequenceOf[Ranks]]]
    ) -> SequenceOf[SequenceOf[SequenceOf[int]]]:
        """What followed other occurrences, too."""
        trees: list[list[SequenceOf[int]]] = []
        for _, own, paths in wanted:
            others = own.others(len(paths[0]), max(path[0] for path in paths))
            # A chain's rank stands first; rank 1 is the first of the others.
            rest = [others[p[0] - 1] if p[0] <= len(others) else [] for p in paths[1:]]
            trees.append([own.draft(len(paths[0])), *rest])
        return trees
