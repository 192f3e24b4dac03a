"""`octavo plan --check`: the same request on the real device, predicted beside measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Literal

from octavo.bench.benchmark import Runner
from octavo.bench.cases import Case
from octavo.config import EngineConfig, Environment
from octavo.machine import anonymous_memory
from octavo.models.kv_groups import with_kv_groups
from octavo.plan.plan import Plan, prompt_tokens
from octavo.progress import StageProgress
from octavo.runtime.loader import load_runtime
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import ModelFiles
from octavo.weights.pooling import for_runner

_DECODED, _REPETITIONS = 8, 3


# How far a prediction for the CPU may be off.
MEMORY_WITHIN, DECODE_WITHIN = 0.05, 0.25


@dataclass(frozen=True)
class Checked:
    """What was measured; decode (None of an embedding model) and prefill in tokens a second.

    memory: bytes of weights, cache and steps of each rank, as the runtime counts them. resident:
    what this process, which is rank 0, took more than before; None where the system does not tell.
    """

    memory: int
    resident: int | None
    decode: float | None
    prefill: float

    def within(self, plan: Plan) -> dict[str, bool]:
        """Whether the predictions are as near as they should be on the CPU."""
        found = {"memory": abs(self.memory / plan.memory.of_runtime - 1) <= MEMORY_WITHIN}
        if self.decode is not None:
            found["decode"] = abs(self.decode / plan.speed.decode - 1) <= DECODE_WITHIN
        return found


def check(
    plan: Plan,
    files: ModelFiles,
    config: EngineConfig,
    environment: Environment,
    progress: StageProgress = lambda *_: None,
) -> Checked:
    """Load the model, fill the cache of every sequence, and decode. Raises what loading raises."""
    request = plan.request
    blocks = plan.options.kv_groups(plan.spec).blocks_in_all(request.context) * request.concurrency
    files, _ = for_runner(files, config.runner, has_weights=False)
    files = replace(files, spec=with_kv_groups(files.spec, request.context))
    config = replace(
        config,
        device="cuda" if plan.device.is_gpu else "cpu",
        max_model_len=request.context,
        max_num_seqs=request.concurrency,
        max_num_batched_tokens=plan.options.max_num_batched_tokens,
        num_kv_blocks=blocks,
        tensor_parallel_size=request.ranks,
    )
    before = anonymous_memory()
    checkpoint = open_checkpoint(files, config.load_format, config.seed)
    loaded = load_runtime(
        files, checkpoint, config, lambda done, total: progress("loading", done, total), environment
    )
    runner = Runner(loaded, files.spec, None, embeds=plan.embeds)
    progress("measuring", 0, 1)
    speed = None
    if not plan.embeds:
        depth = max(0, request.context - _DECODED)
        decode = Case("decode", min(_DECODED, request.context), request.concurrency, depth)
        speed = decode.tokens / statistics.median(runner.time(decode, _REPETITIONS))
    kind: Literal["embed", "prefill"] = "embed" if plan.embeds else "prefill"
    prompt = Case(kind, prompt_tokens(request, embeds=plan.embeds))
    prefill = statistics.median(runner.time(prompt, _REPETITIONS))
    memory = loaded.runtime.memory()
    after = anonymous_memory()
    return Checked(
        (memory["weights"] + memory["kv_cache"] + memory["workspace"]) // request.ranks,
        None if before is None or after is None else after - before,
        speed,
        prompt.tokens / prefill,
    )
