"""What vLLM's users write that octavo calls otherwise: taken where it means the same, else refused.

A refusal says what to use instead. An unknown name is refused with the one that is most like it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from octavo.errors import InvalidArgumentError

# Options of `LLM` that mean the same under another name.
_RENAMED = {
    "gpu_memory_utilization": "kv_memory_fraction",
    "kv_cache_dtype": "kv_dtype",
    "max_loras": "max_adapters",
}
# Options that ask for nothing, or for what octavo does anyway, at these values.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "cpu_offload_gb": (0, None),
    "data_parallel_size": (1,),
    "disable_log_stats": (True, False),
    "distributed_executor_backend": ("mp", None),
    "enable_chunked_prefill": (True, None),
    "enable_lora": (True, False),
    "pipeline_parallel_size": (1,),
    "quantization": (None,),
    "revision": (None,),
    "skip_tokenizer_init": (False,),
    "task": ("auto", "generate"),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto",),
    "trust_remote_code": (True, False),  # octavo runs no code of a model
}
# Options that are taken whatever they are: octavo needs no such limit.
_IGNORED = ("max_lora_rank", "swap_space", "disable_custom_all_reduce", "disable_log_requests")
_INSTEAD = {
    "cpu_offload_gb": "octavo keeps a model in one memory: a smaller one, or quantize='int8'",
    "data_parallel_size": "start several processes (docs/replicas.md)",
    "distributed_executor_backend": "tensor_parallel_size: ranks are processes of one machine",
    "download_dir": "the environment variable OCTAVO_HOME names the folder for models",
    "enable_chunked_prefill": "prompts are always computed in chunks of max_num_batched_tokens",
    "pipeline_parallel_size": "tensor_parallel_size divides a model among GPUs",
    "quantization": "the checkpoint says how it is quantized; quantize='int8' rounds a float model",
    "revision": "octavo pull ORG/NAME --revision NAME",
    "task": "runner='pooling' for embeddings, or nothing: the model's files say what it is for",
    "skip_tokenizer_init": "give prompts as token ids; the tokenizer does no harm",
    "tokenizer": "octavo takes the tokenizer in the model's folder",
    "tokenizer_mode": "octavo takes the tokenizer.json in the model's folder",
}
# Fields of SamplingParams.
_SAMPLING_INSTEAD = {
    "best_of": "n answers, of which the best has the highest cumulative_logprob",
    "detokenize": "skip_special_tokens; texts cost next to nothing",
    "guided_decoding": "structured_outputs, as in structured_outputs={'regex': '[0-9]+'}",
    "length_penalty": "llm.beam_search(prompts, BeamSearchParams(...))",
    "output_kind": "llm.stream for pieces, llm.generate for the whole",
    "spaces_between_special_tokens": "skip_special_tokens",
    "truncate_prompt_tokens": "cut the prompt: llm.get_tokenizer().encode(text)[-n:]",
    "use_beam_search": "llm.beam_search(prompts, BeamSearchParams(...))",
}
_POOLING = ("classify", "reward", "score")


def translate_options(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Options of `LLM` under octavo's names. known: those that it has. InvalidArgumentError."""
    options: dict[str, Any] = {}
    unknown = []
    for name, value in given.items():
        own = _RENAMED.get(name, name)
        if own != name and own in given:
            raise InvalidArgumentError(f"{name} and {own} are both given; expected one of them")
        if own in known:
            options[own] = value
        elif name in _INSTEAD and value not in _HARMLESS.get(name, ()):
            raise InvalidArgumentError(
                f"LLM does not take {name}={value!r}; use instead: {_INSTEAD[name]}"
            )
        elif name not in _HARMLESS and name not in _IGNORED:
            unknown.append(name)
    if unknown:
        raise InvalidArgumentError(f"LLM has no option {unknown_names(unknown, known)}")
    if options.get("seed", 0) is None:
        del options["seed"]
    return options


def refuse_sampling(unknown: Collection[str], known: Collection[str]) -> InvalidArgumentError:
    """The error for fields that SamplingParams does not have."""
    for name in unknown:
        if name in _SAMPLING_INSTEAD:
            return InvalidArgumentError(
                f"SamplingParams has no {name}; use instead: {_SAMPLING_INSTEAD[name]}"
            )
    return InvalidArgumentError(f"SamplingParams has no {unknown_names(unknown, known)}")


def unknown_names(unknown: Collection[str], known: Collection[str]) -> str:
    """The names, with the one that the first may be meant for, and all that there are."""
    first = sorted(unknown)[0]
    near = difflib.get_close_matches(first, known, 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"{', '.join(sorted(unknown))}{meant}; expected some of {', '.join(sorted(known))}"


def no_such_method(name: str) -> AttributeError:
    """The error for a method that `LLM` does not have."""
    if name in _POOLING:
        return AttributeError(
            f"LLM has no {name}: of pooling models octavo runs those of embeddings (llm.embed); a "
            "sentence's log-probability comes by SamplingParams(prompt_logprobs=0)"
        )
    return AttributeError(f"LLM has no {name}")
