"""`octavo generate`: one prompt, its answer on stdout as it is made."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from octavo.cli import common
from octavo.cli.answer_json import Split, print_json, record_of
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
from octavo.cli.thinking import ShownAnswer, Thinker, Thinking, cut_off
from octavo.cli.wrap import AnswerWriter, dimmed
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams
from octavo.search.params import BeamSearchParams

if TYPE_CHECKING:
    from octavo.engine.outputs import OutputChunk, RequestOutput
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
    thinking: Thinking,
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
    if chat is False:
        refuse_unused(thinking, "think hide_thinking", False, "without --raw")
        if system is not None:
            raise InvalidArgumentError("--system does not go with --raw; leave out one of them")
    text = common.read_prompt(prompt)
    start = time.monotonic()
    llm = common.load_llm(model, config, {adapter: adapter} if adapter else None)
    load_seconds = time.monotonic() - start
    thinker = Thinker(llm, thinking)
    encoded = encode(llm, thinker, text, chat, system)
    params = thinker.steer(params, encoded)
    searching = _searching(llm, encoded, params, search, contrast, adapter)
    answer = None
    if not (shown.json_output or params.n > 1 or searching):
        writer = AnswerWriter(sys.stdout)
        if not encoded.is_chat and sys.stdout.isatty():
            with dimmed(sys.stdout):  # the prompt and its continuation are one text: so is this
                writer.write(common.printable(text, sys.stdout))
                writer.end()
        answer = thinker.shown(encoded, writer)
    with silent_keys():
        if searching is not None:
            result, interrupted = _search(searching)
        else:
            chunks, interrupted = _collect(llm, encoded, params, answer, adapter)
            result = next((chunk.result for chunk in chunks if chunk.result is not None), None)
    if event_log is not None:
        llm.engine.events.write(event_log)
    if result is None:
        return common.INTERRUPTED if interrupted else common.FAILED
    split = partial(thinker.split, encoded)
    if shown.json_output:
        print_json(record_of(llm, result, params, encoded.is_chat, load_seconds, split))
    elif answer is None:
        _print_answers(result, params.n, partial(thinker.shown, encoded))
    if not shown.quiet:
        common.note(_closing_line(result, params, llm.max_model_len, split))
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


def encode(
    llm: LLM, thinker: Thinker, text: str, chat: bool | None, system: str | None = None
) -> EncodedPrompt:
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
    return thinker.encode(messages)


def _collect(
    llm: LLM,
    prompt: EncodedPrompt,
    params: SamplingParams,
    answer: ShownAnswer | None,
    adapter: str | None,
) -> tuple[list[OutputChunk], bool]:
    """All chunks, shown as they come in `answer`, and whether Ctrl-C ended them."""
    chunks = []
    interrupted = False
    stream = llm.stream(prompt, params, adapter=adapter)
    try:
        for chunk in stream:
            chunks.append(chunk)
            if answer is not None:
                answer.write(chunk.text)
    except KeyboardInterrupt:
        interrupted = True
    if answer is not None:
        answer.end()
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


def _print_answers(
    result: RequestOutput, count: int, show: Callable[[AnswerWriter], ShownAnswer]
) -> None:
    """The first answers, so many of them."""
    for answer in result.outputs[:count]:
        if count > 1:
            print(f"--- answer {answer.index + 1} of {count} ---", flush=True)
        shown = show(AnswerWriter(sys.stdout))
        shown.write(answer.text)
        shown.end()


def _closing_line(
    result: RequestOutput, params: SamplingParams, max_model_len: int, split: Split
) -> str:
    line = common.speed_line(result.metrics)
    if params.temperature > 0:
        line += f" · seed {params.seed}"
    long = [each for each in result.outputs if each.finish_reason == "length"]
    if params.max_tokens != 0 and long:
        at_limit = any(len(a.token_ids) == params.max_tokens for a in result.outputs)
        limit = f"--max-tokens {params.max_tokens}" if at_limit else f"context of {max_model_len}"
        line += f" · {cut_off(*split(long[0].text))} ({limit})"
    return line
