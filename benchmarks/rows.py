"""What compare_cpu.py measures: one row of its tables, the same for every side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Bits of a weight by the name a side gives its format; the scales of groups count.
BITS: dict[str, float] = {"f32": 32, "bf16": 16, "int8": 8, "w8a8": 8, "q8_0": 8.5}
BITS |= {"int4": 4.5, "q4_0": 4.5, "int4-nonuniform": 4.5, "int4-g128": 4.125}


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    decode: `generated` tokens, one after the other, from a prompt of one token.
    prefill: a prompt of `prompt` tokens, up to the first token of the answer.
    serve: `requests` requests that arrive together, each of `prompt` tokens with an answer of
        `generated`; all their tokens count.
    """

    name: Literal["decode", "prefill", "serve"]
    prompt: int
    generated: int
    requests: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that a side's speed counts."""
        if self.name == "decode":
            return self.generated
        return self.requests * (
            self.prompt + self.generated if self.name == "serve" else self.prompt
        )

    @property
    def title(self) -> str:
        """As a heading."""
        if self.name == "decode":
            return f"decode, one sequence, {self.generated} tokens: tok/s"
        if self.name == "prefill":
            return f"prefill, a prompt of {self.prompt}: tok/s"
        return (
            f"{self.requests} requests of {self.prompt} in, {self.generated} out: all tokens, tok/s"
        )

    def prompts(self) -> list[list[int]]:
        """Token ids of every request, from 10 to 499: the smallest vocabulary has them."""
        return [
            [(7919 * index + 131 * request) % 490 + 10 for index in range(self.prompt)]
            for request in range(self.requests)
        ]


def longest_of(rows: list[Row]) -> int:
    """Tokens of the longest sequence, its answer included."""
    return max(row.prompt + row.generated for row in rows)


def most_requests_of(rows: list[Row]) -> int:
    """Sequences of the row that has most."""
    return max(row.requests for row in rows)


def most_tokens_of(rows: list[Row]) -> int:
    """Tokens of all sequences together, in the row that has most."""
    return max(row.requests * (row.prompt + row.generated) for row in rows)
