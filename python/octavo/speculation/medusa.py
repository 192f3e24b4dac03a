"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): each guesses one of the next tokens.

Of the target's last hidden state h, which gave the token just sampled, head i makes a guess of the
token i + 1 places behind that one: h = h + silu(h W^T + b) for each of its residual blocks, then
its own output matrix. The best guesses form a chain. The heads do not know of each other's, so any
guess of one may follow any of another: a tree of them has the most probable products. Everything
is computed in NumPy, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.draft_tree import MOST_RANKS, Ranks, most_probable
from octavo.engine.batch import pack_sampling
from octavo.engine.branches import Judged
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule
from octavo.errors import WeightsError
from octavo.reference import ops
from octavo.reference.sampling import sample_row
from octavo.speculation.source import DraftSource
from octavo.weights.safetensors import SafetensorsFile

Float32 = NDArray[np.float32]
_PREFIX = "medusa_head."


class MedusaHeads:
    """The heads in memory.

    blocks[i]: of head i the weight (hidden, hidden) and bias (hidden,) of each residual block.
    heads[i]: its output matrix, (vocab_size, hidden).
    """

    def __init__(
        self, blocks: SequenceOf[SequenceOf[tuple[Float32, Float32]]], heads: SequenceOf[Float32]
    ) -> None:
        self.blocks, self.heads = blocks, heads

    @classmethod
    def read(cls, folder: Path, hidden_size: int, vocab_size: int) -> MedusaHeads:
        """Heads as published: "0.0.linear.weight", "0.0.linear.bias", "0.1.weight", "1.0. …".

        folder: with one safetensors file. Raises WeightsError for what is missing, or of another
        shape than the target needs.
        """
        source = open_heads(folder)
        names = {name.removeprefix(_PREFIX): name for name in source.infos}

        def read(name: str, shape: tuple[int, ...]) -> Float32:
            return read_tensor(source, names.get(name, name), shape)

        blocks: list[list[tuple[Float32, Float32]]] = []
        heads: list[Float32] = []
        while any(name.startswith(f"{len(heads)}.") for name in names):
            head = len(heads)
            of_head: list[tuple[Float32, Float32]] = []
            while f"{head}.{len(of_head)}.linear.weight" in names:
                block = f"{head}.{len(of_head)}.linear"
                weight = read(f"{block}.weight", (hidden_size, hidden_size))
                of_head.append((weight, read(f"{block}.bias", (hidden_size,))))
            blocks.append(of_head)
            heads.append(read(f"{head}.{len(of_head)}.weight", (vocab_size, hidden_size)))
        if not heads:
            raise WeightsError(
                f"{source.path} holds no Medusa heads; expected 0.0.linear.weight and so on, as "
                f"in medusa_lm_head.safetensors"
            )
        return cls(blocks, heads)

    def logits(self, hidden: Float32, head: int) -> Float32:
        """hidden: (hidden_size,), behind the target's final norm. Returns (vocab_size,)."""
        x = hidden
        for weight, bias in self.blocks[head]:
            x = x + ops.activate(weight @ x + bias, "silu")
        logits: Float32 = self.heads[head] @ x
        return logits


class MedusaSource(DraftSource):
    """Chains and trees of Medusa heads: chains have at most as many drafts as there are heads."""

    states = "rows"

    def __init__(self, heads: MedusaHeads) -> None:
        self._heads = heads
        self.num_classes = self.num_places = len(heads.heads)
        # Of each sequence its last hidden state, and how many tokens it had with the one after it.
        self._hidden: dict[Sequence, tuple[int, Float32]] = {}
        self._logits: dict[Sequence, list[Float32]] = {}  # of the heads, in this step

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Forget sequences that do not run."""
        self._logits = {}
        for sequence in self._hidden.keys() - set(running):
            del self._hidden[sequence]

    def look(self, sequence: Sequence, own: Any) -> int:
        """Nothing before the hidden state behind its last token is known."""
        known = self._hidden.get(sequence)
        return 0 if known is not None and known[0] == sequence.num_tokens else -1

    def branches(self, sequence: Sequence, own: Any, depth: int, count: int) -> SequenceOf[Ranks]:
        """Those of the tree of the most probable products of guesses."""
        chances = [_best_chances(logits) for logits in self._logits_of(sequence, depth)]
        chains = most_probable(chances, count + 1, depth * (count + 1))
        return [chain for chain in chains if any(chain)]

    def draft_trees(
        self, wanted: SequenceOf[tuple[Sequence, Any, SequenceOf[Ranks]]]
    ) -> SequenceOf[SequenceOf[SequenceOf[int]]]:
        """Of each head the guess of the rank that a chain has in its place."""
        trees = []
        for sequence, _, paths in wanted:
            guesses = []
            for place, logits in enumerate(self._logits_of(sequence, max(map(len, paths)))):
                ranks = [path[place] for path in paths if place < len(path)]
                guesses.append(choose(logits, sequence, place, max(ranks) + 1))
            trees.append([[g[r] for g, r in zip(guesses, p, strict=False)] for p in paths])
        return trees

    def _logits_of(self, sequence: Sequence, count: int) -> list[Float32]:
        """Of the first heads, at most so many; each is computed once a step."""
        found = self._logits.setdefault(sequence, [])
        hidden = self._hidden[sequence][1]
        for head in range(len(found), min(count, len(self._heads.heads))):
            found.append(self._heads.logits(hidden, head))
        return found[:count]

    def end_step(self, schedule: Schedule, output: Any, judged: SequenceOf[Judged]) -> None:
        """Keep the hidden states of the last rows that count."""
        for found in judged:
            if found.rows:
                entry = schedule.entries[found.entry]
                num_rejected = len(entry.draft_token_ids) - found.num_accepted
                length = entry.start + entry.num_new_tokens - num_rejected + 1
                self._hidden[entry.sequence] = (length, output.states[found.rows[-1]].copy())


def choose(logits: Float32, sequence: Sequence, place: int, count: int = 1) -> list[int]:
    """Drafts for a place of the chain: by the request's own options and random numbers.

    count: so many different ones, each the choice if those before it were impossible.
    """
    rows = pack_sampling([sequence], [-1], len(logits))
    rows["position"] = sequence.num_tokens + place
    chosen = [sample_row(logits, rows[0])]
    while len(chosen) < min(count, len(logits)):
        logits = logits.copy() if len(chosen) == 1 else logits
        logits[chosen[-1]] = -np.inf
        chosen.append(sample_row(logits, rows[0]))
    return chosen


def _best_chances(logits: Float32) -> list[float]:
    """The probabilities of the most probable tokens, in order."""
    best = np.sort(np.partition(logits, -MOST_RANKS)[-MOST_RANKS:])[::-1]
    weights = np.exp(best - best[0])
    total = np.exp(logits - best[0]).sum()
    return [float(weight / total) for weight in weights]


def open_heads(folder: Path) -> SafetensorsFile:
    """The one safetensors file of a folder, or the file itself; WeightsError for any other."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(
            f"{folder} holds {len(files)} safetensors files; expected one, with the heads. Files "
            f"of torch (.pt, .bin) are not opened, since they run code: convert them"
        )
    return SafetensorsFile(files[0])


def read_tensor(source: SafetensorsFile, name: str, shape: tuple[int, ...]) -> Float32:
    """A tensor of heads as float32; WeightsError if it is not there, or of another shape."""
    info = source.infos.get(name)
    if info is None or info.shape != shape:
        found = "missing" if info is None else f"of shape {info.shape}"
        raise WeightsError(
            f"{source.path}: {name} is {found}; expected {shape}, as the model that it drafts for"
        )
    return np.array(source.read(name).to_float32())
