"""The body of OpenAI's Responses API, and the conversation that it asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from octavo.sampling_params import MAX_LOGPROBS
from octavo.server.errors import bad_request
from octavo.server.fields import check_extra_fields
from octavo.server.formats import to_json
from octavo.server.protocol import AnswerBody, ChatBody, Objects
from octavo.server.responses_input import Talk

LOGPROBS = "message.output_text.logprobs"
# What `include` may name. But for LOGPROBS nothing here makes what they ask for.
_INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "file_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)
_STATELESS = "nothing is stored here, so send the earlier items in input"
_LENGTH, _CHAT = "its name here is max_output_tokens", "it is a field of /v1/chat/completions"
# Fields that are no fields here, and what to do instead.
_INSTEAD = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "background": "wait for the answer, or stream it",
    "prompt": "this server has no stored prompts, so write its text into instructions and input",
    "context_management": "leave out what is too long",
    "moderation": "leave it out",
    "messages": "its name here is input",
    "response_format": "its name here is text.format",
    "verbosity": "leave it out",
    "reasoning_effort": "its name here is reasoning.effort",
    "logprobs": f"its name here is include, as in [{LOGPROBS!r}]",
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), _LENGTH),
    **dict.fromkeys(("prompt_logprobs", "prompt_logprobs_start"), _CHAT),
}
# A chat's names for what has another one here.
_OWN_NAMES = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class TextOptions(BaseModel):
    """What the text is to be."""

    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(BaseModel):
    """How much is thought; summaries of it are not made."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None
    summary: str | None = None


class ResponsesBody(AnswerBody):
    """POST /v1/responses."""

    input: str | Objects
    instructions: str | None = None
    max_output_tokens: Literal[-1] | Annotated[int, Field(ge=1)] | None = None
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncation: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Objects | None = None

    def echo(self) -> dict[str, Any]:
        """The fields of a response that repeat what was asked for, as UTF-8 can write it."""
        text = self.text or TextOptions()
        reasoning = self.reasoning or ReasoningOptions()
        choice, parallel = self.tool_choice, self.parallel_tool_calls
        found = {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": True if parallel is None else parallel,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": False,
            "text": {"format": text.format or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": "auto" if choice is None else choice,
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "user": self.user,
        }
        data = to_json(found).encode(errors="replace")
        return dict(json.loads(data, parse_constant=lambda _: None))


class _ChatOfResponse(ChatBody):
    """A conversation that came as the input of a response."""

    prompt_field: ClassVar[str] = "input"
    follows_schemas: ClassVar[bool] = True  # this API's default


@dataclass(frozen=True)
class Translation:
    """The conversation that a body asks for.

    names: fields and parts of the conversation, as errors name them, and what they are in the body.
    """

    chat: ChatBody
    names: dict[str, str]


def translate(body: ResponsesBody) -> Translation:
    """The conversation that the body asks for. Raises an ApiError for what is not offered."""
    _check_supported(body)
    talk = Talk(body.instructions)
    if isinstance(body.input, str):
        talk.add({"role": "user", "content": body.input}, "input")
    elif not body.input:
        raise bad_request("input is an empty list; expected a text, or a list of items", "input")
    else:
        for index, item in enumerate(body.input):
            talk.add(item, f"input[{index}]")
    functions, choice = _tools(body)
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    shared = set(AnswerBody.model_fields) - {"n", "max_tokens", "response_format"}
    fields = {
        **{name: getattr(body, name) for name in shared},
        "messages": talk.messages,
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "response_format": _response_format(body),
        "tools": list(functions.values()) or None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "logprobs": LOGPROBS in (body.include or ()) or None,
        "top_logprobs": body.top_logprobs,
        "chat_template": body.chat_template,
        "chat_template_kwargs": body.chat_template_kwargs,
        "documents": body.documents,
        "stream_options": {"include_usage": True},  # the last event has it
    }
    chat = _ChatOfResponse.model_validate(fields)
    tools = {f"tools[{i}].function": f"tools[{number}]" for i, number in enumerate(functions)}
    return Translation(chat, {**_OWN_NAMES, **talk.places, **tools})


def _check_supported(body: ResponsesBody) -> None:
    elsewhere = {**dict.fromkeys(ChatBody.model_fields, _CHAT), **_INSTEAD}
    own = {name: getattr(body, name) for name in _INSTEAD if name in AnswerBody.model_fields}
    for name, value in own.items():
        if value is not None:
            raise bad_request(f"{name} is not offered here: {_INSTEAD[name]}", name)
    check_extra_fields(body.model_extra or {}, elsewhere)
    if body.num_answers != 1:
        raise bad_request(f"n is {body.n}; expected 1: a response is one answer", "n")
    if body.truncation not in (None, "disabled"):
        raise bad_request(
            f"truncation is {body.truncation!r}; expected 'disabled': what is too long is refused, "
            "and nothing is left out of it",
            "truncation",
        )
    for index, name in enumerate(body.include or ()):
        if name not in _INCLUDABLE:
            raise bad_request(
                f"include[{index}] is {name!r}; expected one of {', '.join(_INCLUDABLE)}",
                f"include[{index}]",
            )
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise bad_request(
            f"top_logprobs is given, so include must hold {LOGPROBS!r}", "top_logprobs"
        )
    verbosity = body.text and body.text.verbosity
    if verbosity not in (None, "medium"):
        raise bad_request(
            f"text.verbosity is {verbosity!r}, which is not offered by octavo: leave it out, and "
            "say in instructions how long the answer is to be",
            "text.verbosity",
        )


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    """text.format as a conversation has it."""
    given = (body.text and body.text.format) or {"type": "text"}
    kind = given.get("type")
    if kind in ("text", "json_object"):
        return {"type": kind}
    name, schema = given.get("name"), given.get("schema")
    if kind != "json_schema" or not isinstance(schema, dict) or not isinstance(name, str):
        found = f"of type {kind!r}"
        if kind == "json_schema":
            found = "without a name" if isinstance(schema, dict) else "without a schema"
        raise bad_request(
            f"text.format is {found}; expected {{'type': 'text'}}, {{'type': 'json_object'}} or "
            "{'type': 'json_schema', 'name': …, 'schema': {…}}",
            "text.format",
        )
    inner = {"name": name, "schema": schema, "strict": given.get("strict")}
    return {"type": "json_schema", "json_schema": inner}


def _tools(body: ResponsesBody) -> tuple[dict[int, dict[str, Any]], str | dict[str, Any] | None]:
    """The tools that may be called, as a conversation has them, by their numbers; and the choice.

    The choice is one of "none", "auto", "required", None, or has the name of one of the tools.
    """
    functions = {number: _function(tool, number) for number, tool in enumerate(body.tools or ())}
    names = {tool["function"]["name"]: number for number, tool in functions.items()}
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return functions, choice
    kind = choice.get("type")
    if kind == "function" and isinstance(choice.get("name"), str) and choice["name"] in names:
        return functions, choice
    if kind == "allowed_tools" and choice.get("mode") in ("auto", "required"):
        tools = choice.get("tools")
        allowed = [
            names.get(str(tool.get("name"))) if isinstance(tool, dict) else None
            for tool in (tools if isinstance(tools, list) else ())
        ]
        if allowed and None not in allowed:
            kept = {number: tool for number, tool in functions.items() if number in allowed}
            return kept, str(choice["mode"])
    raise bad_request(
        f"tool_choice is {choice!r}; expected 'none', 'auto', 'required', {{'type': 'function', "
        "'name': …} or {'type': 'allowed_tools', 'mode': …, 'tools': […]} with names of tools "
        f"({list(names)})",
        "tool_choice",
    )


def _function(tool: dict[str, Any], number: int) -> dict[str, Any]:
    place, kind = f"tools[{number}]", tool.get("type")
    if kind != "function":
        raise bad_request(
            f"{place} is of type {kind!r}, but this server runs no tools: give a tool of type "
            "'function' that does the same, and answer its calls",
            place,
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise bad_request(
            f'{place} has no name; expected {{"type": "function", "name": …, "parameters": …}}',
            f"{place}.name",
        )
    kinds = {"name": str, "description": str, "parameters": dict, "strict": bool}
    function = {name: tool[name] for name in kinds if tool.get(name) is not None}
    for name, value in function.items():
        if not isinstance(value, kinds[name]):
            wrong = f"{place}.{name} is of type {type(value).__name__}"
            raise bad_request(f"{wrong}; expected {kinds[name].__name__}", f"{place}.{name}")
    return {"type": "function", "function": function}
