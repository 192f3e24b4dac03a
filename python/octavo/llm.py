"""The blocking API: a model in memory, prompts in, answers out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from octavo.config import EngineConfig
from octavo.engine.adapters import AdapterTable
from octavo.engine.engine import Engine
from octavo.engine.outputs import OutputChunk, RequestOutput, refused_output
from octavo.engine.pooling import EMBED, EmbeddingRequestOutput, embedding_output
from octavo.engine.request import derive_seed
from octavo.engine.search import Search
from octavo.engine.shared import Asked, Call, SharedEngine, SharedIterator
from octavo.errors import (
    EngineClosedError,
    InvalidArgumentError,
    TokenizerError,
    WrongProcessError,
)
from octavo.model import LoadedModel, load_model
from octavo.progress import Advance, request_bar
from octavo.prompts import (
    AnyPrompt,
    Conversation,
    EncodedPrompt,
    LoRARequest,
    Prompt,
    for_each,
    one_of,
    params_for_each,
    split_conversations,
    split_prompts,
)
from octavo.sampling_params import SamplingParams
from octavo.search.contrastive import Amateur, ContrastiveDecoding, ContrastiveParams
from octavo.search.params import BeamSearchParams
from octavo.vllm_names import no_such_method

if TYPE_CHECKING:
    from octavo.runtime.loader import LoadProgress
    from octavo.text.chat import ChatTemplate
    from octavo.text.tokenizer import Tokenizer
    from octavo.weights.model_files import ModelFiles

T = TypeVar("T")
Item = (
    tuple[Hashable, AnyPrompt, SamplingParams]
    | tuple[Hashable, AnyPrompt, SamplingParams, str | None]
)


class LLM(LoadedModel):
    """A model in memory.

        llm = LLM("smollm2-135m", max_model_len=2048)
        for output in llm.generate(["Once upon a time", "2 + 2 ="], SamplingParams(max_tokens=32)):
            print(output.text)

    Any number of threads may ask one LLM at a time, by any of its methods; their requests share the
    steps. Iterators may be read and closed by any thread. An error of a step is raised in the calls
    whose requests were in it, Ctrl-C ends the main thread's call; the others go on.

    Requests that name no seed draw theirs from `EngineConfig.seed` and the number of the request,
    so a program that is run again gives the same texts. The requests of one `generate` or `chat`
    have numbers that follow each other. The order of several threads' requests is a matter of
    chance: name seeds where it matters.

    A process that was forked after loading cannot ask: every method raises a WrongProcessError
    there. A program that drives `engine` itself, as the server does, must be its only user.
    """

    def __init__(
        self,
        model: str | Path | ModelFiles | None = None,
        *,
        config: EngineConfig | None = None,
        on_load: LoadProgress | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> None:
        """Load a model.

        model: a Hugging Face directory, a GGUF file (any part of a split one), the name of a pulled
        model, or what `read_model` has read of one; None takes smollm2-135m.
        config, or its fields as options: see `EngineConfig`; options win over config.
        on_load: called with the bytes loaded so far and in all.
        adapters: LoRA adapters, name -> folder that PEFT wrote, at most max_adapters of them.
        Raises ModelNotFoundError, UnsupportedModelError, WeightsError, TokenizerError,
        InsufficientMemoryError, or InvalidArgumentError.
        """
        loaded = load_model(model, config=config, on_load=on_load, adapters=adapters, **options)
        self._set_up(loaded.engine, loaded.chat_template, loaded.config, loaded.notes)

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        chat_template: ChatTemplate | None = None,
        config: EngineConfig | None = None,
    ) -> LLM:
        """The same API over an engine that was built by hand."""
        llm = cls.__new__(cls)
        llm._set_up(engine, chat_template, config or EngineConfig(seed=engine.seed))
        return llm

    def _set_up(
        self,
        engine: Engine,
        chat_template: ChatTemplate | None,
        config: EngineConfig,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(engine, chat_template, config, notes)
        self._shared = SharedEngine(engine)
        self._bar_turn = threading.Lock()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of weights and cache. Whoever asks afterwards gets an EngineClosedError.

        Waits for the step that another thread is in; its requests get that error, too.
        """
        with suppress(EngineClosedError):
            self.between_steps(lambda engine: engine.close())

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; a TokenizerError where its directory has none."""
        return self._need_tokenizer()

    def __reduce__(self) -> NoReturn:
        raise WrongProcessError(self.engine.guard.pid, None)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        adapter: str | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many, batched together; the outputs are in the prompts' order.

        prompts: a text, a list of texts, the token ids of one prompt, or a list of such lists; in
        place of each also {"prompt": text} or {"prompt_token_ids": ids}.
        params: for all prompts, or one for each; None takes the defaults. progress: show a bar on
        stderr. adapter: the name of a LoRA adapter, for all prompts. Every prompt is checked before
        any runs: an InvalidArgumentError says which one is bad. Ctrl-C ends all of them and raises
        KeyboardInterrupt. sampling_params, use_tqdm, lora_request: vLLM's names of params, progress
        and adapter; an adapter that is not loaded yet is read.
        """
        params, progress = one_of(params, sampling_params), progress and use_tqdm
        adapter = self._adapter(adapter, lora_request)
        call = Call(self._shared)
        many, items = split_prompts(prompts)
        encoded = for_each(items, self.encode_prompt, "prompt" if many else None)
        return self._run_all(call, encoded, params, progress, adapter)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        adapter: str | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many: lists of {"role": ..., "content": ...}.

        template_variables and chat_template_kwargs go to the chat template (tools, a date); the
        argument chat_template is another template. Otherwise as `generate`.
        """
        params, progress = one_of(params, sampling_params), progress and use_tqdm
        adapter = self._adapter(adapter, lora_request)
        template_variables |= chat_template_kwargs or {}
        call = Call(self._shared)
        many, conversations = split_conversations(messages)
        encode = partial(self.encode_chat, **template_variables)
        encoded = for_each(conversations, encode, "conversation" if many else None)
        return self._run_all(call, encoded, params, progress, adapter)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        progress: bool = True,
        adapter: str | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The vectors of one text or many, of an embedding model; in the prompts' order.

        dimensions: the first so many numbers of each; None: all. normalize: divide each by its
        length, or do not; None: as the model's files say. Otherwise as `generate`, which such a
        model refuses, as all that makes texts. Raises InvalidArgumentError for a model that makes
        texts, and for a prompt that is empty or too long.
        """
        pooling = self.need_pooling(dimensions)
        adapter = self._adapter(adapter, lora_request)
        call = Call(self._shared)
        many, items = split_prompts(prompts)
        encoded = for_each(items, self.encode_prompt, "prompt" if many else None)
        outputs = self._run_all(call, encoded, EMBED, progress and use_tqdm, adapter)
        return [embedding_output(each, pooling, dimensions, normalize) for each in outputs]

    def beam_search(
        self,
        prompts: EncodedPrompt | Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        progress: bool = True,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Search for the best continuations of one prompt or many; arguments as for `generate`.

        The outputs of a prompt are its beam_width answers, the best first: by log-probability over
        length to the power of length_penalty. The tokens are those of transformers'
        `generate(num_beams=...)`. Raises InvalidArgumentError where the beams could not fit.
        """
        call = Call(self._shared)
        if isinstance(prompts, EncodedPrompt):
            encoded = [prompts]
        else:
            many, items = split_prompts(prompts)
            encoded = for_each(items, self.encode_prompt, "prompt" if many else None)
        each = [params.sampling_params()] * len(encoded)
        searches = [self.make_search(params, len(prompt.token_ids)) for prompt in encoded]
        return self._run_all(call, encoded, each, progress, adapter, searches)

    def contrastive_decoding(
        self,
        prompts: EncodedPrompt | Prompt | Sequence[Prompt],
        amateur: str | Path,
        params: ContrastiveParams | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer with what this model finds likely and a smaller one does not (Li et al. 2022).

        amateur: the smaller model, of the same vocabulary; it is loaded for this call. Otherwise as
        `generate`. InvalidArgumentError for another vocabulary.
        """
        call = Call(self._shared)
        params = params or ContrastiveParams()
        own = params.sampling_params()
        if isinstance(prompts, EncodedPrompt):
            encoded = [prompts]
        else:
            many, items = split_prompts(prompts)
            encoded = for_each(items, self.encode_prompt, "prompt" if many else None)
        vocab_size = self.engine.vocab_size
        options = self.engine.options
        blocks = -(-options.max_model_len // options.block_size) * len(encoded)
        config = replace(self.config, num_kv_blocks=blocks, max_num_seqs=max(len(encoded), 1))
        small = Amateur(str(amateur), config, vocab_size)
        small.restart(len(encoded))
        searches = []
        for index, prompt in enumerate(encoded):
            stops, room = self.ends(params, len(prompt.token_ids))
            ids = list(prompt.token_ids)
            search = ContrastiveDecoding(params, small, index, ids, stops, room, vocab_size)
            searches.append(search)
        return self._run_all(call, encoded, own, progress, None, searches)

    def stream(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Generator[OutputChunk, None, None]:
        """Answer one prompt or conversation piece by piece, as its tokens are drawn.

        The texts of the chunks, put together, are the answer; the last chunk's `result` is what
        `generate` would have returned. With params.n above 1 the answers' chunks are mixed and
        told apart by `index`. Closing the iterator ends the request, and so does
        leaving the loop, once nothing refers to the iterator any more. A bad prompt raises an
        InvalidArgumentError at once, not at the first chunk; the request starts when the first
        chunk is asked for, since an iterator without a reader must not run.
        """
        call = Call(self._shared)
        encoded = self.encode(prompt)
        params = params or SamplingParams()
        self.engine.check_request(encoded.token_ids, params)
        asked = Asked(None, encoded, params, stream=True, adapter=adapter)
        return SharedIterator(_stream(call, asked), call)

    def generate_as_completed(
        self,
        items: Iterable[Item],
        max_in_flight: int | None = None,
    ) -> Generator[tuple[Any, RequestOutput], None, None]:
        """Answer any number of (key, prompt or conversation, params), as each one finishes.

        A fourth entry of an item is the name of its LoRA adapter, or None.
        Yields (key, output) in the order of finishing. Items are taken lazily, max_in_flight at a
        time (twice max_num_seqs if None), so the input may be endless. An item that cannot be
        answered (a bad prompt, an adapter that cannot be had, a full queue) is yielded with its
        `error` set and no outputs, and the others go on. An item
        whose params name no seed draws it from the engine's seed and str(key): a run that is
        resumed half-way continues as if it had never stopped.
        """
        call = Call(self._shared)
        limit = max_in_flight or 2 * self.engine.options.max_num_seqs
        return SharedIterator(self._as_completed(call, iter(items), limit), call)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read a LoRA adapter that PEFT wrote, while others may be answered.

        Raises InvalidArgumentError for a name that is taken, AdaptersInUseError, and what reading
        it raises.
        """
        self._change_adapters(lambda adapters: adapters.add(name, Path(folder)))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; answers that use it go on. AdapterNotFoundError for an unknown one."""
        self._change_adapters(lambda adapters: adapters.remove(name))

    def between_steps(self, function: Callable[[Engine], T]) -> T:
        """Run a function of the engine while no thread changes it: to read its event log, say.

        The function must not ask for answers. `engine.stats()` needs no such care.
        """
        return self._shared.between_steps(function)

    def __getattr__(self, name: str) -> NoReturn:
        raise no_such_method(name)

    def _adapter(self, adapter: str | None, request: LoRARequest | None) -> str | None:
        """The name of the adapter to use; that of a LoRARequest is read if it is not there."""
        if request is None:
            return adapter
        if adapter is not None:
            raise InvalidArgumentError("adapter and lora_request are both given; expected one")
        if not hasattr(request, "lora_name"):
            raise InvalidArgumentError(
                f"lora_request is {request!r}; expected LoRARequest(name, number, folder)"
            )
        name, folder = request.lora_name, Path(request.lora_path)

        def load(adapters: AdapterTable) -> None:  # other threads may ask for the same adapter
            known = adapters.paths.get(name)
            if known is None:
                adapters.add(name, folder)
            elif known != folder:
                raise InvalidArgumentError(
                    f"the adapter {name!r} is {known}, not {folder}; expected a name of its own"
                )

        self._change_adapters(load)
        return name

    def _change_adapters(self, change: Callable[[AdapterTable], None]) -> None:
        def command(engine: Engine) -> None:
            with engine.guard:  # which a closed engine lets nobody in
                change(engine.adapters)

        self.between_steps(command)

    def _run_all(
        self,
        call: Call,
        prompts: list[EncodedPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        adapter: str | None,
        searches: Sequence[Search] = (),
    ) -> list[RequestOutput]:
        each = params_for_each(params, len(prompts))
        pairs = list(zip(prompts, each, strict=True))
        for_each(
            pairs,
            lambda pair: self.engine.check_request(pair[0].token_ids, pair[1]),
            "prompt" if len(pairs) > 1 else None,
        )
        results: list[RequestOutput | None] = [None] * len(prompts)
        bar: AbstractContextManager[Advance | None] = nullcontext()
        if progress and prompts:
            drawn = None if self.pooling else lambda: self.engine.num_sampled_tokens
            bar = request_bar(self._bar_turn, len(prompts), drawn)
        with call, bar as advance:
            asked = [Asked(i, *pair, adapter=adapter) for i, pair in enumerate(pairs)]
            if searches:
                found = zip(asked, searches, strict=True)
                asked = [one._replace(search=search) for one, search in found]
            call.ask(asked)
            on_step = advance and partial(advance, 0)
            while (arrival := call.take(on_step)) is not None:
                results[arrival.key] = arrival.chunk.result
                if advance is not None:
                    advance(1)
        return [output for output in results if output is not None]

    def _as_completed(
        self, call: Call, source: Iterator[Item], limit: int
    ) -> Generator[tuple[Any, RequestOutput], None, None]:
        with call:
            while not call.has_ended:
                num_taken = 0
                for key, prompt, params, *adapter in itertools.islice(
                    source, limit - call.num_open
                ):
                    num_taken += 1
                    try:
                        encoded = self.encode(prompt)
                        self.engine.check_request(encoded.token_ids, params)
                        if params.seed is None:
                            seed = derive_seed(self.engine.seed, f"key {key}")
                            params = replace(params, seed=seed)
                    except (InvalidArgumentError, TokenizerError) as error:
                        yield key, refused_output(prompt, error)
                    else:
                        name = next(iter(adapter), None)
                        asked = Asked(key, encoded, params, adapter=name, may_be_refused=True)
                        call.ask([asked])
                if not num_taken and not call.num_open:
                    return
                arrival = call.take()
                if arrival is not None and arrival.chunk.result is not None:
                    yield arrival.key, arrival.chunk.result


def _stream(call: Call, asked: Asked) -> Generator[OutputChunk, None, None]:
    with call:
        call.ask([asked])
        while (arrival := call.take()) is not None:
            yield arrival.chunk
