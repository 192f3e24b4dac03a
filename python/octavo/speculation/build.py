"""From `speculative_config` to the drafter of an engine; draft models are loaded here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from octavo.config import EngineConfig, Environment
from octavo.engine.drafter import Drafter
from octavo.errors import InvalidArgumentError
from octavo.files import expand_home
from octavo.models.kv_groups import KvGroups, with_kv_groups
from octavo.runtime.loader import LoadedRuntime, allocate_cache, load_without_cache, num_spare_seqs
from octavo.speculation.draft_model import DraftModelSource
from octavo.speculation.eagle import EagleHead, EagleSource, TargetEnds
from octavo.speculation.medusa import MedusaHeads, MedusaSource
from octavo.speculation.ngram import NgramSource
from octavo.speculation.source import DraftSource
from octavo.speculation.speculator import Speculator
from octavo.speculative_config import SpeculativeConfig, read_speculative_config
from octavo.text.tokenizer import Tokenizer, holds_tokenizer
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import ModelFiles, read_model


@dataclass(frozen=True)
class DraftModel:
    """A draft model with its weights, but without a KV cache."""

    loaded: LoadedRuntime
    kv_windows: tuple[int, ...]

    def num_blocks(self, num_kv_blocks: int, target: ModelFiles) -> int:
        """Blocks that hold as many tokens as num_kv_blocks of the target's."""
        return -(-num_kv_blocks * len(self.kv_windows) // len(target.spec.kv_windows))

    def bytes_beside(self, target: ModelFiles) -> int:
        """Bytes of the cache that go with each block of the target's."""
        return self.num_blocks(1, target) * self.loaded.runtime.kv_bytes_per_block()


def load_draft_model(
    config: EngineConfig,
    target: ModelFiles,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    environment: Environment,
) -> DraftModel | None:
    """The draft model that the configuration asks for; None where it needs none.

    target, checkpoint, tokenizer: of the model that it drafts for.
    Raises InvalidArgumentError for a model that cannot draft for it, and the errors of loading.
    """
    wanted = read_speculative_config(config.speculative_config)
    if wanted is None or wanted.method not in ("draft_model", "layers"):
        return None
    limit = config.max_model_len or target.spec.max_position_embeddings
    if wanted.method == "layers":
        files, checkpoint = _first_layers(wanted.num_layers or 0, target, checkpoint)
    else:
        files = read_model(resolve_model(wanted.model, environment))
        _check_vocabulary(files, target, tokenizer)
        checkpoint = open_checkpoint(files, config.load_format, config.seed)
    quantize: Any = config.quantize if wanted.method == "layers" else wanted.quantization
    own = replace(
        config,
        quantize=quantize,
        speculative_config=None,
        max_model_len=min(limit, files.spec.max_position_embeddings),
        max_num_seqs=config.max_num_seqs + num_spare_seqs(config),
        max_adapters=0,
        overlap_steps=False,
        tensor_parallel_size=1,
    )
    files = replace(files, spec=with_kv_groups(files.spec, own.max_model_len))
    loaded, _ = load_without_cache(files, checkpoint, own, None, environment)
    return DraftModel(loaded, files.spec.kv_windows)


def build_drafter(
    config: SpeculativeConfig | None,
    target: ModelFiles,
    checkpoint: Checkpoint,
    num_kv_blocks: int,
    draft_model: DraftModel | None,
) -> Drafter | None:
    """The drafter that the option asks for, its KV cache allocated; None for none.

    Heads are read here. Raises WeightsError or UnsupportedModelError for those that do not fit.
    """
    if config is None:
        return None
    source: DraftSource
    if draft_model is not None:
        loaded = draft_model.loaded
        num_blocks = draft_model.num_blocks(num_kv_blocks, target)
        windows = (0,) * len(draft_model.kv_windows)
        allocate_cache(loaded, num_blocks, KvGroups(loaded.options.block_size, windows, 1))
        loaded = replace(loaded, num_kv_blocks=num_blocks)
        source = DraftModelSource(loaded, draft_model.kv_windows, target.spec.vocab_size)
    elif config.method == "medusa":
        spec = target.spec
        folder = expand_home(config.model or "")
        source = MedusaSource(MedusaHeads.read(folder, spec.hidden_size, spec.vocab_size))
    elif config.method == "eagle":
        ends = TargetEnds.read(target, checkpoint)
        source = EagleSource(EagleHead.read(expand_home(config.model or ""), ends))
    else:
        source = NgramSource(config.prompt_lookup_min or 1, config.prompt_lookup_max or 1)
    return Speculator(
        source,
        config.depth,
        adaptive=config.adaptive,
        num_branches=config.num_branches,
        tree=config.tree,
    )


def _first_layers(
    count: int, target: ModelFiles, checkpoint: Checkpoint
) -> tuple[ModelFiles, Checkpoint]:
    """The target without its layers from `count` on; its final norm and head stay."""
    layers = target.spec.layers
    if count >= len(layers):
        raise InvalidArgumentError(
            f"speculative_config's num_layers is {count}; expected 1 to {len(layers) - 1}, fewer "
            f"than the model's {len(layers)} layers"
        )
    spec = replace(target.spec, layers=layers[:count])
    return replace(target, spec=spec), checkpoint.first_layers(count)


def _check_vocabulary(draft: ModelFiles, target: ModelFiles, tokenizer: Tokenizer | None) -> None:
    """InvalidArgumentError unless a token id means the same to both models."""
    advice = "drafts are token ids, so both need the same tokenizer: take a draft model of its kind"
    if tokenizer is None:
        if draft.spec.vocab_size != target.spec.vocab_size:
            raise InvalidArgumentError(
                f"the draft model {draft.path} has {draft.spec.vocab_size} tokens, {target.path} "
                f"has {target.spec.vocab_size}; {advice}"
            )
        return
    if not holds_tokenizer(draft.folder):
        raise InvalidArgumentError(
            f"the draft model {draft.path} has no tokenizer, so whether its tokens are those of "
            f"{target.path} cannot be seen: put its tokenizer beside its weights"
        )
    own, theirs = tokenizer.vocabulary, Tokenizer(draft.folder).vocabulary
    if own == theirs:
        return
    token, place = min(own.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
    raise InvalidArgumentError(
        f"the draft model {draft.path} has another vocabulary than {target.path}: token {place} "
        f"is not {token!r} in both; {advice}"
    )
