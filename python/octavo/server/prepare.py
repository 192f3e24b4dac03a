"""From a body to what the engine takes: prompts encoded, sampling parameters checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server.answer_grammar import answer_grammar, looked_for, parts_of
from octavo.server.answers import Markup, Reading
from octavo.server.beams import beam_params, check_beams
from octavo.server.errors import bad_request, to_api_error
from octavo.server.formats import ChatFormat, CompletionFormat, Format, Head, NewPlaces
from octavo.server.prompt_logprobs import PromptLogprobs
from octavo.server.protocol import (
    ChatBody,
    ChatFields,
    CompletionBody,
    Message,
    SamplingBody,
    check_supported,
)
from octavo.server.structured import structured_field, structured_outputs
from octavo.server.tool_choice import call_mode
from octavo.server.tool_messages import fit_conversation
from octavo.structured_outputs import StructuredOutputs
from octavo.text.chat import ChatTemplate
from octavo.text.places import TokenPlaces

if TYPE_CHECKING:
    from octavo.model import LoadedModel

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI and vLLM have it


def encode_completion(model: LoadedModel, body: CompletionBody) -> list[EncodedPrompt]:
    """The prompts of a completion, one or many."""
    given: Any = body.prompt
    is_one = isinstance(given, str) or isinstance(given[0], int)
    prompts = [given] if is_one else given
    try:
        return [model.encode_prompt(prompt, body.add_special_tokens) for prompt in prompts]
    except OctavoError as error:
        raise to_api_error(error, "prompt") from error


def encode_chat(model: LoadedModel, body: ChatFields, markup: Markup) -> EncodedPrompt:
    """A conversation as its prompt. markup: how the model writes what is no plain text."""
    if body.continue_final_message:
        raise bad_request(
            "continue_final_message is not offered by octavo: use /v1/completions",
            "continue_final_message",
        )
    extra = body.chat_template_kwargs or {}
    taken = sorted(extra.keys() & _template_arguments(model)) if extra else []
    if taken:
        raise bad_request(
            f"chat_template_kwargs has {taken[0]!r}, which is no variable of a template: use the "
            "field of that name, or another name",
            "chat_template_kwargs",
        )
    variables: dict[str, Any] = {**extra, "documents": body.documents}
    if body.reasoning_effort is not None:  # for templates that read it; others have no use for it
        variables["reasoning_effort"] = body.reasoning_effort
    messages = [_message(message) for message in body.messages]
    if body.tools:
        _check_tools(body.tools, markup)
    if markup.tools is not None:
        source = _template_source(model, body)
        messages, more = fit_conversation(messages, body.tools or (), source, markup.tools)
        variables = {**more, **variables}
    try:
        prompt = model.encode_chat(
            messages,
            chat_template=body.chat_template,
            add_special_tokens=body.add_special_tokens,
            add_generation_prompt=body.add_generation_prompt,
            **variables,
        )
    except OctavoError as error:
        raise to_api_error(error, body.prompt_field) from error
    return replace(prompt, kept_special_ids=kept_ids(model, body, markup))


def _message(message: Message) -> dict[str, Any]:
    """For a chat template; what was thought goes by either name."""
    found = message.model_dump(exclude_unset=True)
    thought = found.get("reasoning") or found.get("reasoning_content")
    return found | {"reasoning": thought, "reasoning_content": thought} if thought else found


def _template_source(model: LoadedModel, body: ChatFields) -> str:
    """The chat template that writes the prompt."""
    if body.chat_template is not None or model.chat_template is None:
        return body.chat_template or ""
    template = model.chat_template
    return template.source_with_tools if body.tools else template.source


def _template_arguments(model: LoadedModel) -> set[str]:
    """Names that the functions which make a prompt, or the fields of a body, have themselves."""
    functions = (type(model).encode_chat, ChatTemplate.render)
    found = [each for one in functions for each in signature(one).parameters.values()]
    return {each.name for each in found if each.kind != each.VAR_KEYWORD} | {"tools", "documents"}


def kept_ids(model: LoadedModel, body: ChatFields, markup: Markup) -> frozenset[int]:
    """Special tokens that stay in the text; so do tags of thinking that is left in the answer."""
    found = replace(looked_for(body, markup), reasoning=markup.reasoning)
    return found.token_ids(model.tokenizer)


def chat_format(
    model: LoadedModel,
    body: ChatBody,
    head: Head,
    params: SamplingParams,
    markup: Markup,
    prompt: EncodedPrompt,
    make: Callable[[Head, NewPlaces, Reading, PromptLogprobs], Format] = ChatFormat,
) -> Format:
    """How the answers to a conversation are written. prompt: as of `encode_chat`."""
    reading = reading_of(body, markup, prompt.text)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else model.engine.eos_token_ids)}
    places = partial(
        TokenPlaces,
        model.tokenizer,
        params.skip_special_tokens,
        continues=False,
        kept=prompt.kept_special_ids,
        ends=() if params.include_stop_str_in_output else ends,
    )
    shown = PromptLogprobs(model.tokenizer, body.prompt_logprobs)
    return make(head, places, reading, shown)


def reading_of(body: ChatBody, markup: Markup, prompt: str | None) -> Reading:
    """How the answers to a conversation are read. prompt: its text, where it is known."""
    found = looked_for(body, markup)
    return Reading(
        found,
        found.reasoning.start(prompt) if found.reasoning else "before",
        calls=call_mode(body, found.tools) or "free",
        max_calls=1 if body.parallel_tool_calls is False else None,
        shows_reasoning=body.include_reasoning is not False,
        tools=body.tools or (),
    )


def completion_format(
    model: LoadedModel, body: CompletionBody, head: Head, prompts: Sequence[EncodedPrompt]
) -> CompletionFormat:
    """How the answers to these prompts are written."""
    skip = body.skip_special_tokens is not False
    echoes: list[str] = []
    for prompt in prompts if body.echo else ():
        text = prompt.text
        if text is None:
            if model.tokenizer is None:
                raise bad_request("echo is true, but this model has no tokenizer", "echo")
            text = model.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        echoes += [text] * body.num_answers
    places = partial(TokenPlaces, model.tokenizer, skip, continues=True)
    shown = PromptLogprobs(model.tokenizer, body.prompt_logprobs, body.logprobs)
    return CompletionFormat(head, places, echoes, shown)


def _check_tools(tools: Sequence[dict[str, Any]], markup: Markup) -> None:
    """Raise an ApiError where a tool is malformed, or where the model has no format for calls."""
    if markup.tools is None:
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


def sampling_params(
    model: LoadedModel,
    body: SamplingBody,
    prompt: EncodedPrompt,
    defaults: Mapping[str, Any],
    markup: Markup | None = None,
) -> SamplingParams:
    """What the body asks for, checked against the model: it could be answered.

    A chat that names no length may fill the rest of the context. defaults: for what is not named.
    A grammar that is new is compiled here, which takes its time. markup: how the model writes what
    is no plain text.
    """
    try:
        params = read_params(body, defaults)
        if isinstance(body, ChatBody) and markup is not None:
            params = steer(params, model, body, markup, prompt.text)
        else:
            _compile(model, params, structured_field(body))
        if params.max_tokens is None:
            num_prompt = len(prompt.token_ids)
            room = model.engine.scheduler.max_total_tokens(num_prompt, None) - num_prompt
            params = replace(params, max_tokens=room)
        if body.use_beam_search:
            if params.structured_outputs is not None:
                field = structured_field(body)
                raise bad_request(f"{field} does not go with use_beam_search: leave one out", field)
            params = beam_params(body, params).sampling_params()
        model.engine.check_request(prompt.token_ids, params)  # reads only what never changes
    except InvalidArgumentError as error:
        raise to_api_error(error, body.prompt_field) from error
    return params


def steer(
    params: SamplingParams, model: LoadedModel, body: ChatBody, markup: Markup, prompt: str | None
) -> SamplingParams:
    """With a grammar of all that the answer is to be, where the body wants something of it.

    It is compiled here, if it is new. prompt: its text. Raises an ApiError for what cannot be
    followed.
    """
    given = params.structured_outputs
    asked = None if given is None else StructuredOutputs.of(given)
    try:
        params = replace(params, structured_outputs=answer_grammar(body, asked, markup, prompt))
        model.engine.grammars.of(params)
        return params
    except InvalidArgumentError as error:
        for field, part in parts_of(body, asked, markup):  # whose errors have places of their own
            _compile(model, replace(params, structured_outputs=part), field)
        raise to_api_error(error, structured_field(body) or "tools") from error


def _compile(model: LoadedModel, params: SamplingParams, field: str | None) -> None:
    try:
        model.engine.grammars.of(params)
    except InvalidArgumentError as error:
        raise to_api_error(error, field) from error


def read_params(body: SamplingBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """What the body asks for, whatever the model; an error names what octavo does not offer."""
    check_supported(body)
    check_beams(body)
    max_tokens = None if isinstance(body, ChatBody) else DEFAULT_COMPLETION_TOKENS
    asked: dict[str, Any] = {"max_tokens": max_tokens, **defaults}
    for each in fields(SamplingParams):
        if each.name not in type(body).model_fields:  # logits_processors: they are functions
            continue
        value = getattr(body, each.name)
        if value is not None:
            asked[each.name] = value
    if isinstance(body, ChatBody):
        asked["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        if body.max_completion_tokens is not None:
            asked["max_tokens"] = body.max_completion_tokens
    elif (
        isinstance(body, CompletionBody)
        and body.echo
        and (body.logprobs is not None or body.max_tokens == 0)
    ):
        asked["prompt_logprobs"] = max(body.logprobs or 0, body.prompt_logprobs or 0)
    asked["structured_outputs"] = structured_outputs(body)
    asked["logit_bias"] = _logit_bias(body.logit_bias or {})
    return SamplingParams(**asked)


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_request(
                f"logit_bias has the key {key!r}; expected token ids, as in {{'50256': -100}}",
                "logit_bias",
            )
    return {int(key): value for key, value in given.items()}
