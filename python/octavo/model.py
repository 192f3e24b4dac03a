"""A model in memory: engine, tokenizer, chat template. llm.py and the server use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo.config import EngineConfig, read_environment
from octavo.engine.engine import Engine
from octavo.engine.pooling import PoolingEngine
from octavo.errors import InvalidArgumentError, TokenizerError
from octavo.models.pooling import Pooling
from octavo.prompts import AnyPrompt, Conversation, EncodedPrompt, Prompt, prompt_of
from octavo.search.beam import BeamSearch
from octavo.search.contrastive import ContrastiveParams
from octavo.search.params import BeamSearchParams
from octavo.speculative_config import read_speculative_config
from octavo.vllm_names import translate_options

if TYPE_CHECKING:
    from octavo.runtime.loader import LoadProgress
    from octavo.text.chat import ChatTemplate
    from octavo.text.tokenizer import Tokenizer
    from octavo.weights.model_files import ModelFiles


@dataclass(eq=False, repr=False)
class LoadedModel:
    """An engine that is ready, and what makes its prompts.

    chat_template: None for a model that was not trained to chat. config: what it was loaded with.
    notes: what the user should know of weights in formats that are not octavo's.
    """

    engine: Engine
    chat_template: ChatTemplate | None
    config: EngineConfig
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where its directory has none."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.engine.options.max_model_len

    @property
    def pooling(self) -> Pooling | None:
        """How an embedding model makes its vectors; None for a model that makes texts."""
        return self.engine.pooling if isinstance(self.engine, PoolingEngine) else None

    def need_pooling(self, dimensions: int | None = None) -> Pooling:
        """The same; InvalidArgumentError for other models, and for dimensions it does not have."""
        if self.pooling is None:
            raise InvalidArgumentError(
                "this model makes texts and gives no embeddings: load one that does, or this one "
                "with runner='pooling' (octavo serve --runner pooling)"
            )
        self.pooling.check_dimensions(dimensions)
        return self.pooling

    def encode(self, prompt: AnyPrompt) -> EncodedPrompt:
        """A text, token ids or a conversation as the engine takes it."""
        if isinstance(prompt, EncodedPrompt):
            return prompt
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.encode_chat(cast("Conversation", prompt))
        return self.encode_prompt(cast("Prompt", prompt))

    def encode_prompt(self, prompt: Prompt, add_special_tokens: bool = True) -> EncodedPrompt:
        """Token ids of a prompt; add_special_tokens: with those that the model wants before it."""
        if isinstance(prompt, Mapping):
            prompt = prompt_of(prompt)
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidArgumentError('the prompt is ""; expected some text to continue')
            return EncodedPrompt(prompt, self._need_tokenizer().encode(prompt, add_special_tokens))
        return EncodedPrompt(None, prompt)

    def encode_chat(
        self,
        messages: Conversation,
        /,
        *,
        chat_template: str | None = None,
        add_special_tokens: bool = False,
        **template_variables: Any,
    ) -> EncodedPrompt:
        """A conversation as the prompt that a chat template makes of it.

        chat_template: its source; None takes the model's own. add_special_tokens: put those before
        it that the model wants before a text; most templates write them themselves.
        template_variables: more for the template. InvalidArgumentError for one named "messages".
        """
        from octavo.text.chat import ChatTemplate, special_tokens

        if "messages" in template_variables:
            raise InvalidArgumentError(
                "chat_template_kwargs has 'messages', which the conversation is; expected other "
                "names"
            )
        tokenizer = self._need_tokenizer()
        template = self.chat_template
        if chat_template is not None:
            own = special_tokens(tokenizer.config)
            template = ChatTemplate(chat_template, special_tokens=own, origin="chat_template")
        if template is None:
            raise TokenizerError(
                "this model has no chat template (it is a base model): give it a text to continue "
                "instead of messages, or use a model that was trained to chat"
            )
        text = template.render(messages, **template_variables)
        return EncodedPrompt(text, tokenizer.encode(text, add_special_tokens), is_chat=True)

    def make_search(self, params: BeamSearchParams, num_prompt_tokens: int) -> BeamSearch:
        """A beam search after a prompt of so many tokens, for `Engine.add_request`."""
        return BeamSearch(params, *self.ends(params, num_prompt_tokens))

    def ends(
        self, params: BeamSearchParams | ContrastiveParams, num_prompt_tokens: int
    ) -> tuple[set[int], int]:
        """Tokens that end an answer, and the length at which it ends in any case."""
        stops = set(params.stop_token_ids)
        stops |= set() if params.ignore_eos else self.engine.eos_token_ids
        end = self.engine.scheduler.max_total_tokens(num_prompt_tokens, params.max_tokens)
        return stops, end - num_prompt_tokens

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "this model's directory has no tokenizer: give the prompt as token ids, or put "
                "its tokenizer.json beside the weights, which transformers writes: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return self.tokenizer


def load_model(
    model: str | Path | ModelFiles | None = None,
    *,
    config: EngineConfig | None = None,
    on_load: LoadProgress | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    **options: Any,
) -> LoadedModel:
    """Load a model. Arguments and errors are those of `LLM`."""
    from octavo.models.kv_groups import with_kv_groups
    from octavo.runtime.loader import load_runtime
    from octavo.speculation.build import build_drafter, load_draft_model
    from octavo.text.chat import ChatTemplate
    from octavo.text.tokenizer import Tokenizer, holds_tokenizer
    from octavo.weights.adapter import read_adapter
    from octavo.weights.checkpoint import open_checkpoint
    from octavo.weights.hub import resolve_model
    from octavo.weights.model_files import ModelFiles, read_model
    from octavo.weights.pooling import pooling_notes

    config = _merge_options(config, options)
    environment = read_environment()
    if not isinstance(model, ModelFiles):
        model = read_model(resolve_model(None if model is None else str(model), environment))
    files, config, pooling = _for_runner(model, config)
    files = replace(files, spec=with_kv_groups(files.spec, config.max_model_len))
    # Before the weights, so that a broken tokenizer is an error at once.
    has_tokenizer = holds_tokenizer(files.folder)
    tokenizer = Tokenizer(files.folder) if has_tokenizer else None
    chat_template = ChatTemplate.load(files.folder) if has_tokenizer else None
    checkpoint = open_checkpoint(files, config.load_format, config.seed)
    # Before the target's KV cache, which shares what memory is left with the draft model's.
    draft_model = load_draft_model(config, files, checkpoint, tokenizer, environment)
    draft_bytes = 0 if draft_model is None else draft_model.bytes_beside(files)
    loaded = load_runtime(files, checkpoint, config, on_load, environment, draft_bytes)
    try:
        speculative_config = read_speculative_config(config.speculative_config)
        drafter = build_drafter(
            speculative_config, files, checkpoint, loaded.num_kv_blocks, draft_model
        )
        make: Callable[..., Engine] = partial(Engine, drafter=drafter)
        if pooling is not None:
            make = partial(PoolingEngine, pooling=pooling)
        engine = make(
            loaded.runtime,
            loaded.options,
            num_kv_blocks=loaded.num_kv_blocks,
            vocab_size=files.spec.vocab_size,
            kv_windows=files.spec.kv_windows,
            tokenizer=tokenizer,
            eos_token_ids=files.eos_token_ids or (tokenizer.eos_token_ids if tokenizer else ()),
            seed=config.seed,
            make_batch=loaded.make_batch,
            read_adapter=partial(read_adapter, files=files, checkpoint=checkpoint),
        )
        for name, folder in (adapters or {}).items():
            engine.adapters.add(name, Path(folder))
    except BaseException:
        loaded.close()
        raise
    notes = () if pooling is None else pooling_notes(files, tokenizer)
    return LoadedModel(engine, chat_template, config, (*loaded.notes, *notes))


def _for_runner(
    files: ModelFiles, config: EngineConfig
) -> tuple[ModelFiles, EngineConfig, Pooling | None]:
    """Model and options as what the model is for needs them; the pooling of an embedding model."""
    from octavo.weights.pooling import for_runner

    files, pooling = for_runner(files, config.runner, has_weights=config.load_format != "dummy")
    if pooling is None:
        return files, config, None
    if config.speculative_config is not None:
        raise InvalidArgumentError(
            "speculative_config is given, but this model gives embeddings and draws no tokens: "
            "leave it out"
        )
    longest = pooling.max_tokens
    if config.max_model_len is None and longest and longest < files.spec.max_position_embeddings:
        config = replace(config, max_model_len=longest)
    return files, config, pooling


def _merge_options(config: EngineConfig | None, options: Mapping[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)}
    return replace(config or EngineConfig(), **translate_options(options, known))
