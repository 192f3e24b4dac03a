"""Hugging Face transformers, to be compared with. torch and transformers are imported only in here.

The taps come from outside, by public means: forward hooks on the modules, and an attention
function of our own, registered under a name, that notes the rotated queries and keys and then
calls transformers' eager attention. So the model that runs is transformers' own, unchanged.
Which module has which weight is read from the family's weight map.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from octavo.diff.implementations import Int32, StepResult
from octavo.diff.measure import Float32
from octavo.errors import InvalidArgumentError, UnsupportedModelError
from octavo.models.layer import Node, model_nodes
from octavo.weights.model_files import ModelFiles
from octavo.weights.tensor import Tensor

ATTENTION = "octavo_taps"  # the name our attention function is registered under
_RECORDER = "octavo_recorder"  # the attribute of a model's config with where it notes them


@dataclass
class Recorder:
    """Where hooks leave what they see; off between the runs that want taps.

    attention: the node of each layer's attention.
    """

    attention: Mapping[int, Node]
    active: bool = False
    taps: dict[str, Float32] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Keep a (1, rows, ...) torch tensor as float32 (rows, width)."""
        if self.active:
            tensor = value[0] if isinstance(value, tuple) else value
            rows = tensor.detach()[0].float().cpu()
            self.taps[name] = rows.reshape(len(rows), -1).numpy().copy()


def import_hugging_face(with_peft: bool = False) -> tuple[ModuleType, ModuleType]:
    """(torch, transformers); an InvalidArgumentError says how to install what is missing.

    with_peft: PEFT must be there too.
    """
    wanted = "torch, transformers and peft" if with_peft else "torch and transformers"
    try:
        if with_peft:
            importlib.import_module("peft")
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise InvalidArgumentError(
            f"--against hf needs {wanted} ({error}); install them with `pip install "
            f"{wanted.replace(',', '').replace(' and', '')}`, or compare with the NumPy reference: "
            "--against reference"
        ) from error


class HuggingFaceImplementation:
    """transformers' model, with eager attention, in float32 or bfloat16."""

    name = "Hugging Face"
    is_definition = False
    bit_exact = False

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        *,
        weights: Mapping[str, Tensor] | None = None,
        adapter: Path | None = None,
        num_threads: int = 0,
    ) -> None:
        """files: the model. dtype: "f32" or "bf16", of weights and activations alike.

        weights: values to put in place of the checkpoint's, in octavo's names (dummy weights, or
        those of a GGUF file); None lets transformers load the directory by its own loader.
        adapter: a LoRA adapter's folder, which PEFT puts into the model.
        """
        self._torch, transformers = import_hugging_face()
        if num_threads:
            self._torch.set_num_threads(num_threads)
        self.dtype = dtype
        self.rounds_output = dtype == "bf16"
        self._nodes = model_nodes(files.spec)
        attention = {node.layer or 0: node for node in self._nodes if node.op == "attention"}
        self._recorder = Recorder(attention)
        self._cache: Any = None
        self._transformers = transformers
        _register_attention()
        self._model = self._load(files, weights)
        added = ""
        if adapter is not None:
            peft = importlib.import_module("peft")
            # The model itself is changed: its modules keep their names, and add what PEFT computes.
            with warnings.catch_warnings():  # of tied heads, of deprecated names
                warnings.simplefilter("ignore")
                peft.PeftModel.from_pretrained(self._model, adapter, local_files_only=True).eval()
            added = f", peft {peft.__version__}"
        self._hook(files)
        module = type(self._model).__module__  # transformers.models.llama.modeling_llama
        self.op_files = module.replace(".", ": ", 1).replace(".", "/") + ".py"
        self.description = (
            f"transformers {transformers.__version__}, torch {self._torch.__version__}, {dtype}, "
            f"eager attention, cpu{added}"
        )

    def _load(self, files: ModelFiles, weights: Mapping[str, Tensor] | None) -> Any:
        torch_dtype = self._torch.float32 if self.dtype == "f32" else self._torch.bfloat16
        auto = self._transformers.AutoModelForCausalLM
        options = {"dtype": torch_dtype, "attn_implementation": ATTENTION}
        if weights is None:
            model = auto.from_pretrained(files.path, local_files_only=True, **options)
        else:
            config = self._transformers.AutoConfig.for_model(**files.config)
            model = auto.from_config(config, **options)
            state = {
                checkpoint_name(files, name): self._torch.from_numpy(tensor.to_float32().copy())
                for name, tensor in weights.items()
            }
            missing, unexpected = model.load_state_dict(state, strict=False)
            head = model.get_output_embeddings().weight if files.spec.tie_word_embeddings else None
            untied = [name for name in missing if model.get_parameter(name) is not head]
            if untied or unexpected:
                raise UnsupportedModelError(
                    f"transformers' model has other weights than octavo's: {untied or unexpected}"
                )
            model.tie_weights()
        return model.eval()

    def _hook(self, files: ModelFiles) -> None:
        """Put a hook on every module that gives a tap, or is given one."""
        modules = {node.tap: self._module(files, node) for node in self._nodes}
        for node in self._nodes:
            module = modules[node.tap]
            if module is None:
                continue
            module.register_forward_hook(
                lambda _module, _inputs, output, tap=node.tap: self._recorder.note(tap, output)
            )
            for source in node.inputs:
                # What an op without weights gives is seen where the next module takes it in.
                if modules[source] is None:
                    module.register_forward_pre_hook(
                        lambda _module, inputs, tap=source: self._recorder.note(tap, inputs[0])
                    )
        setattr(self._model.config, _RECORDER, self._recorder)

    def _module(self, files: ModelFiles, node: Node) -> Any:
        """The module whose output is the tap; None where there is none."""
        if node.op == "linear" and node.layer is None:
            return self._model.get_output_embeddings()  # whether tied or not
        if node.norm is not None:
            return self._model.get_submodule(checkpoint_module(files, node.tap))
        if node.matrices:
            return self._model.get_submodule(checkpoint_module(files, node.matrices[0].name))
        if node.op == "add_norm":  # the residual stream behind a layer
            return self._model.get_submodule(_layer_module(files, self._nodes, node.layer))
        return None

    def reset(self) -> None:
        self._cache = None

    def feed(self, token_ids: Int32, *, taps: bool = False, all_logits: bool = True) -> StepResult:
        torch = self._torch
        if self._cache is None:
            self._cache = self._transformers.DynamicCache()
        self._recorder.active, self._recorder.taps = taps, {}
        ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64))[None]
        with torch.inference_mode():
            result = self._model(
                input_ids=ids,
                **{cache_argument(self._model): self._cache},
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            )
        self._recorder.active = False
        logits: Float32 = result.logits[0].float().numpy()
        seen = self._recorder.taps
        ordered = {node.tap: seen[node.tap] for node in self._nodes if node.tap in seen}
        return StepResult(logits, int(result.logits[0, -1].argmax()), ordered)


def checkpoint_name(files: ModelFiles, weight: str) -> str:
    """The checkpoint's name of a weight: "layers.0.q.weight" -> "model.layers.0.self_attn...."."""
    return files.weight_map[weight].name


def checkpoint_module(files: ModelFiles, name: str) -> str:
    """The module that has a matrix or a norm; name: octavo's, without ".weight"."""
    return checkpoint_name(files, f"{name}.weight").removesuffix(".weight")


def _layer_module(files: ModelFiles, nodes: list[Node], layer: int | None) -> str:
    """The module that has all the norms and matrices of a layer: "model.layers.3"."""
    names = [weight.name for node in nodes if node.layer == layer for weight in node.weights()]
    paths = [checkpoint_name(files, name).replace(".", "/") for name in names]
    return commonpath(paths).replace("/", ".")


def cache_argument(model: Any) -> str:
    """What a transformers model calls its cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _register_attention() -> None:
    """Register, once for all models, eager attention that notes rotated queries and keys."""
    masks = importlib.import_module("transformers.masking_utils")
    functions = importlib.import_module("transformers.modeling_utils").AttentionInterface

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[Any, Any]:
        recorder: Recorder | None = getattr(module.config, _RECORDER, None)
        if recorder is not None and recorder.active:
            rows = query.shape[2]  # (1, heads, rows, head_dim); keys reach back over the cache
            q_tap, k_tap, _ = recorder.attention[module.layer_idx].inputs
            recorder.note(q_tap, query.transpose(1, 2))
            recorder.note(k_tap, key[:, :, -rows:].transpose(1, 2))
        eager = sys.modules[type(module).__module__].eager_attention_forward
        result: tuple[Any, Any] = eager(module, query, key, value, mask, **options)
        return result

    functions.register(ATTENTION, attention)
    masks.AttentionMaskInterface.register(ATTENTION, masks.eager_mask)
