"""Bodies of requests, as OpenAI and vLLM have them; every field that clients send is checked here.

A field that octavo does not offer is refused where it would change the answer (`check_supported`).
A field that no API has is ignored, as vLLM does; `slips` finds the one that was meant.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from octavo.engine.admission import MAX_PRIORITY
from octavo.sampling_params import MAX_LOGPROBS, SamplingParams
from octavo.server.errors import bad_request
from octavo.server.fields import check_extra_fields, unknown_fields

MAX_N = 128  # answers to one request; OpenAI's limit
MAX_PROMPTS = 2048  # prompts in one request; OpenAI's limit of texts to embed
MAX_BAD_WORDS = 1024
MAX_STOP = 32  # stop strings, each of which costs time for every character
MAX_BIASES = 4096  # tokens of logit_bias, which are sorted anew for each answer

# fail_fast: a list of a million wrong entries is one error, and not a million.
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[
        list[Annotated[list[TokenId], Field(fail_fast=True)]],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
    ]
)
FewTexts = Annotated[list[str], Field(max_length=MAX_STOP, fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
TokenLimit = Literal[-1] | Annotated[int, Field(ge=0)]  # -1: as many as fit


class Body(BaseModel):
    """What every body has in common."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = Field(None, description="A served name; left out: the model served.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}


class PromptBody(Body):
    """What every body with prompts has, whatever is made of them."""

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    stream: bool | None = None

    prompt_field: ClassVar[str] = "prompt"


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _as_params_have_them() -> dict[str, Any]:
    """Fields of SamplingParams that are numbers within limits, or switches."""
    found: dict[str, Any] = {}
    for each in fields(SamplingParams):
        limits = each.metadata.get("limits")
        if each.name in ("max_tokens", "n", "logprobs"):
            continue
        if limits is not None:
            number = Field(None, ge=limits.low, le=limits.high)
            found[each.name] = (type(limits.low) | None, number)
        elif isinstance(each.default, bool):
            found[each.name] = (bool | None, None)
    return found


if TYPE_CHECKING:

    class _Options(PromptBody):
        skip_special_tokens: bool | None
        ignore_eos: bool | None
        prompt_logprobs: int | None

else:
    _Options = create_model("_Options", __base__=PromptBody, **_as_params_have_them())


class SamplingBody(_Options):
    """Fields that chat and completions share; `octavo.SamplingParams` says what they mean."""

    max_tokens: TokenLimit | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: str | FewTexts | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    dry_sequence_breakers: FewTexts | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_beam_groups: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    diversity_penalty: Annotated[float, Field(ge=0, le=100)] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _has_few_entries(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_BIASES:
            raise ValueError(
                f"it has {len(value)} entries; expected at most {MAX_BIASES} (allowed_token_ids "
                "takes any number)"
            )
        return value

    @property
    def num_answers(self) -> int:
        """How many answers a prompt gets."""
        return 1 if self.n is None else self.n


class AnswerBody(SamplingBody):
    """Fields of chats, and of what becomes a chat, that say how an answer is shown."""

    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_format: Literal["auto", "none", "deepseek"] | None = None


class Message(BaseModel):
    """One turn of a conversation; more fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[Any] | None = None


class ChatFields(Body):
    """A conversation and how its prompt is made."""

    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Field(fail_fast=True)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: Objects | None = None
    documents: Objects | None = None


class ChatBody(ChatFields, AnswerBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: Literal[-1] | Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None

    # Whether calls of tools that do not say `strict` follow their schemas, as far as that goes.
    follows_schemas: ClassVar[bool] = False


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompts
    add_special_tokens: bool = True
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_asks_for_none(cls, value: Any) -> Any:
        return None if value is False else value  # and not for the best 0


class TokenizeCompletionBody(Body):
    """POST /tokenize with a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatFields):
    """POST /tokenize with a conversation."""

    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


class UnloadAdapterBody(BaseModel):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_int_id: int | None = None


class LoadAdapterBody(UnloadAdapterBody):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


def slips(body: Body) -> dict[str, str | None]:
    """Fields that no API has, each with the one that may have been meant."""
    known = {**ChatBody.model_fields, **CompletionBody.model_fields, **type(body).model_fields}
    found = unknown_fields([n for n in body.model_extra or {} if n not in known], known)
    options = body.stream_options if isinstance(body, SamplingBody) else None
    if options is not None:
        inner = unknown_fields(options.model_extra or {}, StreamOptions.model_fields)
        found |= {f"stream_options.{name}": meant for name, meant in inner.items()}
    return found


def check_supported(body: SamplingBody) -> None:
    """Raise an ApiError for the first thing that was asked for and that octavo does not offer.

    A field whose value asks for nothing, as null does, is accepted.
    """
    is_chat = isinstance(body, ChatBody)
    other, path = (CompletionBody, "completions") if is_chat else (ChatBody, "chat/completions")
    elsewhere = dict.fromkeys(other.model_fields, f"it is a field of /v1/{path}")
    if not is_chat:
        elsewhere["max_completion_tokens"] = "its name here is max_tokens"
        elsewhere["top_logprobs"] = "logprobs is the number of them here"
    check_extra_fields(body.model_extra or {}, elsewhere)
    if body.stream and body.prompt_logprobs is not None:
        raise bad_request(
            "stream is true, but with prompt_logprobs the answer is sent whole: leave stream out",
            "stream",
        )
    if isinstance(body, CompletionBody):
        if body.suffix:
            raise bad_request("suffix is not offered by octavo: leave it out", "suffix")
        if body.best_of is not None and body.best_of != body.num_answers:
            raise bad_request(f"best_of is {body.best_of}; expected n, or nothing", "best_of")
        if body.stream and body.echo and body.logprobs is not None:
            raise bad_request(
                "stream is true, but with echo and logprobs the answer is sent whole: leave stream "
                "out",
                "stream",
            )
    if isinstance(body, ChatBody):
        if body.echo:
            raise bad_request("echo is not offered for a conversation: leave it out", "echo")
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs is given, so logprobs must be true", "top_logprobs")
