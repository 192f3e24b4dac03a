"""`quantization_config` of config.json: which matrices are not stored as plain numbers, and how.

Each quantization method has a reader of its own, which says how a module is stored. What they have
in common is here: where the configuration lies, and lists of modules that were left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.folder import Folder
from octavo.models.family import TensorNames
from octavo.models.fields import Fields, read_json_object
from octavo.models.layer import linear_nodes
from octavo.models.spec import ModelSpec
from octavo.weights.awq import read_awq
from octavo.weights.bitsandbytes import read_bitsandbytes
from octavo.weights.compressed_tensors import read_compressed_tensors
from octavo.weights.float8 import read_fp8
from octavo.weights.gptq import read_gptq
from octavo.weights.stored import StoredMatrix

_SOURCE = "config.json: quantization_config"
_Read = Callable[[Fields, str, tuple[int, int]], StoredMatrix | None]
# Methods whose configuration describes all matrices at once, and lists those left out.
_READERS: dict[str, _Read] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
}
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules")
_COMPRESSED = ("compressed-tensors", "octavo", "sparseml")
# Methods that store Conv1D of GPT-2 as (outputs, inputs), like any other matrix.
_TURNED = ("gptq", "bitsandbytes", "octavo")
# Where early versions of AutoGPTQ and AutoAWQ put their configuration, which names no method.
_OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def with_quantization(config: dict[str, Any], folder: Folder) -> dict[str, Any]:
    """config.json with its `quantization_config` where it belongs.

    Older spellings: `compression_config`, and files beside config.json.
    """
    values = config.get("quantization_config")
    if values is not None and not isinstance(values, dict):
        raise Fields(config, "config.json").error("quantization_config", values, "an object")
    older = config.get("compression_config")
    if values is None and isinstance(older, dict) and older:
        inner = older.get("quantization_config")  # of its first versions, one level deeper
        values = {**older, **inner} if isinstance(inner, dict) else older
        config = {name: value for name, value in config.items() if name != "compression_config"}
    for file, method in _OLDER_FILES.items():
        if values is None and (folder / file).is_file():
            values = {"quant_method": method, **read_json_object(folder / file)}
    return config if values is None else {**config, "quantization_config": values}


def read_quantization(
    config: Mapping[str, Any], spec: ModelSpec, names: TensorNames
) -> dict[str, StoredMatrix]:
    """The matrices that are not stored as plain numbers, by octavo's name without ".weight".

    config: as `with_quantization` returns it. Raises UnsupportedModelError with the field that
    octavo does not support.
    """
    values = config.get("quantization_config")
    if values is None:
        return {}
    fields = Fields(values, _SOURCE)
    method = values.get("quant_method")
    if isinstance(method, str) and method in _COMPRESSED:
        scheme = read_compressed_tensors(fields)
    elif isinstance(method, str) and method in _READERS:
        scheme = partial(_read_unless_left_out, fields, _left_out(fields), _READERS[method])
    else:
        raise _unknown_method(fields, method)
    has_head = not spec.tie_word_embeddings and _may_have_head(fields)
    stored, weight_map = {}, names.weight_map(spec)
    for name in [*linear_nodes(spec), *(["lm_head"] if has_head else [])]:
        source = weight_map[name + ".weight"]
        turned = source.transform == "transpose" and method in _TURNED
        outputs, inputs = source.stored_shape[::-1] if turned else source.stored_shape
        module = source.module
        found = scheme(module, (outputs, inputs))
        if found is None:
            continue
        if source.transform != "plain" and not turned:
            field = "config_groups" if method in _COMPRESSED else "quant_method"
            raise fields.error(field, module, "matrices that are stored as they are used")
        stored[name] = found
    return stored


def _unknown_method(fields: Fields, method: object) -> UnsupportedModelError:
    supported = ", ".join(repr(each) for each in (*_READERS, *_COMPRESSED[:2]))
    advice = "take the model in one of these, or unquantized (`octavo quantize` rounds it)"
    return fields.error("quant_method", method, f"{supported}, or no quantization: {advice}")


def _may_have_head(fields: Fields) -> bool:
    """Whether the method may have quantized the head.

    compressed-tensors says so by its targets, GPTQ by a field, and AWQ never does it. The others
    leave it out, unless they list what is left out: then the list says it.
    """
    method = fields.values.get("quant_method")
    if method == "awq":
        return False
    if method == "gptq":
        return fields.boolean("lm_head", False)
    return method in _COMPRESSED or any(fields.values.get(name) is not None for name in _LEFT_OUT)


def _left_out(fields: Fields) -> tuple[str, ...]:
    """The modules that are listed as not quantized."""
    found: list[str] = []
    for name in _LEFT_OUT:
        value = fields.values.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise fields.error(name, value, "a list of names, or null")
        found += value
    return tuple(entry for entry in found if entry)


def _read_unless_left_out(
    fields: Fields, left_out: tuple[str, ...], read: _Read, module: str, shape: tuple[int, int]
) -> StoredMatrix | None:
    if any(_names_module(entry, module) for entry in left_out):
        return None
    return read(fields, module, shape)


def _names_module(entry: str, module: str) -> bool:
    """Whether an entry names the module: some of the parts between its dots, or its ending.

    "mlp.gate" and "layers.1" name modules inside model.layers.1.mlp.gate, but not mlp.gate_proj or
    model.layers.11; transformers' `should_convert_module` has the same rule.
    """
    return f".{entry.strip('.')}." in f".{module}." or module.endswith(entry)
