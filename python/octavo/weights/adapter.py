"""Reading a LoRA adapter that PEFT wrote: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from octavo.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from octavo.files import expand_home
from octavo.models.adapter import Adapter, LowRank
from octavo.models.fields import printable
from octavo.models.layer import linear_nodes, model_nodes
from octavo.weights.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from octavo.weights.checkpoint import Checkpoint, has_non_finite
from octavo.weights.model_files import ModelFiles
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.tensor import ITEM_SIZE

WEIGHTS = "adapter_model.safetensors"
# "default" stands for the name that the adapter had in PEFT, which some tools leave in the file.
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[\w.]+?)\."
    r"(?:lora_(?P<half>[AB])(?:\.\w+)?\.weight|lora_embedding_(?P<table_half>[AB])(?:\.\w+)?)"
)
# Of stacked experts: one module, wrapped once for each of its parameters that has an adapter.
_STACKED = re.compile(
    r"(?:base_model\.model\.)?(?P<experts>[\w.]+?\.mlp\.experts)(?:\.base_layer)*"
    r"\.lora_(?P<half>[AB])(?:\.\w+)?\.weight"
)
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>[\w.]+?)\.(?:base_layer\.)?weight")


class _Place(NamedTuple):
    """Where the rows of a module go. part: octavo's matrix."""

    part: str
    first: int
    last: int


class _Module(NamedTuple):
    """A module that may have an adapter. is_table: its rows are read, not multiplied by.

    num_stacked: how many matrices of this shape lie one after the other in the parameter that has
    the adapter; `places` has the parts of the first, then those of the second, and so on.
    """

    places: tuple[_Place, ...]
    inputs: int
    is_table: bool = False
    num_stacked: int = 1

    @property
    def outputs(self) -> int:
        return self.places[-1].last


def read_adapter(
    path: Path, files: ModelFiles, checkpoint: Checkpoint | None = None, *, to_merge: bool = False
) -> Adapter:
    """Read the adapter in a directory for the model `files`.

    checkpoint: the model's weights; then a copy of its embedding in the adapter may be there, if it
    is equal. to_merge: the adapter goes into the weights, so it may change experts and routers too.
    Raises ModelNotFoundError, UnsupportedModelError for what is not computed, and WeightsError that
    lists all that is missing, left over or does not fit.
    """
    path = expand_home(path)
    if not os.path.isdir(path):  # which takes no name for an error
        raise ModelNotFoundError(
            f"{path} is not a directory; expected an adapter that PEFT's save_pretrained wrote "
            f"({CONFIG}, {WEIGHTS})"
        )
    config = read_adapter_config(path)
    source = _open_weights(path)
    modules, apart, stacks = _modules(files), _expert_modules(files), _stacks(files)
    found = [match["module"] for match in map(_NAME.fullmatch, source.infos) if match]
    named = sorted(apart.keys() & found)
    of_stacks = config.stacked_targets(stacks)
    if (of_stacks or named) and not to_merge:
        field = "target_parameters" if of_stacks else "target_modules"
        raise UnsupportedModelError(
            f"{path / CONFIG}: {field} names experts or routers ({(config.parameters or named)[0]})"
            ", whose adapters octavo computes in a merged model only; "
            f"`octavo merge {files.path} {path} OUT` writes one"
        )
    tables = {name for name, module in modules.items() if module.is_table}
    head = files.family.tensors.tensor("lm_head").removesuffix(".weight")
    wanted = config.targets(modules.keys() - tables - {head}, tables | {head})
    if named:  # as PEFT has it where experts are modules: not with transformers 5
        wanted |= config.targets(apart, ())
        modules |= apart
    wanted |= of_stacks
    modules |= stacks
    names, problems = _find_names(source, modules, wanted, files, checkpoint)
    for module in sorted(wanted):
        for half, shape in _shapes(modules[module], config.rank(module)).items():
            problems += _find_problems(source, module, half, shape, names.get((module, half)))
    if not wanted:
        problems.insert(0, "its target_modules are in none of the model's layers")
    if problems:
        raise WeightsError(f"The adapter in {path} does not fit the model {files.path}:", problems)
    matrices: dict[str, LowRank] = {}
    for module in sorted(wanted):
        matrices |= _read(source, modules[module], module, config, names)
    return Adapter(str(path), matrices)


def _open_weights(path: Path) -> SafetensorsFile:
    if not (path / WEIGHTS).is_file():
        pickle = (path / "adapter_model.bin").is_file()
        advice = "; convert adapter_model.bin (octavo opens no pickle files)" if pickle else ""
        raise WeightsError(
            f"{path} holds no {WEIGHTS}; save the adapter with save_pretrained of PEFT, "
            f"safe_serialization on{advice}"
        )
    return SafetensorsFile(path / WEIGHTS)


def _modules(files: ModelFiles) -> dict[str, _Module]:
    """The checkpoint's name of every module that may have an adapter."""
    tensors = files.family.tensors
    places: defaultdict[str, list[_Place]] = defaultdict(list)
    inputs: dict[str, int] = {}
    for part, node in linear_nodes(files.spec).items():
        weight = files.weight_map[part + ".weight"]
        if node.op == "linear":  # not of experts
            first = weight.rows[0] if weight.rows else 0
            places[weight.module].append(_Place(part, first, first + weight.shape[0]))
            inputs[weight.module] = weight.shape[1]
    found = {
        module: _Module(tuple(sorted(parts, key=lambda place: place.first)), inputs[module])
        for module, parts in places.items()
    }
    hidden, vocab = files.spec.hidden_size, files.spec.vocab_size
    table, head = (tensors.tensor(part).removesuffix(".weight") for part in ("embed", "lm_head"))
    found[table] = _Module((_Place("embed", 0, hidden),), vocab, True)
    found[head] = _Module((_Place("lm_head", 0, vocab),), hidden)
    return found


def _expert_modules(files: ModelFiles) -> dict[str, _Module]:
    """The same of the matrices of experts and of routers."""
    found = {}
    for matrix in (each for node in model_nodes(files.spec) for each in node.matrices):
        if matrix.is_router or ".experts." in matrix.name:
            place = _Place(matrix.name, 0, matrix.outputs)
            module = files.weight_map[f"{matrix.name}.weight"].module
            found[module] = _Module((place,), matrix.inputs)
    return found


def _stacks(files: ModelFiles) -> dict[str, _Module]:
    """The same of the parameters that transformers 5 has in place of experts (PEFT's names)."""
    found = {}
    for index, layer in enumerate(files.spec.layers):
        if layer.moe is None:
            continue
        count, width = layer.moe.num_experts, layer.intermediate_size
        experts = [f"layers.{index}.experts.{expert}" for expert in range(count)]
        halves = [
            _Place(f"{expert}.{part}", first, first + width)
            for expert in experts
            for part, first in (("gate", 0), ("up", width))
        ]
        hidden = files.spec.hidden_size
        downs = [_Place(f"{expert}.down", 0, hidden) for expert in experts]
        name = f"model.layers.{index}.mlp.experts"
        found[f"{name}.gate_up_proj"] = _Module(tuple(halves), hidden, num_stacked=count)
        found[f"{name}.down_proj"] = _Module(tuple(downs), width, num_stacked=count)
    return found


def _stack_of(
    source: SafetensorsFile, name: str, match: re.Match[str], modules: Mapping[str, _Module]
) -> str:
    """The parameter that a tensor of stacked experts belongs to: the shapes say which."""
    halves = [_with_half(name, match, half) for half in "AB"]
    a, b = (source.infos[each].shape if each in source.infos else () for each in halves)
    for parameter in ("gate_up_proj", "down_proj"):
        module = modules.get(stack := f"{match['experts']}.{parameter}")
        if module and (a[1:], b[:1]) == ((module.inputs,), (module.outputs,)):
            return stack
    return match["experts"]


def _with_half(name: str, match: re.Match[str], half: str) -> str:
    return name[: match.start("half")] + half + name[match.end("half") :]


def _shapes(module: _Module, rank: int) -> dict[str, tuple[int, int]]:
    """Of stacked matrices, the rows of all their A, and the columns of all their B."""
    rank *= module.num_stacked
    return {"A": (rank, module.inputs), "B": (module.outputs, rank)}


def _find_names(
    source: SafetensorsFile,
    modules: Mapping[str, _Module],
    wanted: set[str],
    files: ModelFiles,
    checkpoint: Checkpoint | None,
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """(module, "A" or "B") -> the tensor's name; and what is wrong with the names."""
    names: dict[tuple[str, str], str] = {}
    problems = []
    for name in source.infos:
        match, stacked = _NAME.fullmatch(name), _STACKED.fullmatch(name)
        if match is None:
            if not _is_copy(source, name, modules, files, checkpoint):
                problems.append(f"{printable(name)} is not a tensor of LoRA as octavo knows it")
            continue
        module, half = match["module"], match["half"] or match["table_half"]
        if stacked:
            module = _stack_of(source, name, stacked, modules)
        if module not in modules:
            problems.append(f"{printable(name)}: the model has no matrix {printable(module)}")
        elif module not in wanted:
            problems.append(f"{printable(name)} is left over: target_modules does not name it")
        elif (match["half"] is None) != modules[module].is_table:
            problems.append(f"{printable(name)}: lora_embedding is for the embedding, and only so")
        elif (module, half) in names:
            problems.append(f"{printable(name)} is there twice, as {names[module, half]} too")
        else:
            names[module, half] = name
    return names, problems


def _is_copy(
    source: SafetensorsFile,
    name: str,
    modules: Mapping[str, _Module],
    files: ModelFiles,
    checkpoint: Checkpoint | None,
) -> bool:
    """Whether it is the model's own embedding or head, which PEFT may save with the adapter."""
    match = _COPY.fullmatch(name)
    if match is None or match["module"] not in modules or checkpoint is None:
        return False
    part = modules[match["module"]].places[0].part
    if part not in ("embed", "lm_head") or source.infos[name].dtype not in ITEM_SIZE:
        return False
    tied = part == "lm_head" and files.spec.tie_word_embeddings
    own = checkpoint["embed.weight" if tied else part + ".weight"]
    theirs = source.read(name)
    return (
        own.dtype in ITEM_SIZE
        and own.shape == theirs.shape
        and np.array_equal(own.to_float32(), theirs.to_float32())
    )


def _find_problems(
    source: SafetensorsFile, module: str, half: str, shape: tuple[int, int], name: str | None
) -> list[str]:
    """What is wrong with one half of a module's adapter."""
    if name is None:
        return [f"{printable(module)} has no lora_{half}; expected shape {shape}"]
    info = source.infos[name]
    if info.shape != shape:
        return [f"{name} has shape {info.shape}; expected {shape}"]
    if info.dtype not in ITEM_SIZE:
        return [f"{name} is stored as {info.dtype}; supported: F32, F16, BF16"]
    if has_non_finite(source.read(name)):
        return [f"{name} holds a NaN or an infinity; train or fetch the adapter again"]
    return []


def _read(
    source: SafetensorsFile,
    module: _Module,
    name: str,
    config: AdapterConfig,
    names: Mapping[tuple[str, str], str],
) -> dict[str, LowRank]:
    a, b = (np.array(source.read(names[name, half]).to_float32()) for half in ("A", "B"))
    scale, count = config.scale(name), module.num_stacked
    # A of (matrices * rank, inputs), B of (outputs, rank * matrices).
    shared, b = list(a.reshape(count, -1, a.shape[1])), b.reshape(len(b), -1, count)
    each = len(module.places) // count
    return {
        part: LowRank(shared[index // each], b[first:last, :, index // each], scale)
        for index, (part, first, last) in enumerate(module.places)
    }
