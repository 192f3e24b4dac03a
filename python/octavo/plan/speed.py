"""How fast a step should be: the roofline, and what each kernel adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.bench.cases import (
    BYTES,
    Case,
    Peak,
    attention_work,
    least_seconds,
    matrices_work,
    seconds_of,
    streamed_bytes,
)
from octavo.config import RuntimeOptions
from octavo.models.spec import ModelSpec
from octavo.plan.devices import Device
from octavo.quantization.plan import expert_bytes, weight_bytes

# Of an exchange between GPUs over NVLink: two a layer, and one of the logits (assumed).
EXCHANGE_SECONDS = 10e-6


@dataclass(frozen=True)
class Speed:
    """Predicted. decode_step: seconds of a step of all sequences; decode, prefill: tokens a second.

    limit: what bounds the decode step, "memory" or "arithmetic".
    """

    decode_step: float
    decode: float
    prefill: float
    limit: str


def predict(
    spec: ModelSpec,
    options: RuntimeOptions,
    device: Device,
    sequences: int,
    depth: int,
    prompt: int,
    embeds: bool = False,
) -> Speed:
    """The speed of `sequences` that decode behind `depth` tokens each, and of a prompt.

    spec, device: of a rank, where there are several: all compute at the same time. embeds: an
    embedding model, whose prompts end before the head; nothing is decoded.
    """
    peak = Peak(device.bandwidth, device.operations)
    embed = options.formats.get("embed")
    item = BYTES[options.dtype if embed is None else embed.dtype]
    num_bytes = weight_bytes(spec, options.formats, options.dtype)
    step_bytes = streamed_bytes(spec, num_bytes, item, embeds=embeds)
    experts = expert_bytes(spec, options.formats, options.dtype)
    chunk = options.max_num_batched_tokens

    def least(case: Case) -> tuple[float, str]:
        """Of the products with the weights and then of attention, and the limit of the longer."""
        parts = (
            matrices_work(case, spec, step_bytes, chunk, experts),
            attention_work(case, spec, options.kv_dtype, chunk),
        )
        combined = max if device.is_gpu else math.hypot
        found = [
            (combined(*seconds_of(work, peak)), least_seconds(work, peak)[1]) for work in parts
        ]
        return sum(seconds for seconds, _ in found), max(found)[1]

    overhead = device.step_overhead + len(spec.layers) * device.layer_overhead
    if options.world_size > 1 and device.is_gpu:
        overhead += (2 * len(spec.layers) + 1) * EXCHANGE_SECONDS
    step, limit = least(Case("decode", 1, sequences, depth))
    step += overhead
    num_chunks = -(-prompt // options.max_num_batched_tokens)
    seconds = least(Case("embed" if embeds else "prefill", prompt))[0] + num_chunks * overhead
    return Speed(step, sequences / step, prompt / seconds, limit)
