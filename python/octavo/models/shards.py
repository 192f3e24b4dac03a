"""A model divided among ranks: which part of which weight each of them has (tensor parallelism).

Each rank has some of the heads and a part of the MLP's width, of every expert too. So the matrices
before the attention and before the activation are divided by their outputs, those behind them by
their inputs: a rank's product there is a part of every sum, and the ranks' parts are added once in
each half of a layer (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053). The head is divided by
its vocabulary. All the rest every rank has whole: embedding, norms, routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from octavo.errors import InvalidArgumentError
from octavo.models.layer import weight_shapes
from octavo.models.spec import LayerSpec, ModelSpec, WeightFormat


class Shard(NamedTuple):
    """A rank's part of a weight: start .. stop - 1 along the axis; 0: outputs, 1: inputs.

    source: the whole weight's name; that of the embedding where the head is tied to it.
    """

    source: str
    axis: int
    start: int
    stop: int


def shard_spec(spec: ModelSpec, rank: int, world_size: int) -> ModelSpec:
    """The part of a model that one of world_size ranks runs.

    Where there are fewer key and value heads than ranks, several ranks have the same one. The head
    is whole where the vocabulary cannot be divided evenly, else no longer tied to the embedding.
    Raises InvalidArgumentError, with numbers of ranks that work, for a model that cannot be divided
    so.
    """
    if world_size == 1:
        return spec
    if problem := _problem(spec, world_size):
        works = [n for n in range(2, 65) if not _problem(spec, n)]
        advice = f"use {', '.join(map(str, works))} or 1" if works else "use 1"
        raise InvalidArgumentError(f"tensor_parallel_size is {world_size}, but {problem}: {advice}")
    layers = tuple(
        replace(
            layer,
            num_heads=layer.num_heads // world_size,
            num_kv_heads=max(layer.num_kv_heads // world_size, 1),
            intermediate_size=layer.intermediate_size // world_size,
        )
        for layer in spec.layers
    )
    part = replace(spec, layers=layers)
    if spec.vocab_size % world_size:
        return part
    return replace(part, tie_word_embeddings=False, head_part=rank, head_parts=world_size)


def shards(spec: ModelSpec, part: ModelSpec, rank: int, world_size: int) -> dict[str, Shard]:
    """By name, the weights of which the rank's `part` of the model is not the whole weight."""
    whole = weight_shapes(spec)
    found = {}
    for name, shape in weight_shapes(part).items():
        source = name if name in whole else "embed.weight"
        for axis, (size, of) in enumerate(zip(shape, whole[source], strict=True)):
            if size != of:
                # Ranks beside each other have the same part where there are more ranks than heads.
                start = rank * of // world_size // size * size
                found[name] = Shard(source, axis, start, start + size)
    return found


def shard_formats(
    formats: Mapping[str, WeightFormat], cuts: Mapping[str, Shard]
) -> dict[str, WeightFormat]:
    """The formats of a rank's matrices; one that was tied has that of the embedding.

    Raises InvalidArgumentError where a group of inputs, which has one scale, would be cut in two.
    """
    found = dict(formats)
    for name, (source, axis, start, stop) in cuts.items():
        source = source.removesuffix(".weight")
        if source not in formats:
            continue
        found[name.removesuffix(".weight")] = formats[source]
        size = formats[source].group_size
        if axis == 1 and size and (start % size or stop % size):
            raise InvalidArgumentError(
                f"the inputs of {source} are in groups of {size}, which have one scale; a rank "
                f"would have {stop - start} of them: lower tensor_parallel_size"
            )
    return found


def _problem(spec: ModelSpec, world_size: int) -> str:
    """Why the model cannot be divided among so many ranks; "" where it can."""
    for layer in spec.layers:
        if problem := _layer_problem(layer, world_size):
            return problem
    return ""


def _layer_problem(layer: LayerSpec, world_size: int) -> str:
    for size, what in (
        (layer.num_heads, "attention heads"),
        (layer.intermediate_size, "numbers between the matrices of its MLP"),
    ):
        if size % world_size:
            return f"the model has {size} {what}, which cannot be divided evenly"
    kv_heads = layer.num_kv_heads
    if kv_heads % world_size and world_size % kv_heads:
        return f"the model has {kv_heads} key and value heads, which cannot be divided evenly"
    if layer.qk_norm == "row":
        return "the model normalizes the queries of all heads together, of which a rank has a part"
    return ""
