"""What is measured, and what it has to read and compute at least: arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from octavo.errors import InvalidArgumentError
from octavo.models.layer import linear_nodes
from octavo.models.spec import LayerSpec, ModelSpec, MoeSpec

# Of one number in each format; scales are little beside them.
BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    "prefill": one prompt of num_tokens tokens, into an empty cache, logits of the last.
    "embed": the same by an embedding model, whose steps end before the head.
    "decode": num_tokens steps of `batch` sequences, each with `depth` tokens in the cache before.
    """

    kind: Literal["prefill", "embed", "decode"]
    num_tokens: int
    batch: int = 1
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128, tg128 @ d1024; or emb512."""
        short = {"prefill": "pp", "embed": "emb", "decode": "tg"}[self.kind]
        return f"{short}{self.num_tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that one run computes, by which its speed is counted."""
        return self.num_tokens * self.batch

    @property
    def longest(self) -> int:
        """Tokens that a sequence holds at the end."""
        return self.depth + self.num_tokens


def make_cases(
    prompts: Sequence[int], generated: Sequence[int], batches: Sequence[int], depths: Sequence[int]
) -> list[Case]:
    """Every prompt length; then every number of tokens, at every depth and batch size.

    A 0 among prompts or generated leaves those out, as in llama-bench. Raises
    InvalidArgumentError when nothing is left, or a batch is 0 or anything negative.
    """
    for name, values, least in (
        ("-p", prompts, 0),
        ("-n", generated, 0),
        ("-b", batches, 1),
        ("-d", depths, 0),
    ):
        for value in values:
            if value < least:
                raise InvalidArgumentError(f"{name} has {value}; expected {least} or more")
    cases = [Case("prefill", tokens) for tokens in prompts if tokens]
    cases += [
        Case("decode", tokens, batch, depth)
        for tokens in generated
        if tokens
        for depth in depths
        for batch in batches
    ]
    if not cases:
        raise InvalidArgumentError("nothing to measure; expected a -p or a -n above 0")
    return cases


def embedding_cases(cases: Sequence[Case]) -> list[Case]:
    """Of these cases those that an embedding model has: prompts, and nothing is decoded."""
    found = [replace(case, kind="embed") for case in cases if case.kind == "prefill"]
    if not found:
        raise InvalidArgumentError(
            "this model gives embeddings and decodes nothing; expected a -p above 0"
        )
    return found


@dataclass(frozen=True)
class Work:
    """The least that a run moves and computes.

    num_bytes: read from memory: every weight once a step, and the keys and values of every token
        attended to, once a step and sequence (what a step writes is little beside it).
    num_operations: multiplications and additions of matrix products and attention.
    """

    num_bytes: float
    num_operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.num_operations + other.num_operations)


def linear_weights(spec: ModelSpec) -> float:
    """Numbers in the layers' matrices by which a token is multiplied: of its own experts only.

    The head is apart, for it sees fewer rows.
    """
    total = 0.0
    for node in linear_nodes(spec).values():
        share = _chosen(spec.layers[node.layer or 0].moe, 1) if node.op == "moe" else 1.0
        total += share * math.prod(node.matrix.shape)
    return total


def _chosen(moe: MoeSpec | None, tokens: int) -> float:
    """The share of the experts that so many tokens take together, if they choose at random."""
    missed = 0.0 if moe is None else 1.0 - moe.experts_per_token / moe.num_experts
    return 1.0 - missed**tokens


def streamed_bytes(
    spec: ModelSpec, weight_bytes: int, embed_item_size: float, *, embeds: bool = False
) -> float:
    """Bytes of weights that a step reads, of `weight_bytes` that all of them take.

    All, but for an embedding that is not the head too: there only the tokens' rows are read.
    embeds: of an embedding model, which has no head.
    """
    if spec.tie_word_embeddings and not embeds:
        return float(weight_bytes)
    return weight_bytes - embed_item_size * spec.vocab_size * spec.hidden_size


def _seen(layer: LayerSpec, context: int) -> int:
    """How many tokens a query sees with `context` tokens up to and with its own."""
    return min(context, layer.window) if layer.window else context


def _steps(case: Case, chunk: int) -> list[tuple[int, int]]:
    """Of each step, its tokens and how many a sequence has at its end. chunk: as in `work_of`."""
    if case.kind == "decode":
        return [(case.batch, case.depth + index + 1) for index in range(case.num_tokens)]
    starts = range(0, case.num_tokens, chunk)
    ends = [min(start + chunk, case.num_tokens) for start in starts]
    return [(end - start, end) for start, end in zip(starts, ends, strict=True)]


def matrices_work(
    case: Case, spec: ModelSpec, step_bytes: float, chunk: int, expert_bytes: float = 0.0
) -> Work:
    """The part of `work_of` that is products with the weights; of a rank, with its part of them."""
    moe = next((layer.moe for layer in spec.layers if layer.moe is not None), None)
    read = (step_bytes - expert_bytes * (1 - _chosen(moe, n)) for n, _ in _steps(case, chunk))
    rows = {"prefill": 1, "embed": 0}.get(case.kind, case.tokens)
    head = spec.vocab_size // spec.head_parts * spec.hidden_size
    weights = linear_weights(spec) * case.tokens + head * rows
    return Work(sum(read), 2.0 * weights)


def attention_work(case: Case, spec: ModelSpec, kv_dtype: str, chunk: int) -> Work:
    """The part of `work_of` that is attention: a product with each key, and one with each value."""
    num_bytes = operations = 0.0
    for layer in spec.layers:
        read = sum(_seen(layer, end) for _, end in _steps(case, chunk))
        num_bytes += 2.0 * layer.kv_size * BYTES[kv_dtype] * read * case.batch
        queries = range(case.depth + 1, case.depth + case.num_tokens + 1)
        operations += 4.0 * layer.q_size * case.batch * sum(_seen(layer, at) for at in queries)
    return Work(num_bytes, operations)


def work_of(
    case: Case,
    spec: ModelSpec,
    step_bytes: float,
    kv_dtype: str,
    chunk: int,
    expert_bytes: float = 0.0,
) -> Work:
    """The work of one run of a case.

    step_bytes: of `streamed_bytes`. chunk: most tokens a step carries, in prefill. expert_bytes: of
    step_bytes, those of experts, of which a step reads the ones that its tokens take.
    """
    matrices = matrices_work(case, spec, step_bytes, chunk, expert_bytes)
    return matrices + attention_work(case, spec, kv_dtype, chunk)


@dataclass(frozen=True)
class Peak:
    """What the machine can do: bytes a second from memory, operations a second.

    flops: in the arithmetic of the weights' format, which `arithmetic` describes (bench/peak.py).
    float32_flops: of float32 multiply-adds, from which flops is counted; 0 where not told.
    """

    bandwidth: float
    flops: float
    arithmetic: str = "float32 multiply-adds"
    float32_flops: float = 0.0


def seconds_of(work: Work, peak: Peak) -> tuple[float, float]:
    """How long the work's reading and its computing take at the machine's limits."""
    return work.num_bytes / peak.bandwidth, work.num_operations / peak.flops


def least_seconds(work: Work, peak: Peak) -> tuple[float, Literal["memory", "arithmetic"]]:
    """How long the work takes at the machine's limit, and which limit it is (a roofline)."""
    memory, arithmetic = seconds_of(work, peak)
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")
