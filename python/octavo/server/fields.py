"""Fields of other servers' APIs: which are refused, which change nothing, which are slips."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from octavo.server.errors import ApiError, bad_request

# Values that ask for nothing, unless a field's own are named below.
_NOTHING: tuple[Any, ...] = (False, 0, "", [], {})

# What octavo has under another name: llama.cpp's, Ollama's, Hugging Face's, Anthropic's.
_LENGTHS = ("n_predict", "num_predict", "max_new_tokens", "max_length", "max_output_tokens")
_OTHER_NAMES = {
    **dict.fromkeys(_LENGTHS, "max_tokens"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "min_tokens"),
    **dict.fromkeys(("stop_sequences", "stop_sequence", "stop_strings", "stop_words"), "stop"),
    **dict.fromkeys(("num_return_sequences", "n_completions", "num_completions", "n_cmpl"), "n"),
    **dict.fromkeys(("repeat_penalty", "rep_pen"), "repetition_penalty"),
    **dict.fromkeys(("temp", "do_sample"), "temperature"),
    **dict.fromkeys(("random_seed", "sampling_seed"), "seed"),
    **dict.fromkeys(("n_probs", "return_logprob"), "logprobs"),
    **dict.fromkeys(("top_n_tokens", "top_logprobs_num"), "top_logprobs"),
    **dict.fromkeys(("reasoning", "thinking"), "reasoning_effort"),
    **dict.fromkeys(("ban_eos_token",), "ignore_eos"),
    "no_stop_trim": "include_stop_str_in_output",
    "eos_token_id": "stop_token_ids",
    "add_bos_token": "add_special_tokens",
    "enable_thinking": 'chat_template_kwargs, as in {"enable_thinking": false}',
    "return_full_text": "echo",
}

# What would change the answer, and is not offered. A list per API it comes from.
_REFUSED = frozenset(
    (
        *("functions", "function_call", "audio", "modalities", "web_search_options", "verbosity"),
        *("instructions", "input", "previous_response_id", "conversation", "extra_body"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
        *("guided_json_object", "structural_tag", "vllm_xargs", "repetition_detection"),
        *("prompt_logprobs", "use_beam_search", "length_penalty", "early_stopping"),
        *("allowed_token_ids", "bad_words", "truncate_prompt_tokens", "logits_processors"),
        *("return_tokens_as_token_ids", "return_token_ids", "details", "decoder_input_details"),
        *("thinking_token_budget", "kv_transfer_params", "chat_template_content_format"),
        *("prompt_embeds", "media_io_kwargs", "logprob_token_ids", "tokenization_kwargs"),
        *("grammar", "json_schema", "regex", "ebnf", "stop_regex", "format", "options", "template"),
        *("typical_p", "typ_p", "tfs_z", "top_a", "top_n_sigma", "min_keep", "samplers"),
        *("mirostat", "mirostat_mode", "dynatemp_range", "xtc_probability", "dry_multiplier"),
        *("adaptive_target", "repeat_last_n", "penalize_nl", "post_sampling_probs", "n_indent"),
        *("t_max_predict_ms", "return_tokens", "reasoning_format", "thinking_forced_open"),
        *("generation_prompt", "parse_tool_calls", "multimodal_data", "sampler_seq"),
        *("custom_logit_processor", "lora", "lora_path", "lora_request", "watermark", "truncate"),
        *("custom_params", "session_params", "input_ids", "input_embeds", "sampling_params"),
        *("return_hidden_states", "token_ids_logprob", "logit_processors", "adapter_id"),
        *("input_prefix", "input_suffix", "input_extra", "image_data", "mm_processor_kwargs"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "penalty_alpha", "epsilon_cutoff"),
        *("no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids", "beam_width"),
        *("suppress_tokens", "begin_suppress_tokens", "force_words_ids", "forced_bos_token_id"),
        *("eta_cutoff", "smoothing_factor", "dynamic_temperature", "sampler_order"),
        *("banned_tokens", "banned_strings", "custom_token_bans", "repetition_context_size"),
        *("guidance_scale", "cfg_scale", "negative_prompt", "tool_prompt", "guideline", "inputs"),
        *("safe_prompt", "transforms", "plugins", "prompt_truncate_len", "thinking_budget"),
        *("reasoning_budget", "preset", "character", "instruction_template", "temperature_last"),
        *("sampler_priority", "return_prompt_text"),
        *("parameters", "system", "system_prompt", "think", "prefix", "raw", "images", "context"),
    )
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (*_NOTHING, ["text"]),
    "verbosity": ("medium",),
    "web_search_options": (),
    "function_call": (*_NOTHING, "none"),
    "do_sample": (True,),
    "truncate_prompt_tokens": (),
    "chat_template_content_format": ("auto", "string"),
    "reasoning_format": ("auto", "none"),
    "top_n_sigma": (*_NOTHING, -1),
    **dict.fromkeys(("repeat_last_n", "reasoning_budget"), (-1,)),
    "thinking": (*_NOTHING, {"type": "disabled"}),
    **dict.fromkeys(("parse_tool_calls", "add_bos_token"), (True,)),
    **dict.fromkeys((*_LENGTHS, "enable_thinking", "eos_token_id", "random_seed"), ()),
    **dict.fromkeys(("temp", "sampling_seed"), ()),
    **dict.fromkeys(("typical_p", "typ_p", "tfs_z", "repeat_penalty", "rep_pen"), (1,)),
    **dict.fromkeys(("guidance_scale", "cfg_scale"), (*_NOTHING, 1)),
    **dict.fromkeys(("length_penalty", "num_beams", "num_return_sequences"), (*_NOTHING, 1)),
    **dict.fromkeys(("n_completions", "num_completions", "n_cmpl", "best_of"), (1,)),
    "tool_choice": (*_NOTHING, "none", "auto"),
    "parallel_tool_calls": (False, True),
    "add_generation_prompt": (True,),
}

# What clients send and what cannot change the answer here: what accounting and routing need, and
# what says more about a field that is refused.
_HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction", "request_id", "keep_alive", "cache_prompt"),
        *("id_slot", "slot_id", "n_keep", "timings_per_token", "response_fields"),
        *("n_discard", "n_cache_reuse", "return_progress", "rid", "extra_key", "stream_interval"),
        *("spaces_between_special_tokens", "include_reasoning", "separate_reasoning"),
        *("stream_reasoning", "guided_decoding_backend", "guided_whitespace_pattern"),
        *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "dry_base"),
        *("dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "truncation_side"),
        *("grammar_lazy", "grammar_triggers", "include_obfuscation", "ec_transfer_params"),
        *("models", "mode", "provider", "route"),
    )
)


def refused_field(
    extra: dict[str, Any], elsewhere: Mapping[str, str] | None = None
) -> ApiError | None:
    """An error for the first field that would change the answer and that octavo does not have.

    elsewhere: fields that octavo has, but not here; each with what to do instead.
    """
    advices = {name: f"its name here is {other}" for name, other in _OTHER_NAMES.items()}
    advices |= elsewhere or {}
    for name, value in extra.items():
        if name not in _REFUSED and name not in advices:
            continue
        if any(value == nothing for nothing in _NEUTRAL.get(name, _NOTHING)):
            continue
        advice = advices.get(name, "leave it out")
        return bad_request(f"{name} is not offered by octavo: {advice}", name)
    return None


def unknown_fields(extra: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """Fields that nobody knows, each with the one, taken or refused, that it may be a slip of."""
    names = {_letters(name): name for name in (*_REFUSED, *_OTHER_NAMES, *known)}
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
