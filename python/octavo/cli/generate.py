"""`octavo generate`: one prompt, its answer on stdout as it is made."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli import common
from octavo.cli.contrastive import Contrast, check_contrast, contrastive_params, refuse_others
from octavo.cli.options import (
    AdapterOption,
    ChatOption,
    EventLogOption,
    ModelOption,
    SystemOption,
    argument,
    engine_options,
    grouped,
    option,
    refuse_unused,
)
from octavo.cli.sampling_options import sampling_options
from octavo.cli.streams import silent_keys
from octavo.cli.structured import Structured, read_structured
from octavo.cli.wrap import AnswerWriter
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams
from octavo.search.params import BeamSearchParams
from octavo.text.places import TokenPlaces

if TYPE_CHECKING:
    from octavo.engine.outputs import CompletionOutput, OutputChunk, RequestOutput, TokenLogprob
    from octavo.llm import LLM
    from octavo.prompts import EncodedPrompt

_output = partial(option, panel="Output")
_search_option = partial(option, panel="Search")


@dataclass(frozen=True)
class Shown:
    """What of an answer is printed, and how."""

    json_output: Annotated[
        bool,
        option("Print JSON: text, token ids, usage, timings.", "--json"),
    ] = False
    special_tokens: Annotated[
        bool, _output("Show special tokens such as <|im_end|> in the text.", "--special-tokens")
    ] = False
    quiet: Annotated[
        bool, option("Leave out the line about speed at the end.", "--quiet", "-q")
    ] = False


@dataclass(frozen=True)
class Beams:
    """A search for the most probable answer."""

    beams: Annotated[
        int | None,
        _search_option(
            "Search with N beams, and print the best answer (with --json all of them).",
            "--beams",
            metavar="N",
        ),
    ] = None
    length_penalty: Annotated[
        float, _search_option("With --beams: above 0 long answers gain.", "--length-penalty")
    ] = 1.0


@engine_options("runner")
@sampling_options("logprobs", "prompt_logprobs", temperature=0.0)
@grouped
def generate(
    prompt: Annotated[
        str, argument('The question, or the text; "-" reads it from stdin.', "PROMPT")
    ],
    *,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    chat: ChatOption = None,
    system: SystemOption = None,
    config: EngineConfig,
    params: SamplingParams,
    structured: Structured,
    shown: Shown,
    search: Beams,
    contrast: Contrast,
    event_log: EventLogOption = None,
) -> int:
    """Answer one prompt, or continue a text.

    The answer goes to stdout as it is made, a line about its speed to stderr.

    [bold]octavo generate "What is the capital of France?"[/bold]

    [bold]octavo generate --raw "Once upon a time" -t 0.8 --max-tokens 100[/bold]

    [bold]octavo generate - --system "Summarize this letter." < letter.txt[/bold]

    [bold]octavo generate "Is water wet?" --choice yes --choice no[/bold]
    """
    params = replace(
        params,
        skip_special_tokens=not shown.special_tokens,
        structured_outputs=read_structured(structured),
    )
    _check_shown(shown, params)
    check_contrast(contrast, params, search.beams, adapter)
    refuse_unused(search, "length_penalty", search.beams is not None, "with --beams N")
    if search.beams is not None:  # refused before a model is loaded
        beam_search_params(search.beams, search.length_penalty, params)
    if system is not None and chat is False:
        raise InvalidArgumentError("--system does not go with --raw; leave out one of them")
    text = common.read_prompt(prompt)
    start = time.monotonic()
    llm = common.load_llm(model, config, {adapter: adapter} if adapter else None)
    load_seconds = time.monotonic() - start
    encoded = encode(llm, text, chat, system)
    searching = _searching(llm, encoded, params, search, contrast, adapter)
    writer = None
    if not (shown.json_output or params.n > 1 or searching):
        writer = AnswerWriter(sys.stdout)
        if not encoded.is_chat and sys.stdout.isatty():
            _show_dim(text, writer)  # the prompt and its continuation are one text: so is this
    with silent_keys():
        if searching is not None:
            result, interrupted = _search(searching)
        else:
            chunks, interrupted = _collect(llm, encoded, params, writer, adapter)
            result = next((chunk.result for chunk in chunks if chunk.result is not None), None)
    if event_log is not None:
        llm.engine.events.write(event_log)
    if result is None:
        return common.INTERRUPTED if interrupted else common.FAILED
    if shown.json_output:
        _print_json(_record(llm, result, params, encoded.is_chat, load_seconds))
    elif searching is not None:
        print(common.printable(result.text, sys.stdout))
    elif params.n > 1:
        _print_answers(result)
    if not shown.quiet:
        common.note(_closing_line(result, params, llm.max_model_len))
    if result.error is not None:
        common.print_error(result.error)
        return common.FAILED
    return 0


def _check_shown(shown: Shown, params: SamplingParams) -> None:
    """InvalidArgumentError for what --json alone can show."""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None and not shown.json_output:
            flag = "--" + name.replace("_", "-")
            raise InvalidArgumentError(f"{flag} is shown with --json only; add --json")


def encode(llm: LLM, text: str, chat: bool | None, system: str | None = None) -> EncodedPrompt:
    """The prompt as the model sees it; chat None: with the chat template if the model has one."""
    if llm.chat_template is None and (chat or system is not None):
        raise InvalidArgumentError(
            f"this model has no chat template (it is a base model): leave out "
            f"{'--chat' if chat else '--system'}, or use a model that was trained to chat"
        )
    if chat is None:
        chat = llm.chat_template is not None
    if not chat:
        return llm.encode_prompt(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return llm.encode_chat(messages)


def _show_dim(prompt: str, writer: AnswerWriter) -> None:
    from rich.console import Console

    dim, plain = ("", "") if Console().is_dumb_terminal else ("\x1b[2m", "\x1b[0m")
    sys.stdout.write(dim)
    writer.write(common.printable(prompt, sys.stdout))
    writer.end()
    sys.stdout.write(plain)


def _collect(
    llm: LLM,
    prompt: EncodedPrompt,
    params: SamplingParams,
    writer: AnswerWriter | None,
    adapter: str | None,
) -> tuple[list[OutputChunk], bool]:
    """All chunks, shown as they come if there is a writer, and whether Ctrl-C ended them."""
    chunks = []
    interrupted = False
    stream = llm.stream(prompt, params, adapter=adapter)
    try:
        for chunk in stream:
            chunks.append(chunk)
            if writer is not None and chunk.text:
                writer.write(common.printable(chunk.text, sys.stdout))
    except KeyboardInterrupt:
        interrupted = True
    if writer is not None:
        writer.end()
        sys.stdout.write("\n")
        sys.stdout.flush()
    return chunks, interrupted


def beam_search_params(
    beams: int, length_penalty: float, params: SamplingParams
) -> BeamSearchParams:
    """--beams with the options that go with it; an error names one that does not."""
    found = BeamSearchParams(
        beams,
        params.max_tokens or SamplingParams().max_tokens or 1,
        length_penalty,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        skip_special_tokens=params.skip_special_tokens,
    )
    plain = replace(found.sampling_params(), max_tokens=params.max_tokens, seed=params.seed)
    refuse_others(
        params, plain, "--beams", "beam search takes the most probable answers as they are"
    )
    return found


def _searching(
    llm: LLM,
    prompt: EncodedPrompt,
    params: SamplingParams,
    search: Beams,
    contrast: Contrast,
    adapter: str | None,
) -> Callable[..., list[RequestOutput]] | None:
    """What searches for the answer, by --beams or --amateur; None: it is sampled."""
    if search.beams is not None:
        beams = beam_search_params(search.beams, search.length_penalty, params)
        return partial(llm.beam_search, prompt, beams, adapter=adapter)
    if contrast.amateur is not None:
        found = contrastive_params(contrast.alpha, params)
        return partial(llm.contrastive_decoding, prompt, contrast.amateur, found)
    return None


def _search(search: Callable[..., list[RequestOutput]]) -> tuple[RequestOutput | None, bool]:
    """The result, and whether Ctrl-C ended it."""
    try:
        (result,) = search(progress=False)
    except KeyboardInterrupt:
        return None, True
    return result, False


def _print_answers(result: RequestOutput) -> None:
    for answer in result.outputs:
        print(f"--- answer {answer.index + 1} of {len(result.outputs)} ---")
        print(common.printable(answer.text, sys.stdout))


def _closing_line(result: RequestOutput, params: SamplingParams, max_model_len: int) -> str:
    line = common.speed_line(result.metrics)
    if params.temperature > 0:
        line += f" · seed {params.seed}"
    if params.max_tokens != 0 and any(each.finish_reason == "length" for each in result.outputs):
        at_limit = any(len(a.token_ids) == params.max_tokens for a in result.outputs)
        limit = f"--max-tokens {params.max_tokens}" if at_limit else f"context of {max_model_len}"
        line += f" · cut off ({limit})"
    return line


def _record(
    llm: LLM, result: RequestOutput, params: SamplingParams, is_chat: bool, load_seconds: float
) -> dict[str, Any]:
    """What --json prints. The first answer stands at the top; all of them under "answers"."""
    metrics = result.metrics
    answers = [
        _answer(
            TokenPlaces(llm.tokenizer, params.skip_special_tokens, continues=not is_chat), answer
        )
        for answer in result.outputs
    ]
    return {
        "prompt": result.prompt,
        "prompt_token_ids": list(result.prompt_token_ids),
        **{key: value for key, value in answers[0].items() if key != "index"},
        **({"answers": answers} if len(result.outputs) > 1 else {}),
        **({} if result.prompt_logprobs is None else {"prompt_logprobs": _of_prompt(llm, result)}),
        "seed": params.seed,
        "error": result.error,
        "usage": {
            "prompt_tokens": metrics.num_prompt_tokens,
            "completion_tokens": metrics.num_output_tokens,
            "total_tokens": metrics.num_prompt_tokens + metrics.num_output_tokens,
        },
        "timings": {
            "load_seconds": round(load_seconds, 4),
            "time_to_first_token_seconds": _rounded(metrics.time_to_first_token),
            "total_seconds": _rounded(metrics.total_time),
            "tokens_per_second": _rounded(metrics.tokens_per_second),
        },
    }


def _print_json(record: dict[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # the locale lacks these characters: written as \\uXXXX none is lost
        line = json.dumps(record)
    print(line)


def _answer(places: TokenPlaces, answer: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": answer.index,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        record["cumulative_logprob"] = answer.cumulative_logprob
        record["logprobs"] = [_logprob(places, entry) for entry in answer.logprobs]
    return record


def _of_prompt(llm: LLM, result: RequestOutput) -> list[dict[str, Any] | None]:
    """An entry for each token of the prompt; None for the first, which has nothing before it."""
    places = TokenPlaces(llm.tokenizer, False, continues=False)
    found: list[dict[str, Any] | None] = []
    for token, entry in zip(result.prompt_token_ids, result.prompt_logprobs or (), strict=True):
        if entry is None:
            places.advance(token)
            found.append(None)
        else:
            found.append(_logprob(places, entry) | {"rank": entry.rank})
    return found


def _logprob(places: TokenPlaces, entry: TokenLogprob) -> dict[str, Any]:
    record = {
        "token_id": entry.token_id,
        "token": places.name(entry.token_id),
        "logprob": entry.logprob,
        "top": [
            {"token_id": token, "token": places.name(token), "logprob": logprob}
            for token, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        ],
    }
    places.advance(entry.token_id)
    return record


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
