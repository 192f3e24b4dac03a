"""Hugging Face transformers as a side. torch and transformers are imported only in here.

The taps come from outside, by public means: forward hooks on the modules, and an attention
function of our own, registered under a name, that notes the rotated queries and keys and then
calls transformers' eager attention. So the model that runs is transformers' own, unchanged.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from octavo.diff.implementations import Fed, Int32
from octavo.diff.measure import Float32
from octavo.errors import InvalidArgumentError, UnsupportedModelError
from octavo.models.layer import tap_names
from octavo.weights.model_files import ModelFiles
from octavo.weights.tensor import Tensor

ATTENTION = "octavo_taps"  # the name our attention function is registered under
_RECORDER = "octavo_recorder"  # the attribute of an attention module that it writes to
TESTED = "torch==2.13.0, transformers 5"

# Submodule of a decoder layer -> (tap of its input or None, tap of its output or None).
_LAYER_MODULES: Mapping[str, tuple[str | None, str | None]] = {
    "input_layernorm": (None, "attn_norm"),
    "self_attn.q_proj": (None, "q"),
    "self_attn.k_proj": (None, "k"),
    "self_attn.v_proj": (None, "v"),
    "self_attn.o_proj": ("attn", "attn_out"),
    "post_attention_layernorm": (None, "mlp_norm"),
    "mlp.gate_proj": (None, "gate"),
    "mlp.up_proj": (None, "up"),
    "mlp.down_proj": ("act", "mlp_out"),
    "": (None, "out"),
}
_MODEL_MODULES = {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "logits"}


@dataclass
class Recorder:
    """Where hooks leave what they see; off between the runs that want taps."""

    active: bool = False
    taps: dict[str, Float32] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Keep a (1, rows, ...) torch tensor as float32 (rows, width)."""
        if self.active:
            tensor = value[0] if isinstance(value, tuple) else value
            rows = tensor.detach()[0].float().cpu()
            self.taps[name] = rows.reshape(len(rows), -1).numpy().copy()


def import_hugging_face() -> tuple[ModuleType, ModuleType]:
    """(torch, transformers); an InvalidArgumentError says how to install what is missing."""
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise InvalidArgumentError(
            f"--against hf needs torch and transformers ({error}); install them with "
            "`pip install torch transformers`, or compare with the NumPy reference: "
            "--against reference"
        ) from error


class HuggingFaceSide:
    """transformers' model, with eager attention, in float32 or bfloat16."""

    name = "Hugging Face"
    is_definition = False
    bit_exact = False
    op_files = "hf"

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        *,
        weights: Mapping[str, Tensor] | None = None,
        num_threads: int = 0,
    ) -> None:
        """files: the model. dtype: "f32" or "bf16", of weights and activations alike.

        weights: values to put in place of the checkpoint's, in octavo's names (dummy weights, or
        those of a GGUF file); None lets transformers load the directory by its own loader.
        """
        self._torch, transformers = import_hugging_face()
        if num_threads:
            self._torch.set_num_threads(num_threads)
        self.dtype = dtype
        self.rounds_output = dtype == "bf16"
        self._recorder = Recorder()
        self._order = tap_names(files.spec)
        self._cache: Any = None
        self._transformers = transformers
        _register_attention()
        self._model = self._load(files, weights)
        self._hook()
        self.description = (
            f"transformers {transformers.__version__}, torch {self._torch.__version__}, {dtype}, "
            "eager attention, cpu"
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
                files.weight_map[name].name: self._torch.from_numpy(tensor.to_float32().copy())
                for name, tensor in weights.items()
            }
            missing, unexpected = model.load_state_dict(state, strict=False)
            untied = [name for name in missing if name != "lm_head.weight"]
            if untied or unexpected:
                raise UnsupportedModelError(
                    f"transformers' model has other weights than octavo's: {untied or unexpected}"
                )
            model.tie_weights()
        return model.eval()

    def _hook(self) -> None:
        """Put a hook on every module that yields a tap."""
        note = self._recorder.note
        for path, tap in _MODEL_MODULES.items():
            module = self._model.get_submodule(path)
            module.register_forward_hook(
                lambda _module, _inputs, output, tap=tap: note(tap, output)
            )
        for index, layer in enumerate(self._model.model.layers):
            prefix = f"layers.{index}."
            for path, (before, after) in _LAYER_MODULES.items():
                module = layer.get_submodule(path)
                if before is not None:
                    module.register_forward_pre_hook(
                        lambda _module, inputs, name=prefix + before: note(name, inputs[0])
                    )
                if after is not None:
                    module.register_forward_hook(
                        lambda _module, _inputs, output, name=prefix + after: note(name, output)
                    )
            setattr(layer.self_attn, _RECORDER, self._recorder)

    def reset(self) -> None:
        self._cache = None

    def feed(self, token_ids: Int32, *, taps: bool = False, all_logits: bool = True) -> Fed:
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
        ordered = {name: seen[name] for name in self._order if name in seen}
        return Fed(logits, int(result.logits[0, -1].argmax()), ordered)


def cache_argument(model: Any) -> str:
    """What a transformers model calls its cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _register_attention() -> None:
    """Register, once for all models, eager attention that notes rotated queries and keys."""
    masks = importlib.import_module("transformers.masking_utils")
    functions = importlib.import_module("transformers.modeling_utils").AttentionInterface
    llama = importlib.import_module("transformers.models.llama.modeling_llama")

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[Any, Any]:
        recorder: Recorder | None = getattr(module, _RECORDER, None)
        if recorder is not None and recorder.active:
            prefix = f"layers.{module.layer_idx}."
            rows = query.shape[2]  # (1, heads, rows, head_dim); keys reach back over the cache
            recorder.note(prefix + "q_rope", query.transpose(1, 2))
            recorder.note(prefix + "k_rope", key[:, :, -rows:].transpose(1, 2))
        result: tuple[Any, Any] = llama.eager_attention_forward(
            module, query, key, value, mask, **options
        )
        return result

    functions.register(ATTENTION, attention)
    masks.AttentionMaskInterface.register(ATTENTION, masks.eager_mask)
