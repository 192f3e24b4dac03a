"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): each guesses one of the next tokens.

Of the target's last hidden state h, which gave the token just sampled, head i makes a guess of the
token i + 1 places behind that one: h = h + silu(h W^T + b) for each of its residual blocks, then
its own output matrix. The guesses form a chain. Everything is computed in NumPy, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.engine.batch import pack_sampling
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
    """Chains of Medusa heads: at most as many drafts as there are heads."""

    taps = ("final_norm",)

    def __init__(self, heads: MedusaHeads) -> None:
        self._heads = heads
        self.num_classes = len(heads.heads)
        # Of each sequence its last hidden state, and how many tokens it had with the one after it.
        self._hidden: dict[Sequence, tuple[int, Float32]] = {}

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Forget sequences that do not run."""
        for sequence in self._hidden.keys() - set(running):
            del self._hidden[sequence]

    def look(self, sequence: Sequence, own: Any) -> int:
        """Nothing before the hidden state behind its last token is known."""
        known = self._hidden.get(sequence)
        return 0 if known is not None and known[0] == sequence.num_tokens else -1

    def draft(self, wanted: SequenceOf[tuple[Sequence, Any, int]]) -> SequenceOf[SequenceOf[int]]:
        """A guess of each head, in order."""
        return [
            [
                choose(self._heads.logits(self._hidden[sequence][1], head), sequence, head)
                for head in range(min(count, len(self._heads.heads)))
            ]
            for sequence, _, count in wanted
        ]

    def end_step(self, schedule: Schedule, output: Any, num_accepted: SequenceOf[int]) -> None:
        """Keep the hidden states of the last rows that count."""
        if not schedule.row_sequences:
            return  # parts of prompts alone: there is no such tap
        states, row = output.taps["final_norm"], 0
        for entry, accepted in zip(schedule.entries, num_accepted, strict=True):
            if entry.num_samples:
                num_rejected = len(entry.draft_token_ids) - accepted
                length = entry.start + entry.num_new_tokens - num_rejected + 1
                self._hidden[entry.sequence] = (length, states[row + accepted].copy())
            row += entry.num_samples


def choose(logits: Float32, sequence: Sequence, place: int) -> int:
    """The draft in a place of the chain: by the request's own options and random numbers."""
    rows = pack_sampling([sequence], [-1], len(logits))
    rows["position"] = sequence.num_tokens + place
    return sample_row(logits, rows[0])


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
