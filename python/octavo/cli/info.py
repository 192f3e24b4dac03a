"""`octavo info`: what a model is and whether it fits, from its configuration and headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from octavo.cli.options import ModelArgument, option
from octavo.machine import format_bytes

if TYPE_CHECKING:
    from octavo.models.spec import ModelSpec, WeightFormat
    from octavo.weights.checkpoint import Checkpoint
    from octavo.weights.model_files import ModelFiles

_DTYPES: Final = ("f32", "bf16")
_KV_FRACTION_HELP = "of the memory left beside the weights, as the engine takes by default"


def info(
    model: ModelArgument = None,
    as_json: Annotated[bool, option("Print one JSON object instead of a table.", "--json")] = False,
) -> None:
    """Show what a model is and whether it fits in this machine's memory.

    Reads the configuration and the headers of the weight files only; a folder needs no more than
    its config.json.
    """
    from octavo.config import read_environment
    from octavo.weights.hub import resolve_model
    from octavo.weights.model_files import read_model

    facts = describe(read_model(resolve_model(model, read_environment())))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_table(facts)


def describe(files: ModelFiles) -> dict[str, Any]:
    """What `octavo info` prints, as JSON values; sizes in bytes.

    Raises WeightsError where there are weight files and they are damaged or do not fit. A folder
    that holds no weight file at all is described from its configuration.
    """
    from octavo.models.layer import weight_shapes
    from octavo.models.summary import specials
    from octavo.quantization.plan import describe_formats, embedding_formats, weight_bytes
    from octavo.weights.pooling import for_runner
    from octavo.weights.tensor import ITEM_SIZE

    files, pooling = for_runner(files, "auto", has_weights=False)
    spec = files.spec
    checkpoint = _open(files)
    layer = spec.layers[0]
    num_parameters = sum(math.prod(shape) for shape in weight_shapes(spec).values())
    formats = {name: matrix.format for name, matrix in files.quantized.items()}
    if checkpoint is not None:
        formats = dict(checkpoint.formats)
    weight_sizes = {dtype: ITEM_SIZE[dtype] * num_parameters for dtype in _DTYPES}
    loaded = {}
    if formats:  # embedding and head are rounded as they are loaded
        loaded = {**embedding_formats(spec), **formats}
        weight_sizes = {dtype: weight_bytes(spec, loaded, dtype) for dtype in _DTYPES}
    kv_elements, longest = spec.kv_elements(1), spec.max_position_embeddings
    return {
        "path": str(files.path),
        "architecture": spec.architecture,
        "embeddings": None if pooling is None else str(pooling),
        "num_parameters": num_parameters,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_layers": len(spec.layers),
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.intermediate_size,
        "activation": layer.activation,
        "attention_bias": layer.qkv_bias,
        "mlp_bias": layer.mlp_bias,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope": _rope(spec),
        "special": specials(spec),
        "eos_token_ids": list(files.eos_token_ids),
        "weights": None if checkpoint is None else _weights(checkpoint),
        "quantized": describe_formats(spec, formats),
        "converted": [] if checkpoint is None else _converted(spec, checkpoint, loaded),
        "kv_bytes_per_token": {"f32": 4 * kv_elements, "bf16": 2 * kv_elements},
        # Of layers with a window only the last tokens are kept.
        "kv_share_at_full_length": spec.kv_elements(longest) / (kv_elements * longest),
        "memory": _memory(weight_sizes, spec),
    }


def _rope(spec: ModelSpec) -> dict[str, Any] | None:
    """The rope of the first layer that rotates."""
    for layer in spec.layers:
        if layer.rope is not None:
            return {
                "kind": layer.rope.kind,
                "theta": layer.rope.theta,
                "factor": layer.rope.factor,
                "attention_factor": layer.rope.attention_factor,
                "rotated": 2 * len(layer.rope.frequencies),
                "head_dim": layer.head_dim,
            }
    return None


def _open(files: ModelFiles) -> Checkpoint | None:
    """The weights; None for a folder with a configuration only."""
    from octavo.weights.checkpoint import open_checkpoint

    kinds = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
    is_directory = files.path.is_dir()
    if is_directory and not any(entry.name.endswith(kinds) for entry in files.path.iterdir()):
        return None
    return open_checkpoint(files)


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    sizes = checkpoint.bytes_by_dtype()
    return {
        "dtype": checkpoint.dtype,
        "total_bytes": sum(sizes.values()),
        "bytes_by_dtype": sizes,
        "num_tensors": len(checkpoint),
    }


def _converted(
    spec: ModelSpec, checkpoint: Checkpoint, formats: Mapping[str, WeightFormat]
) -> list[dict[str, Any]]:
    """What becomes of matrices in formats of other programs."""
    from octavo.quantization.stored import describe_stored

    dtype = "bf16" if checkpoint.dtype == "bf16" else "f32"
    found = describe_stored(spec, checkpoint.stored, formats, dtype)
    return [{**each._asdict(), "text": str(each)} for each in found]


def _memory(weight_sizes: dict[str, int], spec: ModelSpec) -> dict[str, Any]:
    """What fits here, with weights (if not quantized) and KV cache both in f32, or both in bf16.

    weight_sizes: bytes of the weights by that dtype. Tokens are those of sequences of full length,
    of which layers with a window hold only the last ones.
    """
    from octavo.config import EngineConfig
    from octavo.machine import available_memory, total_memory
    from octavo.weights.tensor import ITEM_SIZE

    available = available_memory()
    fraction = EngineConfig().kv_memory_fraction
    fits = {}
    for dtype in _DTYPES:
        weights = weight_sizes[dtype]
        left = max(0, available - weights)
        longest = spec.max_position_embeddings
        size = spec.kv_elements(longest) * ITEM_SIZE[dtype]
        tokens = int(left * fraction) * longest // size
        fits[dtype] = {
            "weight_bytes": weights,
            "fits": weights <= available,
            "kv_tokens": tokens,
            "full_length_sequences": tokens // longest,
        }
    return {
        "available_bytes": available,
        "total_bytes": total_memory(),
        "kv_memory_fraction": fraction,
        "as": fits,
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _rows(facts):
        table.add_row(label, text)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(_fit_table(facts["memory"]))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    heads, kv_heads = facts["num_heads"], facts["num_kv_heads"]
    kind = "multi-head" if heads == kv_heads else "multi-query" if kv_heads == 1 else "grouped"
    head = "tied to the embedding" if facts["tie_word_embeddings"] else "of its own"
    head = head if facts["embeddings"] is None else "not needed"
    biases = [name for name in ("attention", "mlp") if facts[f"{name}_bias"]]
    kv_bytes, kv_share = facts["kv_bytes_per_token"], facts["kv_share_at_full_length"]
    windowed = f"; at full length {kv_share:.1%} of that, since windows end" if kv_share < 1 else ""
    return [
        ("Model", str(Path(facts["path"]))),
        ("Architecture", facts["architecture"]),
        *[("Embeddings", facts["embeddings"])] * (facts["embeddings"] is not None),
        ("Parameters", f"{facts['num_parameters']:,} ({_short(facts['num_parameters'])})"),
        ("Weight files", _weights_text(facts["weights"])),
        *[("Quantized", text) for text in facts["quantized"]],
        *[("Stored as", each["text"]) for each in facts["converted"]],
        ("Layers", f"{facts['num_layers']}, hidden size {facts['hidden_size']:,}"),
        (
            "Attention",
            f"{heads} query heads and {kv_heads} KV heads of {facts['head_dim']} ({kind})",
        ),
        ("MLP", f"{facts['intermediate_size']:,} wide, {facts['activation']}"),
        ("Biases", " and ".join(biases) or "none"),
        ("Vocabulary", f"{facts['vocab_size']:,} tokens; output head {head}"),
        ("Context", f"{facts['max_position_embeddings']:,} tokens"),
        ("Rope", _rope_text(facts["rope"])),
        *[("Special", text) for text in facts["special"]],
        ("End of text", ", ".join(map(str, facts["eos_token_ids"])) or "no token"),
        (
            "KV cache",
            f"{format_bytes(kv_bytes['bf16'])} a token as bf16, {format_bytes(kv_bytes['f32'])} "
            f"as f32{windowed}",
        ),
    ]


def _weights_text(weights: dict[str, Any] | None) -> str:
    if weights is None:
        return "none (configuration only)"
    parts = [f"{format_bytes(size)} {dtype}" for dtype, size in weights["bytes_by_dtype"].items()]
    return f"{format_bytes(weights['total_bytes'])} in {weights['num_tensors']} tensors: " + (
        " and ".join(parts)
    )


def _rope_text(rope: dict[str, Any] | None) -> str:
    if rope is None:
        return "none"
    text = f"theta {rope['theta']:g}"
    if rope["kind"] != "default":
        text += f", {rope['kind']} scaling by {rope['factor']:g}"
    if rope["rotated"] < rope["head_dim"]:
        text += f", on {rope['rotated']} of {rope['head_dim']} elements of a head"
    return text


def _fit_table(memory: dict[str, Any]) -> Any:
    from octavo.tables import Figures

    available, total = memory["available_bytes"], memory["total_bytes"]
    share = f"{memory['kv_memory_fraction']:.0%}"
    rows = [
        (
            dtype,
            format_bytes(fit["weight_bytes"]),
            "yes" if fit["fits"] else "no",
            f"{fit['kv_tokens']:,}",
            f"{fit['full_length_sequences']:,}",
        )
        for dtype, fit in memory["as"].items()
    ]
    return Figures(
        ("dtype", "weights", "fits", "KV cache, tokens", "sequences of full length"),
        rows,
        left=("dtype",),
        title=f"In this machine's memory: {format_bytes(available)} available of "
        f"{format_bytes(total)}",
        caption=f"KV cache: {share} {_KV_FRACTION_HELP}",
    )


def _short(count: float) -> str:
    """135000000 -> "135.0M"."""
    for unit in ("", "K", "M", "B"):
        if count < 1000 or unit == "B":
            break
        count /= 1000
    return f"{count:.1f}{unit}" if unit else str(int(count))
