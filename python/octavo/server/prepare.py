"""From a body to what the engine takes: prompts encoded, sampling parameters checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.llm import EncodedPrompt
from octavo.sampling_params import MAX_SEED, SamplingParams
from octavo.server.errors import bad_request, to_api_error
from octavo.server.protocol import (
    ChatBody,
    ChatFields,
    CompletionBody,
    Message,
    SamplingBody,
    unsupported,
)

if TYPE_CHECKING:
    from octavo.llm import LLM
    from octavo.server.tools import ToolFormat

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI and vLLM have it
_TEMPLATE_ARGUMENTS = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


def encode_completion(llm: LLM, body: CompletionBody) -> list[EncodedPrompt]:
    """The prompts of a completion, one or many."""
    given: Any = body.prompt
    is_one = isinstance(given, str) or isinstance(given[0], int)
    try:
        return [llm.encode_prompt(prompt) for prompt in ([given] if is_one else given)]
    except OctavoError as error:
        raise to_api_error(error, "prompt") from error


def encode_chat(llm: LLM, body: ChatFields, tool_format: ToolFormat | None) -> EncodedPrompt:
    """A conversation as its prompt."""
    extra = body.chat_template_kwargs or {}
    taken = sorted(_TEMPLATE_ARGUMENTS & extra.keys())
    if taken:
        raise bad_request(
            f"chat_template_kwargs has {taken[0]!r}, which is a field of its own",
            "chat_template_kwargs",
        )
    variables: dict[str, Any] = {**extra, "documents": body.documents}
    if body.tools:
        variables["tools"] = check_tools(body.tools, tool_format)
    try:
        messages = [_plain_message(i, message) for i, message in enumerate(body.messages)]
        return llm.encode_chat(
            messages, add_generation_prompt=body.add_generation_prompt, **variables
        )
    except OctavoError as error:
        raise to_api_error(error, "messages") from error


def check_tools(
    tools: Sequence[dict[str, Any]], tool_format: ToolFormat | None
) -> list[dict[str, Any]]:
    """The tools for the template; an ApiError where one is malformed or the model knows none."""
    if tool_format is None:
        raise bad_request(
            "tools is given, but this model's chat template has no place for tools that octavo "
            "knows how to read: leave tools out, or use a model that was trained to call tools",
            "tools",
        )
    for index, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            raise bad_request(
                f'tools[{index}] is malformed; expected {{"type": "function", "function": '
                f'{{"name": …, "parameters": …}}}}',
                f"tools[{index}]",
            )
    return list(tools)


def sampling_params(
    llm: LLM, body: SamplingBody, prompt: EncodedPrompt, defaults: Mapping[str, float]
) -> SamplingParams:
    """What the body asks for, checked against the model: it could be answered.

    A chat that names no length may fill the rest of the context. defaults: for what is not named.
    """
    refused = unsupported(body)
    if refused is not None:
        raise refused
    room = max(1, llm.max_model_len - len(prompt.token_ids))
    max_tokens, logprobs = body.max_tokens, None
    if isinstance(body, ChatBody):
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    elif isinstance(body, CompletionBody):
        max_tokens = body.max_tokens or DEFAULT_COMPLETION_TOKENS
        logprobs = body.logprobs
    fields: dict[str, Any] = {
        **defaults,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "n": body.num_answers,
        "seed": None if body.seed is None else body.seed & MAX_SEED,
        "logit_bias": _logit_bias(body.logit_bias or {}),
    }
    for name in _AS_GIVEN:
        value = getattr(body, name)
        if value is not None:
            fields[name] = value
    if fields.get("top_k") == -1:  # as vLLM spells "all"
        fields["top_k"] = 0
    try:
        params = SamplingParams(**fields)
        llm.engine.check_request(prompt.token_ids, params)  # reads only what never changes
    except InvalidArgumentError as error:
        raise to_api_error(error, "messages" if isinstance(body, ChatBody) else "prompt") from error
    return params


_AS_GIVEN = (
    *(
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
    ),
    *("include_stop_str_in_output", "skip_special_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_request(
                f"logit_bias has the key {key!r}; expected token ids, as in {{'50256': -100}}",
                "logit_bias",
            )
    return {int(key): value for key, value in given.items()}


def _plain_message(index: int, message: Message) -> dict[str, Any]:
    """A message for the template, with the arguments of tool calls as objects."""
    plain = message.model_dump(exclude_unset=True)
    calls = plain.get("tool_calls")
    if calls is None:
        plain.pop("tool_calls", None)
        return plain
    where = f"messages[{index}].tool_calls"
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidArgumentError(f"{where} is {calls!r}; expected a list of objects")
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidArgumentError(f"{where} has a call without a function's name")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(where, function["arguments"])
    return plain


def _arguments(where: str, text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} has arguments that are no JSON: {error}") from error
