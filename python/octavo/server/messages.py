"""Anthropic's Messages API: its bodies, and the chats that they are.

A body becomes a `ChatBody`, so that everything behind it is that of a chat. Errors name the fields
and the places of the body as it was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from octavo.prompts import EncodedPrompt
from octavo.server import prepare
from octavo.server.answers import Markup, Reading
from octavo.server.errors import bad_request
from octavo.server.fields import check_extra_fields
from octavo.server.protocol import AnswerBody, Body, ChatBody, FewTexts, Objects
from octavo.server.structured import structured_field

if TYPE_CHECKING:
    from octavo.model import LoadedModel

Block = tuple[str, dict[str, Any]]  # where it stands in the body, and the block itself
_STOPS = ("stop", "stop_sequence", "stop_strings", "stop_words")


class _Part(BaseModel):
    """An object within a body; fields that it does not know are ignored."""

    model_config = ConfigDict(extra="allow")


class Turn(_Part):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Objects


class ToolChoice(_Part):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Part):
    """Whether the model thinks before it answers. A budget cannot be enforced, and is ignored."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Part):
    """The JSON schema that the answer is to follow."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    """What the answer is to be; effort is for chat templates that read `reasoning_effort`."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensBody(Body):
    """POST /v1/messages/count_tokens: what makes the prompt."""

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: str | Objects | None = None
    tools: Objects | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the older name of output_config.format
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # What runs or keeps something at Anthropic's; refused.
    container: Any = None
    mcp_servers: Any = None
    # What changes no answer here.
    cache_control: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesBody(CountTokensBody, AnswerBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: FewTexts | None = None


def to_chat(body: CountTokensBody) -> tuple[ChatBody, str]:
    """The chat that `body` is, and the beginning of its answer, which the last message may give.

    Raises an ApiError for what octavo does not offer.
    """
    _check_fields(body)
    messages, begun = _conversation(body)
    chat: dict[str, Any] = {"model": body.model, "messages": messages}
    if isinstance(body, MessagesBody):
        asked = body.model_fields_set & AnswerBody.model_fields.keys()
        chat |= {name: getattr(body, name) for name in asked}
        chat |= {"stop": body.stop_sequences, "stream_options": {"include_usage": True}}
    extra = body.model_extra or {}
    chat |= {name: value for name, value in extra.items() if name not in ChatBody.model_fields}
    chat |= {"chat_template": body.chat_template, "chat_template_kwargs": _variables(body)}
    chat |= _output(body)
    if body.tools:
        chat["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        chat |= _choice(body.tool_choice, chat.get("tools", []))
    if body.thinking is not None and body.thinking.display == "omitted":
        chat["include_reasoning"] = False
    found = ChatBody.model_validate(chat)
    if begun:
        _check_beginning(body, found)
    return found, begun


def encode(model: LoadedModel, chat: ChatBody, markup: Markup, begun: str) -> EncodedPrompt:
    """The prompt. begun: the beginning of the answer, which the model goes on with."""
    prompt = prepare.encode_chat(model, chat, markup)
    if not begun or model.tokenizer is None:
        return prompt
    if markup.reasoning is not None and markup.reasoning.start(prompt.text) == "inside":
        raise bad_request(
            "messages ends with the assistant's, but with this chat template an answer begins with "
            'what the model thinks: end with the user\'s, or give "thinking": {"type": "disabled"}',
            "messages",
        )
    text = (prompt.text or "") + begun
    tokens = model.tokenizer.encode(text, False)
    return replace(prompt, text=text, token_ids=tokens, is_chat=False)  # a space may come first


def reading_of(chat: ChatBody, markup: Markup, prompt: EncodedPrompt, begun: str) -> Reading:
    """How the answer to this prompt is read: one that has begun is behind the thinking."""
    reading = prepare.reading_of(chat, markup, prompt.text)
    return replace(reading, start="behind") if begun else reading


def own_names(body: CountTokensBody) -> dict[str, str]:
    """Fields of the chat, and what they are in `body`."""
    numbers, field = range(len(body.tools or ())), _format_field(body)
    names = {f"tools[{i}].function.parameters": f"tools[{i}].input_schema" for i in numbers}
    return names if field is None else {**names, "response_format": field}


def _check_fields(body: CountTokensBody) -> None:
    own = type(body).model_fields
    elsewhere = {
        name: "it is a field of /v1/chat/completions"
        for name in ChatBody.model_fields
        if name not in MessagesBody.model_fields
    }
    elsewhere |= dict.fromkeys(_STOPS, "its name here is stop_sequences")
    extra = body.model_extra or {}
    given = {n: value for n, value in extra.items() if n not in MessagesBody.model_fields}
    given |= {n: getattr(body, n) for n in ("container", "mcp_servers", "stop") if n in own}
    refused = dict.fromkeys(("container", "mcp_servers"), "leave it out")
    check_extra_fields(
        {name: value for name, value in given.items() if value is not None},
        {**elsewhere, **refused},
    )
    if extra.get("parallel_tool_calls") is False:  # which asks for nothing where there are no tools
        raise bad_request(
            "parallel_tool_calls is not offered here: its name is "
            "tool_choice.disable_parallel_tool_use",
            "parallel_tool_calls",
        )
    if isinstance(body, MessagesBody):
        _check_one_answer(body)


def _check_one_answer(body: MessagesBody) -> None:
    """Raise an ApiError for what a message has no place for."""
    if body.num_answers != 1:
        raise bad_request(
            f"n is {body.n}, but a message is one answer: leave it out, or use "
            "/v1/chat/completions",
            "n",
        )
    if body.prompt_logprobs is not None:
        raise bad_request(
            "prompt_logprobs is given, but a message has no place for them: leave it out, or use "
            "/v1/chat/completions",
            "prompt_logprobs",
        )


def _check_beginning(body: CountTokensBody, chat: ChatBody) -> None:
    """Raise an ApiError where the whole answer is to follow a grammar, and a part is given."""
    field = structured_field(chat)
    if field is None and chat.tool_choice not in (None, "auto", "none"):
        field = "tool_choice"
    if field is not None:
        field = _format_field(body) or field
        raise bad_request(
            f"{field} says what the whole answer is, but messages ends with the assistant's, which "
            "is its beginning: leave one out",
            field,
        )


def _variables(body: CountTokensBody) -> dict[str, Any] | None:
    """Of the chat template; the switch for thinking among them, by the name that most have."""
    given = body.chat_template_kwargs
    if body.thinking is None:
        return given
    if given and "enable_thinking" in given:
        raise bad_request(
            "thinking is given beside chat_template_kwargs.enable_thinking: leave one out",
            "thinking",
        )
    return {**(given or {}), "enable_thinking": body.thinking.type != "disabled"}


def _format_field(body: CountTokensBody) -> str | None:
    """The field with the schema of the answer."""
    if body.output_config is not None and body.output_config.format is not None:
        return "output_config.format"
    return None if body.output_format is None else "output_format"


def _output(body: CountTokensBody) -> dict[str, Any]:
    """What `output_config` and its older form ask for, as a chat has it."""
    config, field = body.output_config or OutputConfig(), _format_field(body)
    found: dict[str, Any] = {} if config.effort is None else {"reasoning_effort": config.effort}
    wanted = config.format or body.output_format
    if wanted is not None:
        for other in ("output_format", "response_format"):
            if other != field and getattr(body, other, None) is not None:
                raise bad_request(f"{field} is given beside {other}: leave one out", field)
        schema = {"name": "answer", "schema": wanted.json_schema}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


def _tool(place: str, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise bad_request(
            f"{place} is of type {kind!r}, which is Anthropic's own; octavo has no such tools: "
            'expected one of yours, {"name": …, "description": …, "input_schema": {…}}',
            place,
        )
    function = {"name": _member(place, tool, "name", str)}
    function["parameters"] = _member(place, tool, "input_schema", dict)
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls` of a chat."""
    if choice.type in ("any", "tool") and not tools:
        raise bad_request(
            f"tool_choice is of type {choice.type!r}, but there are no tools", "tool_choice"
        )
    found: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        names = [tool["function"]["name"] for tool in tools]
        if choice.name not in names:
            raise bad_request(
                f"tool_choice.name is {choice.name!r}; expected the name of a tool ({names})",
                "tool_choice.name",
            )
        found = {"type": "function", "function": {"name": choice.name}}
    only_one = choice.disable_parallel_tool_use
    return {"tool_choice": found, "parallel_tool_calls": False if only_one else None}


def _conversation(body: CountTokensBody) -> tuple[list[dict[str, Any]], str]:
    """The messages of a chat, and the beginning of the answer. Turns of one role are one."""
    turns: list[tuple[str, list[Block]]] = []
    if body.system:
        turns.append(("system", _blocks("system", body.system)))
    for index, turn in enumerate(body.messages):
        place = f"messages[{index}].content"
        blocks = _blocks(place, turn.content)
        if not blocks and turn.role != "assistant":
            raise bad_request(f"{place} is empty; expected a text, or blocks", place)
        if turns and turns[-1][0] == turn.role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((turn.role, blocks))
    begun = ""
    if turns[-1][0] == "assistant":
        begun = _texts(turns.pop()[1], "to continue an answer")
    messages: list[dict[str, Any]] = []
    for role, blocks in turns:
        if role == "assistant":
            messages.append(_assistant(blocks))
        elif role == "user":
            messages += _user(blocks)
        else:
            messages.append({"role": "system", "content": _texts(blocks, "in a system message")})
    if not messages:
        raise bad_request(
            "messages is the beginning of an answer alone; expected the user's before it",
            "messages",
        )
    return messages, begun


def _assistant(blocks: Sequence[Block]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for place, block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(_member(place, block, "thinking", str))
        elif kind == "tool_use":
            function = {
                "name": _member(place, block, "name", str),
                "arguments": _member(place, block, "input", dict),
            }
            call_id = _member(place, block, "id", str)
            calls.append({"id": call_id, "type": "function", "function": function})
        elif kind != "redacted_thinking":  # which nobody here can read
            texts.append(_text(place, block, "in an answer"))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning"] = "\n".join(thoughts)
    return {**message, "tool_calls": calls} if calls else message


def _user(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Results of tools, each a message, before what the user says."""
    found, texts = [], []
    for place, block in blocks:
        if block.get("type") != "tool_result":
            texts.append(_text(place, block, "from the user"))
            continue
        inner = _blocks(f"{place}.content", block.get("content") or "")
        content = _texts(inner, "in the result of a tool")
        if block.get("is_error") is True:
            content = f"Error: {content}"
        call_id = _member(place, block, "tool_use_id", str)
        found.append({"role": "tool", "tool_call_id": call_id, "content": content})
    return [*found, {"role": "user", "content": "\n".join(texts)}] if texts else found


def _blocks(place: str, content: Any) -> list[Block]:
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise bad_request(f"{place} is malformed; expected a text, or a list of blocks", place)
    return [(f"{place}[{index}]", block) for index, block in enumerate(content)]


def _texts(blocks: Sequence[Block], where: str) -> str:
    return "\n".join(_text(place, block, where) for place, block in blocks)


def _text(place: str, block: dict[str, Any], where: str) -> str:
    kind = block.get("type")
    if kind != "text":
        raise bad_request(
            f"{place} is of type {kind!r}, which octavo does not take {where}: expected "
            '{"type": "text", "text": …}',
            place,
        )
    return str(_member(place, block, "text", str))


def _member(place: str, block: dict[str, Any], name: str, kind: type) -> Any:
    value = block.get(name)
    if not isinstance(value, kind) or (name in ("name", "id", "tool_use_id") and not value):
        expected = "an object" if kind is dict else "a text"
        given = "missing" if value is None else f"of type {type(value).__name__}"
        given = "empty" if value == "" else given
        raise bad_request(f"{place}.{name} is {given}; expected {expected}", f"{place}.{name}")
    return value
