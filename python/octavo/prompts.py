"""Prompts as `LLM` takes them: texts, token ids or conversations, one or many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, cast

from octavo.errors import InvalidArgumentError, TokenizerError
from octavo.sampling_params import SamplingParams

T = TypeVar("T")
U = TypeVar("U")
Conversation = Sequence[Mapping[str, Any]]
"""Messages as in OpenAI's API: {"role": ..., "content": ...}."""


class TokensPrompt(TypedDict):
    """The ids of a prompt's tokens, as vLLM's users write them."""

    prompt_token_ids: Sequence[int]


class TextPrompt(TypedDict):
    """A prompt's text, as vLLM's users write it."""

    prompt: str


@dataclass(frozen=True)
class LoRARequest:
    """A LoRA adapter as vLLM's users name it: a name, a number (not used), and PEFT's folder."""

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""


Prompt = str | Sequence[int] | Mapping[str, Any]
"""One prompt: text, the ids of its tokens, or an object with either, as vLLM has it."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the engine.

    is_chat: it came out of a chat template. kept_special_ids: special tokens that the answer's text
    holds even where the others are skipped, such as the tags around calls of tools.
    Raises InvalidArgumentError for token_ids that are no sequence.
    """

    text: str | None
    token_ids: Sequence[int]
    is_chat: bool = False
    kept_special_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        try:
            is_sequence = len(self.token_ids) >= 0 and hasattr(self.token_ids, "__getitem__")
        except TypeError:
            is_sequence = False
        if not is_sequence:
            raise InvalidArgumentError(
                f"the prompt is {self.token_ids!r}; expected a text, token ids, or an object with "
                f"either"
            )


AnyPrompt = Prompt | Conversation | EncodedPrompt


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[bool, list[Prompt]]:
    """(whether a list of prompts was given, the prompts); InvalidArgumentError for neither."""
    if isinstance(prompts, (str, Mapping)):
        return False, [prompts]
    try:
        items = list(prompts)
    except TypeError:
        raise InvalidArgumentError(
            f"prompts is {prompts!r}; expected a text, token ids, or a list of either"
        ) from None
    is_number = bool(items) and items[0] is not None and not hasattr(items[0], "__len__")
    if is_number:  # one prompt's token ids
        return False, [cast("Prompt", items)]
    return True, cast("list[Prompt]", items)


def split_conversations(
    messages: Conversation | Sequence[Conversation],
) -> tuple[bool, Sequence[Conversation]]:
    """(whether a list of conversations was given, these); InvalidArgumentError for no list."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgumentError(
            f"messages is {messages!r}; expected a list of messages, as [{{'role': 'user', "
            f"'content': 'Hello'}}], or a list of such lists"
        )
    many = bool(messages) and not isinstance(messages[0], Mapping)
    return many, cast("Sequence[Conversation]", messages if many else [messages])


def prompt_of(given: Mapping[str, Any]) -> str | Sequence[int]:
    """A prompt as vLLM's users write it: {"prompt": text} or {"prompt_token_ids": ids}."""
    if "role" in given:
        raise InvalidArgumentError("the prompt is a message of a conversation: use chat")
    found = {name: value for name, value in given.items() if value is not None}
    ids = found.pop("prompt_token_ids", None)  # beside a text, they are that text
    prompt = found.pop("prompt", None)
    if found or (ids is None and not isinstance(prompt, str)):
        raise InvalidArgumentError(
            f"the prompt is an object with {', '.join(map(repr, given)) or 'nothing in it'}; "
            'expected {"prompt": a text} or {"prompt_token_ids": numbers}'
        )
    result: str | Sequence[int] = prompt if ids is None else ids
    return result


def one_of(
    params: SamplingParams | Sequence[SamplingParams] | None,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
) -> SamplingParams | Sequence[SamplingParams] | None:
    """The parameters under one of their two names; InvalidArgumentError for both."""
    if params is not None and sampling_params is not None:
        raise InvalidArgumentError(
            "params and sampling_params are both given; expected one of them"
        )
    return sampling_params if params is None else params


def params_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """The parameters of each prompt; InvalidArgumentError if they are none, or not as many."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    is_list = isinstance(params, Iterable) and not isinstance(params, Mapping)
    each: list[Any] = list(params) if is_list else [params]
    if wrong := [one for one in each if not isinstance(one, SamplingParams)]:
        raise InvalidArgumentError(f"params is {wrong[0]!r}; expected SamplingParams(...)")
    if len(each) != count:
        raise InvalidArgumentError(
            f"params has {len(each)} entries for {count} prompts; expected one for all, or one "
            f"for each"
        )
    return each


def for_each(items: Iterable[T], function: Callable[[T], U], what: str | None) -> list[U]:
    """The function's results. what: an error says which one of these is bad; None: there is one."""
    results = []
    for index, item in enumerate(items):
        try:
            results.append(function(item))
        except (InvalidArgumentError, TokenizerError) as error:
            if what is None:
                raise
            raise type(error)(f"{what} {index}: {error}") from error
    return results
