"""Fields of other servers' APIs: which are refused, which change nothing, which are slips."""

from __future__ import annotations

import difflib
from typing import Any

from octavo.server.errors import ApiError, bad_request

# Values that ask for nothing, unless a field's own are named below.
_NOTHING: tuple[Any, ...] = (False, 0, "", [], {})

# What octavo has under another name: llama.cpp's, Ollama's, Hugging Face's, Anthropic's.
_OTHER_NAMES = {
    **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens", "max_length"), "max_tokens"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "min_tokens"),
    **dict.fromkeys(("stop_sequences", "stop_sequence", "stop_strings"), "stop"),
    **dict.fromkeys(("num_return_sequences", "n_completions"), "n"),
    "repeat_penalty": "repetition_penalty",
    "n_probs": "logprobs",
    "return_full_text": "echo",
    "do_sample": "temperature",
    "temp": "temperature",
}

# What would change the answer, and is not offered. A list per API it comes from.
_REFUSED = frozenset(
    (
        *("functions", "function_call", "audio", "modalities", "web_search_options", "verbosity"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
        *("prompt_logprobs", "use_beam_search", "length_penalty", "early_stopping"),
        *("allowed_token_ids", "bad_words", "truncate_prompt_tokens", "logits_processors"),
        *("return_tokens_as_token_ids", "return_token_ids", "details", "decoder_input_details"),
        *("thinking_token_budget", "kv_transfer_params", "chat_template_content_format"),
        *("grammar", "json_schema", "regex", "ebnf", "stop_regex", "format", "options", "template"),
        *("typical_p", "typ_p", "tfs_z", "top_a", "top_n_sigma", "min_keep", "samplers"),
        *("mirostat", "mirostat_mode", "dynatemp_range", "xtc_probability", "dry_multiplier"),
        *("custom_logit_processor", "lora", "lora_path", "lora_request", "watermark", "truncate"),
        *("input_prefix", "input_suffix", "input_extra", "image_data", "mm_processor_kwargs"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "penalty_alpha", "epsilon_cutoff"),
        *("no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids", "beam_width"),
        *("system", "think", "prefix"),
    )
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (*_NOTHING, ["text"]),
    "do_sample": (True,),
    "truncate_prompt_tokens": (),
    "chat_template_content_format": ("auto", "string"),
    "top_n_sigma": (*_NOTHING, -1),
    **dict.fromkeys(("typical_p", "typ_p", "tfs_z", "repeat_penalty"), (1,)),
    **dict.fromkeys(("length_penalty", "num_beams", "num_return_sequences"), (*_NOTHING, 1)),
}

# What clients send and what cannot change the answer here.
_HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction", "request_id", "keep_alive", "cache_prompt"),
        *("id_slot", "slot_id", "n_keep", "timings_per_token", "response_fields"),
        *("spaces_between_special_tokens", "include_reasoning", "separate_reasoning"),
    )
)


def refused_field(extra: dict[str, Any]) -> ApiError | None:
    """An error for the first field that would change the answer and that octavo does not have."""
    for name, value in extra.items():
        if name not in _REFUSED and name not in _OTHER_NAMES:
            continue
        if any(value == nothing for nothing in _NEUTRAL.get(name, _NOTHING)):
            continue
        other = _OTHER_NAMES.get(name)
        advice = "leave it out" if other is None else f"its name here is {other}"
        return bad_request(f"{name} is not offered by octavo: {advice}", name)
    return None


def unknown_fields(extra: dict[str, Any], known: list[str]) -> dict[str, str | None]:
    """Fields that nobody knows, each with the known one that it may be a slip of."""
    names = {_letters(name): name for name in known}
    unknown: dict[str, str | None] = {}
    for name in extra:
        if name in _REFUSED or name in _OTHER_NAMES or name in _HARMLESS:
            continue
        close = difflib.get_close_matches(_letters(name), names, 1, 0.8)
        unknown[name] = names[close[0]] if close else None
    return unknown


def _letters(name: str) -> str:
    """maxTokens, max-tokens and max_tokens are the same slip."""
    return "".join(filter(str.isalnum, name)).lower()
