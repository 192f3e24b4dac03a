"""Fields of other servers' APIs: which are refused, which change nothing, which are slips."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from octavo.server.errors import bad_request


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOST_UNKNOWN = 20  # fields that are looked at for slips

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
    **dict.fromkeys(("grammar", "ebnf"), "guided_grammar"),
    "json_schema": "guided_json",
    "regex": "guided_regex",
    "format": "response_format",
    "structural_tag": 'structured_outputs, as in {"structural_tag": …}',
    "typ_p": "typical_p",
    **dict.fromkeys(("banned_strings", "custom_token_bans"), "bad_words"),
    "no_stop_trim": "include_stop_str_in_output",
    "eos_token_id": "stop_token_ids",
    "add_bos_token": "add_special_tokens",
    "enable_thinking": 'chat_template_kwargs, as in {"enable_thinking": false}',
    "return_full_text": "echo",
}

# What would change the answer, and is not offered.
_REFUSED = _words(
    """
    adapter_id adaptive_target audio bad_words_ids banned_strings banned_tokens beam_width
    begin_suppress_tokens cfg_scale character chat_template_content_format context conversation
    custom_logit_processor custom_params custom_token_bans decoder_input_details details
    dynamic_temperature dynatemp_range encoder_repetition_penalty epsilon_cutoff eta_cutoff
    extra_body force_words_ids forced_bos_token_id function_call functions generation_prompt
    guidance_scale guideline image_data images input input_embeds input_extra input_ids input_prefix
    input_suffix inputs instruction_template instructions kv_transfer_params length_penalty
    logit_processors logits_processors logprob_token_ids lora lora_path lora_request media_io_kwargs
    min_keep mirostat mirostat_mode mm_processor_kwargs modalities multimodal_data n_indent
    negative_prompt no_repeat_ngram_size num_beams options parameters parse_tool_calls penalize_nl
    penalty_alpha plugins post_sampling_probs prefix preset previous_response_id prompt_embeds
    prompt_truncate_len raw reasoning_budget repeat_last_n repetition_context_size
    repetition_detection return_hidden_states return_prompt_text return_token_ids return_tokens
    return_tokens_as_token_ids safe_prompt sampler_order sampler_priority sampler_seq samplers
    sampling_params session_params smoothing_factor stop_regex suppress_tokens system
    system_prompt t_max_predict_ms temperature_last template tfs_z think thinking_budget
    thinking_forced_open thinking_token_budget token_ids_logprob tokenization_kwargs tool_prompt
    top_a transforms truncate truncate_prompt_tokens verbosity vllm_xargs watermark
    web_search_options
    """
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (*_NOTHING, ["text"]),
    "verbosity": ("medium",),
    "web_search_options": (),
    "function_call": (*_NOTHING, "none"),
    "do_sample": (True,),
    "truncate_prompt_tokens": (),
    "chat_template_content_format": ("auto", "string"),
    **dict.fromkeys(("repeat_last_n", "reasoning_budget"), (-1,)),
    "thinking": (*_NOTHING, {"type": "disabled"}),
    **dict.fromkeys(("parse_tool_calls", "add_bos_token"), (True,)),
    **dict.fromkeys((*_LENGTHS, "enable_thinking", "eos_token_id", "random_seed"), ()),
    **dict.fromkeys(("temp", "sampling_seed"), ()),
    **dict.fromkeys(("typ_p", "tfs_z", "repeat_penalty", "rep_pen"), (1,)),
    **dict.fromkeys(("guidance_scale", "cfg_scale"), (*_NOTHING, 1)),
    **dict.fromkeys(("num_beams", "num_return_sequences"), (*_NOTHING, 1)),
    **dict.fromkeys(("n_completions", "num_completions", "n_cmpl", "best_of"), (1,)),
    "tool_choice": (*_NOTHING, "none", "auto"),
    "parallel_tool_calls": (False, True),
    "add_generation_prompt": (True,),
}

# What to do in place of a field that is refused.
_MIROSTAT = (
    "it would make a token depend on how surprising those before it were, and not on seed and "
    "position alone; use min_p, top_n_sigma or typical_p"
)
_INSTEAD: dict[str, str] = {
    **dict.fromkeys(("mirostat", "mirostat_mode"), _MIROSTAT),
    **dict.fromkeys(
        ("samplers", "sampler_order", "sampler_seq", "sampler_priority", "temperature_last"),
        "the order of the filters is fixed",
    ),
    **dict.fromkeys(("banned_tokens", "suppress_tokens"), "use logit_bias, -100 for each"),
    **dict.fromkeys(
        ("logits_processors", "logit_processors", "custom_logit_processor"),
        "a server runs no code of its clients",
    ),
}

# What clients send and what cannot change the answer here: what accounting and routing need, and
# what says more about a field that is refused.
_HARMLESS = _words(
    """
    cache_prompt
    dynatemp_exponent ec_transfer_params extra_key grammar_lazy grammar_triggers
    guided_decoding_backend id_slot include_obfuscation
    keep_alive metadata mirostat_eta mirostat_tau mode models n_cache_reuse n_discard n_keep
    prediction prompt_cache_key prompt_cache_retention provider request_id response_fields
    return_progress rid route safety_identifier service_tier slot_id
    spaces_between_special_tokens store stream_interval stream_reasoning timings_per_token
    truncation_side user
    """
)


def check_extra_fields(
    extra: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raise an ApiError for the first field that would change the answer and is not offered.

    elsewhere: fields that another route of octavo has; each with what to do instead.
    """
    advices = {name: f"its name here is {other}" for name, other in _OTHER_NAMES.items()}
    advices |= {**_INSTEAD, **(elsewhere or {})}
    for name, value in extra.items():
        is_known = name in _REFUSED or name in advices
        if is_known and not any(value == neutral for neutral in _NEUTRAL.get(name, _NOTHING)):
            advice = advices.get(name, "leave it out")
            raise bad_request(f"{name} is not offered by octavo: {advice}", name)


def unknown_fields(extra: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """Fields that no API has, each with the field, offered or refused, that was perhaps meant.

    The first of them only: each is compared with every field that there is.
    """
    names = {_letters(name): name for name in (*_REFUSED, *_OTHER_NAMES, *known)}
    unknown: dict[str, str | None] = {}
    for name in extra:
        if name in _REFUSED or name in _OTHER_NAMES or name in _HARMLESS:
            continue
        if len(unknown) == _MOST_UNKNOWN:
            break
        close = difflib.get_close_matches(_letters(name), names, 1, 0.8)
        unknown[name] = names[close[0]] if close else None
    return unknown


def _letters(name: str) -> str:
    """maxTokens, max-tokens and max_tokens are the same slip."""
    return "".join(filter(str.isalnum, name)).lower()
