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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from octavo.diff.implementations import Int32, StepResult
from octavo.diff.measure import Float32
from octavo.errors import InvalidArgumentError, UnsupportedModelError
from octavo.models.family import WeightSource, group_by_tensor
from octavo.models.layer import Node, model_nodes
from octavo.weights.model_files import ModelFiles
from octavo.weights.reader import whole_tensor
from octavo.weights.tensor import Tensor

ATTENTION = "octavo_taps"  # the name our attention function is registered under
_RECORDER = "octavo_recorder"  # the attribute of a model's config with where it notes them
# Where queries and keys are normalized as (1, heads, rows, head_dim); elsewhere rows come first.
_NORMED_BY_HEAD = ("gemma3_text",)


@dataclass
class Recorder:
    """Where hooks leave what they see; off between the runs that want taps.

    attention: the node of each layer's attention.
    """

    attention: Mapping[int, Node]
    active: bool = False
    taps: dict[str, Float32] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Keep a torch tensor, (1, rows, ...) or a router's (rows, width), as float32 rows."""
        if self.active:
            tensor = value[0] if isinstance(value, tuple) else value
            rows = tensor.detach().float().cpu()
            rows = rows if rows.dim() == 2 else rows[0]
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
        sequence_length: int = 0,
    ) -> None:
        """files: the model. dtype: "f32" or "bf16", of weights and activations alike.

        weights: values to put in place of the checkpoint's, in octavo's names (dummy weights, or
        those of a GGUF file); None lets transformers load the directory by its own loader.
        adapter: a LoRA adapter's folder, which PEFT puts into the model. sequence_length: of all
        tokens that will be fed, where LongRoPE shall not go by those of each call.
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
        self._keep_rope(sequence_length)
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

    def _keep_rope(self, length: int) -> None:
        """Let LongRoPE choose by a sequence of `length` tokens, and never again."""
        for module in self._model.modules():
            if length and getattr(module, "rope_type", None) == "longrope":
                module(self._torch.zeros(1), self._torch.tensor([[length - 1]]))
                module.rope_type = "default"

    def _load(self, files: ModelFiles, weights: Mapping[str, Tensor] | None) -> Any:
        torch_dtype = self._torch.float32 if self.dtype == "f32" else self._torch.bfloat16
        auto = self._transformers.AutoModelForCausalLM
        options = {"dtype": torch_dtype, "attn_implementation": ATTENTION}
        if weights is None:
            model = auto.from_pretrained(files.path, local_files_only=True, **options)
        else:
            model = self._load_values(files, checkpoint_tensors(files.weight_map, weights), options)
        # Products of all experts at once, its default, want widths that are multiples of four.
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model.eval()

    def _load_values(
        self, files: ModelFiles, tensors: Mapping[str, Float32], options: Mapping[str, Any]
    ) -> Any:
        """transformers' model with these tensors of a checkpoint, as if it had read them."""
        config = self._transformers.AutoConfig.for_model(**files.config)
        kind = self._transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        state = {name: self._torch.from_numpy(values) for name, values in tensors.items()}
        # Its loader knows which of its weights are several of a checkpoint's (experts).
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
        head = model.get_output_embeddings().weight if files.spec.tie_word_embeddings else None
        missing = [name for name in info["missing_keys"] if model.get_parameter(name) is not head]
        others = [*missing, *info["unexpected_keys"], *info["mismatched_keys"]]
        if others:
            raise UnsupportedModelError(
                f"transformers' model has other weights than octavo's: {others}"
            )
        return model

    def _hook(self, files: ModelFiles) -> None:
        """Put a hook on every module that gives a tap, or is given one."""
        modules = {node.tap: self._module(files, node) for node in self._nodes}
        for node in self._nodes:
            module, part = modules[node.tap], self._part(files, node)
            if module is None:
                continue
            module.register_forward_hook(
                lambda _module, _inputs, output, tap=node.tap, part=part: self._recorder.note(
                    tap, part(output)
                )
            )
            # What an op without weights gives is seen where the next module takes it in.
            if len(node.inputs) == 1 and modules[node.inputs[0]] is None:
                module.register_forward_pre_hook(
                    lambda _module, inputs, tap=node.inputs[0]: self._recorder.note(tap, inputs[0])
                )
        setattr(self._model.config, _RECORDER, self._recorder)

    def _module(self, files: ModelFiles, node: Node) -> Any:
        """The module whose output is the tap, or has it as its `_part`; else None."""
        if node.op == "moe" or any(matrix.is_router for matrix in node.matrices):
            return self._expert_module(files, node)
        if node.op == "linear" and node.layer is None:
            # Whether tied or not; multipliers and caps of the logits come after the module.
            is_plain = node.scale == 1 and node.cap == 0
            return self._model.get_output_embeddings() if is_plain else None
        if node.normalizes:
            return self._model.get_submodule(checkpoint_module(files, node.tap))
        if node.op == "embed" and (len(node.matrices) > 1 or node.scale != 1):
            return None  # positions are added, or a multiplier applied, after the module
        if node.matrices:
            return self._model.get_submodule(checkpoint_module(files, node.matrices[0].name))
        if node.op == "add_norm" and node.norm is None:  # the residual stream behind a layer
            return self._model.get_submodule(_layer_module(files, self._nodes, node.layer))
        return None

    def _part(self, files: ModelFiles, node: Node) -> Callable[[Any], Any]:
        """From a module's output to the tap, (1, rows, ...)."""
        if node.op == "norm_heads" and self._model.config.model_type in _NORMED_BY_HEAD:
            return lambda output: output.transpose(1, 2)
        place = None
        if node.op == "linear" and node.layer is not None:
            place = files.weight_map[f"{node.matrix.name}.weight"].rows  # of a fused matrix
        if place is None:
            return lambda output: output
        columns = slice(place[0], place[0] + node.width)
        return lambda output: output[..., columns]

    def _expert_module(self, files: ModelFiles, node: Node) -> Any:
        """The router, or all that it belongs to; transformers 5 has other names than the files."""
        layer = self._model.get_submodule(_layer_module(files, self._nodes, node.layer))
        router = next(name for name, _ in layer.named_modules() if name.endswith(".gate"))
        name = router.removesuffix(".gate") if node.op == "moe" else router
        return layer.get_submodule(name)

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
        if taps and all_logits:
            seen["logits"] = logits
        ordered = {node.tap: seen[node.tap] for node in self._nodes if node.tap in seen}
        return StepResult(logits, int(result.logits[0, -1].argmax()), ordered)


def checkpoint_tensors(
    weight_map: Mapping[str, WeightSource], weights: Mapping[str, Tensor]
) -> dict[str, Float32]:
    """The tensors of a checkpoint that holds these weights: fused and transformed again.

    weight_map: octavo's names -> where each weight lies. Returns float32 arrays of their own.
    """
    tensors: dict[str, Float32] = {}
    for tensor, names in group_by_tensor(weight_map).items():
        whole = whole_tensor([(weight_map[name], weights[name].to_float32()) for name in names])
        tensors[tensor] = np.require(whole, requirements="W")  # what is mapped is not writable
    return tensors


def checkpoint_module(files: ModelFiles, name: str) -> str:
    """The module that has a matrix or a norm; name: octavo's, without ".weight"."""
    return files.weight_map[f"{name}.weight"].module


def _layer_module(files: ModelFiles, nodes: list[Node], layer: int | None) -> str:
    """The module that has all the norms and matrices of a layer: "model.layers.3"."""
    names = [weight.name for node in nodes if node.layer == layer for weight in node.weights()]
    paths = [files.weight_map[name].tensor.replace(".", "/") for name in names]
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
