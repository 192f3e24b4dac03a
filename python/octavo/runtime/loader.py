"""From model files to a runtime that can step: options resolved, weights loaded, cache sized."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from octavo.config import (
    EngineConfig,
    Environment,
    RuntimeOptions,
    read_environment,
    resolve_device,
)
from octavo.errors import InsufficientMemoryError, InvalidArgumentError
from octavo.machine import (
    available_memory,
    format_bytes,
    open_packaged_libraries,
    threads_of_rank,
)
from octavo.models.kv_groups import KvGroups
from octavo.models.rope import for_length
from octavo.models.shards import Shard, shard_spec, shards
from octavo.models.spec import ModelSpec
from octavo.quantization.apply import quantize_checkpoint
from octavo.quantization.plan import (
    Scheme,
    describe_dtypes,
    embedding_formats,
    plan_formats,
    weight_bytes,
)
from octavo.quantization.stored import describe_stored
from octavo.runtime.ranks import PATIENCE, Rank, RankedBatch, RankedRuntime, Team, on_own_cores
from octavo.runtime.remedies import Changes, Needs, plan_kv_blocks
from octavo.speculative_config import SpeculativeConfig
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles
from octavo.weights.shards import shard_checkpoint
from octavo.weights.tensor import TensorDType

if TYPE_CHECKING:
    from octavo import _native

LoadProgress = Callable[[int, int], None]
"""Called after each weight with the bytes loaded so far and the bytes of all."""

# Devices that share this process's memory, so that the limits on the process (control groups,
# ulimit) bound them too; any other device reports its own memory.
_HOST_DEVICES = frozenset({"cpu"})
_BRANCHING_SEQS = 8  # whose branches fit in a step when all max_num_seqs sequences decode
# Values tried for advice where there is no memory for steps; the first of each are the defaults.
_FEWER_SEQS, _FEWER_TOKENS = (64, 8, 1), (512, 64, 16)


@dataclass(frozen=True)
class LoadedRuntime:
    """A native runtime with its weights and KV cache, and what it was built with.

    notes: what the user should know of weights in formats that are not octavo's.
    """

    runtime: _native.Runtime | RankedRuntime
    options: RuntimeOptions
    num_kv_blocks: int
    device: str
    notes: tuple[str, ...] = ()

    @property
    def make_batch(self) -> Callable[..., _native.Batch]:
        """Makes what `runtime.submit` takes."""
        from octavo import _native

        return RankedBatch if self.options.world_size > 1 else _native.Batch

    def close(self) -> None:
        """End the other ranks: an error may be kept for long, and with it all that it refers to."""
        if isinstance(self.runtime, RankedRuntime):
            self.runtime.close()


class Prepared(NamedTuple):
    """A rank's runtime before its weights are loaded.

    checkpoint: the weights to load. spec: the model, or the rank's part of it. shards: of the
    weights that are not whole, which part it is. rank: None for the only one.
    """

    runtime: _native.Runtime
    checkpoint: Checkpoint
    options: RuntimeOptions
    spec: ModelSpec
    device: str
    shards: Mapping[str, Shard]
    rank: Rank | None


def load_runtime(
    files: ModelFiles,
    checkpoint: Checkpoint,
    config: EngineConfig,
    progress: LoadProgress | None = None,
    environment: Environment | None = None,
    draft_bytes: int = 0,
) -> LoadedRuntime:
    """Build the runtime, load the weights into it, and allocate its KV cache.

    draft_bytes: what the cache of a draft model takes beside each block of this one.
    Raises InvalidArgumentError for options that do not fit the model or each other, and
    InsufficientMemoryError, before anything large is allocated, when weights or cache do not fit.
    Warns of weights that hold a NaN or an infinity.
    """
    loaded, needs = load_without_cache(files, checkpoint, config, progress, environment)
    needs = replace(needs, block_bytes=needs.block_bytes + draft_bytes)
    options = loaded.options
    weights = weight_bytes(needs.spec, options.formats, options.dtype)
    try:
        num_kv_blocks = plan_kv_blocks(needs, needs.room - weights)
        allocate_cache(loaded, num_kv_blocks, options.kv_groups(files.spec))
    except BaseException:
        loaded.close()
        raise
    return replace(loaded, num_kv_blocks=num_kv_blocks)


def load_without_cache(
    files: ModelFiles,
    checkpoint: Checkpoint,
    config: EngineConfig,
    progress: LoadProgress | None = None,
    environment: Environment | None = None,
) -> tuple[LoadedRuntime, Needs]:
    """As `load_runtime`, but for the KV cache; and what memory the model needs."""
    environment = read_environment() if environment is None else environment
    size = config.tensor_parallel_size
    if size == 1:
        return _load(files, checkpoint, config, progress, environment, None)
    shard_spec(files.spec, 0, size)  # before there are other processes
    team = Team(size)
    try:
        team.ask("prepare", files.path, files.spec, config, environment)
        return _load(files, checkpoint, config, progress, environment, team)
    except BaseException:
        team.close()
        raise


def _load(
    files: ModelFiles,
    checkpoint: Checkpoint,
    config: EngineConfig,
    progress: LoadProgress | None,
    environment: Environment,
    team: Team | None,
) -> tuple[LoadedRuntime, Needs]:
    """`load_without_cache` with the other ranks at work; they have been asked to prepare."""
    stored = checkpoint.formats
    rank = None if team is None else team.rank
    try:
        prepared = prepare(files, checkpoint, config, environment, rank)
    except RuntimeError as error:
        if team is not None:  # another rank may have failed, while this one was waiting for it
            team.rank.abort(str(error))
            team.answers(PATIENCE)  # NCCL may wait for this rank, and not be stopped
        raise
    runtime, checkpoint, options, spec, device, shards, _ = prepared
    others: list[int] = [] if team is None else team.answers()
    block_bytes = runtime.kv_bytes_per_block()
    num_bytes = weight_bytes(spec, options.formats, options.dtype)

    def available(reserved: int = 0) -> int:
        """Of each rank: the least on devices of their own, a part of the host's memory."""
        if device in _HOST_DEVICES:
            return available_memory(reserved=reserved) // options.world_size
        return min([_available(runtime, device), *others])

    free = available(num_bytes)
    if num_bytes > free:
        each = "" if team is None else f" on each of {options.world_size} ranks"
        raise InsufficientMemoryError(
            f"the weights take {format_bytes(num_bytes)} as "
            f"{describe_dtypes(options.formats, options.dtype)}{each}; {format_bytes(free)} are "
            f"available",
            Needs(spec, config, options, stored, free, block_bytes).remedies(),
        )
    try:
        if team is not None:
            team.ask("fill")
        fill(prepared, progress)
        if team is not None:
            others = []
            for left, warned in team.answers():
                others.append(left)
                for warning in warned:  # of weights of which this rank has another part
                    warnings.warn(warning, stacklevel=2)
    except MemoryError as error:  # fragmented, or taken by another process meanwhile
        raise InsufficientMemoryError(
            f"the weights, {format_bytes(num_bytes)}, could not be allocated",
            Needs(spec, config, options, stored, num_bytes, block_bytes).remedies(),
        ) from error
    room = available() + num_bytes
    found = describe_stored(files.spec, checkpoint.stored, options.formats, options.dtype)
    texts = [str(each) for each in found if each.is_worth_a_line]
    notes = (f"{files.path.name}: {'; '.join(texts)}",) if texts else ()
    whole = runtime if team is None else RankedRuntime(runtime, team, shards)
    loaded = LoadedRuntime(whole, options, 0, device, notes)
    return loaded, Needs(spec, config, options, stored, room, block_bytes)


def prepare(
    files: ModelFiles,
    checkpoint: Checkpoint,
    config: EngineConfig,
    environment: Environment,
    rank: Rank | None = None,
) -> Prepared:
    """A runtime, of the whole model or of a rank's part of it, and the weights for it."""
    from octavo import _native

    checkpoint = quantize_checkpoint(
        checkpoint, files.spec, _scheme(config), keep_embedding=config.keep_embedding
    )
    device = resolve_device(config.device, _native.available_devices())
    if device == "cuda":
        open_packaged_libraries(config.tensor_parallel_size)
    options = resolve_options(files.spec, checkpoint.dtype, config, environment, device)
    if config.overlap_steps is None:
        options = replace(options, overlap_steps=device not in _HOST_DEVICES)
    spec = for_length(files.spec, options.max_model_len)
    options = replace(options, rope_switch=spec.rope_switch, formats=checkpoint.formats)
    if rank is None:
        runtime = _make_runtime(device, spec, options, config)
        return Prepared(runtime, checkpoint, options, spec, device, {}, None)
    part = shard_spec(spec, rank.number, rank.size)
    cuts = shards(spec, part, rank.number, rank.size)
    checkpoint = shard_checkpoint(checkpoint, cuts)
    options = replace(
        options,
        formats=checkpoint.formats,
        num_threads=threads_of_rank(options.num_threads, rank.size),
        rank=rank.number,
        world_size=rank.size,
        device_index=rank.device_index(device),
    )
    with on_own_cores(rank):
        runtime = _make_runtime(device, part, options, config, rank.group)
    return Prepared(runtime, checkpoint, options, part, device, cuts, rank)


def _make_runtime(
    device: str,
    spec: ModelSpec,
    options: RuntimeOptions,
    config: EngineConfig,
    group: _native.RankGroup | None = None,
) -> _native.Runtime:
    """The runtime, with room for weights and steps; too little room is an error with advice."""
    from octavo import _native

    seqs, tokens = options.max_num_seqs, options.max_num_batched_tokens
    try:
        # A branch of drafts is to the core one more sequence of the step.
        most = options.max_num_seqs + options.num_spare_seqs
        return _native.Runtime(device, spec, replace(options, max_num_seqs=most), group)
    except ValueError as error:  # an instruction set or a device that this machine lacks
        raise InvalidArgumentError(str(error)) from error
    except MemoryError as error:  # on the host: `ulimit -v`; nothing large is touched yet
        ways: list[Changes] = [{"max_num_seqs": n} for n in _FEWER_SEQS if n < seqs]
        ways += [{"max_num_batched_tokens": n} for n in _FEWER_TOKENS if n < tokens]
        ways += [{"max_num_seqs": 1, "max_num_batched_tokens": _FEWER_TOKENS[-1]}]
        reason = str(error).partition(": lower")[0]  # the core's advice is for any allocation
        tries = [(way, replace(options, **way)) for way in ways]
        if not options.formats:
            rest = {} if config.keep_embedding else embedding_formats(spec)
            for scheme in ("int8", "int4"):
                formats = {**rest, **plan_formats(spec, Scheme(scheme))[0]}
                tries.append(({"quantize": scheme}, replace(options, formats=formats)))
        works = (way for way, other in tries if _has_room(device, spec, other, config))
        raise InsufficientMemoryError(
            f"the memory for the weights and for steps of max_num_seqs = {seqs} and "
            f"max_num_batched_tokens = {tokens} could not be allocated ({reason})",
            list(islice(works, 1)),
        ) from error


def _has_room(device: str, spec: ModelSpec, options: RuntimeOptions, config: EngineConfig) -> bool:
    """Whether there is memory for the runtime and the cache of one sequence."""
    from octavo import _native

    options = replace(options, rank=0, world_size=1)  # others are not needed for a try
    try:
        runtime = _native.Runtime(device, replace(spec, head_part=0, head_parts=1), options)
    except MemoryError:
        return False
    groups = options.kv_groups(spec)
    num_blocks = config.num_kv_blocks or groups.blocks_in_all(options.max_model_len)
    room = _available(runtime, device)
    return num_blocks * runtime.kv_bytes_per_block() <= room * config.kv_memory_fraction


def allocate_cache(loaded: LoadedRuntime, num_blocks: int, groups: KvGroups) -> None:
    """Allocate the KV cache; an InsufficientMemoryError names a size that works."""
    runtime, max_model_len = loaded.runtime, loaded.options.max_model_len
    try:
        runtime.alloc_kv(num_blocks)
    except MemoryError as error:
        had = num_blocks
        while had := had // 2:
            with contextlib.suppress(MemoryError):
                runtime.alloc_kv(had)
                break
        ways: list[Changes] = []
        if groups.longest(had) >= max_model_len:
            ways = [{"num_kv_blocks": had}]
        elif groups.longest(had):
            ways = [{"num_kv_blocks": had, "max_model_len": groups.longest(had)}]
        size = format_bytes(num_blocks * runtime.kv_bytes_per_block())
        raise InsufficientMemoryError(
            f"the KV cache of {num_blocks} blocks ({size}) could not be allocated", ways
        ) from error


def resolve_options(
    spec: ModelSpec,
    stored_dtype: TensorDType,
    config: EngineConfig,
    environment: Environment,
    device: str = "cpu",
) -> RuntimeOptions:
    """Replace every "auto" of the configuration; InvalidArgumentError where it does not fit."""
    dtype: Literal["f32", "bf16", "f16"]
    if config.dtype != "auto":
        dtype = config.dtype
    elif device in _HOST_DEVICES:
        dtype = "bf16" if stored_dtype == "bf16" else "f32"
    else:
        dtype = "f16" if stored_dtype == "f16" else "bf16"
    limit = spec.longest_sequence
    own = spec.max_position_embeddings
    max_model_len = own if config.max_model_len is None else config.max_model_len
    if max_model_len > limit:
        raise InvalidArgumentError(
            f"max_model_len is {max_model_len}; expected at most {limit}, the positions that "
            f"the model was made for (max_position_embeddings)"
        )
    return RuntimeOptions(
        dtype=dtype,
        kv_dtype=dtype if config.kv_dtype == "auto" else config.kv_dtype,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_threads=config.num_threads or environment.num_threads,
        isa=environment.isa if config.isa == "auto" else config.isa,
        deterministic=config.deterministic,
        graphs=not config.enforce_eager,
        max_adapters=config.max_adapters,
        enable_prefix_caching=config.enable_prefix_caching,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
        priority_ageing_seconds=config.priority_ageing_seconds,
        event_log_capacity=config.event_log_capacity,
        overlap_steps=bool(config.overlap_steps),
        num_spare_seqs=num_spare_seqs(config),
    )


def num_spare_seqs(config: EngineConfig) -> int:
    """How many branches of drafts a step may have beside max_num_seqs sequences.

    Those of a few sequences: with many in a step branches rarely pay.
    """
    drafts = config.speculative_config
    if not isinstance(drafts, SpeculativeConfig):
        return 0
    return (drafts.most_chains - 1) * min(config.max_num_seqs, _BRANCHING_SEQS)


def fill(prepared: Prepared, progress: LoadProgress | None = None) -> None:
    """Load the weights run by run; the next one is read meanwhile, and no more."""
    runtime, checkpoint = prepared.runtime, prepared.checkpoint
    loaded = 0
    runs = checkpoint.checked_runs()
    with on_own_cores(prepared.rank), ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, runs, None)
        while run := following.result():
            following = reader.submit(next, runs, None)
            name, first_row, tensor = run
            runtime.load(name, tensor.data, tensor.dtype, first_row)
            loaded += tensor.data.nbytes
            del run, tensor
            if progress is not None:
                progress(loaded, checkpoint.total_bytes)


def _scheme(config: EngineConfig) -> Scheme | None:
    """The scheme that `config.quantize` names; dummy weights are rounded by the fastest method."""
    if config.quantize is None:
        return None
    return Scheme(config.quantize, method="rtn" if config.load_format == "dummy" else "search")


def _available(runtime: _native.Runtime, device: str, reserved: int = 0) -> int:
    """Bytes that can be taken.

    reserved: bytes of weights that the runtime has mapped on the host and not filled yet.
    """
    if device in _HOST_DEVICES:
        return available_memory(reserved=reserved)
    memory: Mapping[str, int] = runtime.memory()
    return memory["available"]
