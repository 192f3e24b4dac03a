"""Metrics for Prometheus, under vLLM's names and types, so that its dashboards work.

Names and meaning are those of vLLM's v1/metrics/loggers.py; what octavo adds is named octavo:….
Everything is observed in the event loop, once a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from octavo.engine.events import WAITING_REASONS
from octavo.engine.outputs import EngineStats, OutputChunk, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.stream import ResultStream, StepStats

if TYPE_CHECKING:
    from octavo.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# Names, and what they say.
_GAUGES = {
    "vllm:num_requests_running": "Sequences in execution.",
    "vllm:num_requests_waiting": "Sequences waiting.",
    "vllm:kv_cache_usage_perc": "KV cache in use; 1 is all of it.",
    "vllm:num_requests_waiting_by_reason": "Sequences waiting; octavo defers none for another "
    "reason than capacity.",
    "octavo:num_requests_waiting_for": "Sequences waiting, under what the first of them waits for.",
}
_COUNTERS = {
    "vllm:num_preemptions": "Preemptions.",
    "octavo:preemptions": "Preemptions, by what the blocks were taken for.",
    "vllm:prompt_tokens": "Prompt tokens processed.",
    "vllm:prompt_tokens_cached": "Prompt tokens that the prefix cache had, of ended requests.",
    "vllm:prompt_tokens_by_source": "Prompt tokens of ended requests, by source.",
    "vllm:prefix_cache_queries": "Tokens that the prefix cache was asked for.",
    "vllm:prefix_cache_hits": "Those of them that it had.",
    "octavo:kv_cache_evictions": "Cached blocks that were given to others.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:request_success": "Answers that ended, by reason.",
    "vllm:admission_rejections": "Requests turned away, by reason.",
    "vllm:corrupted_requests": "Requests that a NaN, or another error of their own, ended.",
    "vllm:spec_decode_num_drafts": "How often a sequence had drafts in a step.",
    "vllm:spec_decode_num_draft_tokens": "Drafts that were checked.",
    "vllm:spec_decode_num_accepted_tokens": "Drafts that were right.",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "Those of them in each place of a chain.",
    "octavo:spec_decode_num_branches": "Chains of drafts beside a sequence's first one in a step.",
    "octavo:spec_decode_num_branch_wins": "Those of them that were right for longest.",
}
# Those with one label more, each of whose values stands at 0 from the start.
_LABEL_VALUES = {
    "vllm:num_requests_waiting_by_reason": ("reason", ("capacity", "deferred")),
    "octavo:num_requests_waiting_for": ("reason", tuple(WAITING_REASONS)),
    "octavo:preemptions": ("reason", ("kv_blocks", "priority", "rope")),
    "vllm:prompt_tokens_by_source": ("source", ("local_compute", "local_cache_hit")),
    "vllm:request_success": ("finished_reason", ("stop", "length", "abort", "error", "timeout")),
    "vllm:admission_rejections": ("reason", ("queue_full", "unavailable")),
    "vllm:spec_decode_num_accepted_tokens_per_pos": ("position", ()),
}
# With their buckets; None: 1, 2, 5, 10, 20, 50, … up to max_model_len.
_HISTOGRAMS: dict[str, tuple[str, Sequence[float] | None]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token.", _TTFT),
    "vllm:inter_token_latency_seconds": ("Between two tokens of an answer.", _BETWEEN_TOKENS),
    "vllm:request_time_per_output_token_seconds": (
        "A request's mean time for each token after the first of its answer.",
        _BETWEEN_TOKENS,
    ),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end.", _LATENCY),
    "vllm:request_queue_time_seconds": ("Spent waiting.", _LATENCY),
    "vllm:request_prefill_time_seconds": ("Spent in prefill.", _LATENCY),
    "vllm:request_decode_time_seconds": ("Spent in decode.", _LATENCY),
    "vllm:request_inference_time_seconds": ("Spent running.", _LATENCY),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", None),
    "vllm:request_generation_tokens": ("Tokens generated for a request.", None),
    "vllm:request_params_max_tokens": ("The max_tokens asked for.", None),
    "vllm:request_params_n": ("The n asked for.", (1, 2, 5, 10, 20)),
    "vllm:request_prefill_kv_computed_tokens": ("Prompt tokens not found in the cache.", None),
    "vllm:iteration_tokens_total": ("Tokens of a step.", _STEP_TOKENS),
    "vllm:request_num_preemptions": ("Preemptions of a request.", (0, 1, 2, 5, 10, 20)),
}
M = TypeVar("M", Gauge, Counter)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._labels = labels = (model_name, "0")
        self._last = engine.stats()
        self.recent_ttft: deque[float] = deque(maxlen=64)  # seconds
        self._gauges = self._make(Gauge, _GAUGES)
        self._counters = self._make(Counter, _COUNTERS)
        most = engine.options.max_model_len
        numbers = [factor * 10.0**power for power in range(12) for factor in (1, 2, 5)]
        tokens = [number for number in numbers if number <= most]
        self._histograms = {
            name: Histogram(
                name, text, _LABELS, registry=registry, buckets=buckets or tokens
            ).labels(*labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._describe_cache(engine)

    def _make(self, kind: type[M], texts: Mapping[str, str]) -> dict[str, M]:
        """Metrics by name: with their labels, or, if they have one more, without."""
        made = {}
        for name, text in texts.items():
            label, values = _LABEL_VALUES.get(name, ("", ()))
            names = (*_LABELS, label) if label else _LABELS
            metric = kind(name, text, names, registry=self._registry)
            for value in values:
                metric.labels(*self._labels, value)
            made[name] = metric if label else metric.labels(*self._labels)
        return made

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Each number of that text, but for times of creation: its name, its labels, its value."""
        for metric in self._registry.collect():
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    yield sample.name, sample.labels, sample.value

    def observe_step(self, stats: StepStats) -> None:
        """After every step."""
        now, before = stats.engine, self._last
        self._last = now
        gauges, counters, labels = self._gauges, self._counters, self._labels
        gauges["vllm:num_requests_running"].set(now.num_running)
        gauges["vllm:num_requests_waiting"].set(now.num_waiting)
        gauges["vllm:kv_cache_usage_perc"].set(now.kv_cache_usage)
        if now.num_waiting or before.num_waiting:
            for reason in WAITING_REASONS:
                count = now.num_waiting if reason == now.waiting_reason else 0
                gauges["octavo:num_requests_waiting_for"].labels(*labels, reason).set(count)
            capacity = gauges["vllm:num_requests_waiting_by_reason"].labels(*labels, "capacity")
            capacity.set(now.num_waiting)
        if stats.num_tokens:
            self._histograms["vllm:iteration_tokens_total"].observe(stats.num_tokens)
        num_queries = now.num_prefix_queries - before.num_prefix_queries
        counters["vllm:prefix_cache_queries"].inc(num_queries)
        counters["vllm:prefix_cache_hits"].inc(now.num_prefix_hits - before.num_prefix_hits)
        counters["octavo:kv_cache_evictions"].inc(now.num_evictions - before.num_evictions)
        self._observe_drafts(now, before)
        for reason, count in stats.preemptions.items():
            counters["vllm:num_preemptions"].inc(count)
            counters["octavo:preemptions"].labels(*labels, reason).inc(count)

    def _observe_drafts(self, now: EngineStats, before: EngineStats) -> None:
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            count = getattr(now, name) - getattr(before, name)
            self._counters[f"vllm:spec_decode_{name}"].inc(count)
        for name in ("branches", "branch_wins"):
            count = getattr(now, f"num_draft_{name}") - getattr(before, f"num_draft_{name}")
            self._counters[f"octavo:spec_decode_num_{name}"].inc(count)
        each = self._counters["vllm:spec_decode_num_accepted_tokens_per_pos"]
        earlier = before.num_accepted_per_position
        for place, count in enumerate(now.num_accepted_per_position):
            new = count - (earlier[place] if place < len(earlier) else 0)
            each.labels(*self._labels, str(place)).inc(new)

    def watch(self, stream: ResultStream) -> None:
        """Follow one request to its end.

        The tokens of a search are known with its end, and a prompt that is only scored has none.
        A chunk with the reason "abort" ends every answer that is open.
        """
        params, search = stream.request.params, stream.request.search
        answers = range(params.n if search is None else search.num_beams)
        last: dict[int, float] = {}
        ended: set[int] = set()
        num_prompt = len(stream.request.prompt.token_ids)
        between_tokens = self._histograms["vllm:inter_token_latency_seconds"]

        def end(reasons: Mapping[int, str]) -> None:
            for index in reasons.keys() - ended:
                ended.add(index)
                self._counters["vllm:request_success"].labels(*self._labels, reasons[index]).inc()

        def observe(chunk: OutputChunk | None) -> None:
            if chunk is None or chunk.finish_reason == "abort":
                end(dict.fromkeys(answers, "error" if chunk is None else "abort"))
                return
            now = time.monotonic()
            if chunk.token_ids:
                before = last.get(chunk.index)
                if not last:
                    self._begin(num_prompt, now - stream.arrival_time)
                elif before is not None:
                    between_tokens.observe(now - before)
                last[chunk.index] = now
                self._counters["vllm:generation_tokens"].inc(len(chunk.token_ids))
            if chunk.finish_reason is not None:
                end({chunk.index: chunk.finish_reason})
            if chunk.result is not None:
                outputs, metrics = chunk.result.outputs, chunk.result.metrics
                end({output.index: output.finish_reason or "abort" for output in outputs})
                first = metrics.first_token_time
                if not last and (first is not None or outputs[0].finish_reason == "length"):
                    self._begin(num_prompt, first and first - stream.arrival_time)
                    self._counters["vllm:generation_tokens"].inc(metrics.num_output_tokens)
                self._finish(chunk.result, params, now - stream.arrival_time)

        stream.observe = observe

    def _begin(self, num_prompt_tokens: int, seconds: float | None) -> None:
        """The prompt is processed. seconds: to the first token; None: none is asked for."""
        self._counters["vllm:prompt_tokens"].inc(num_prompt_tokens)
        if seconds is not None:
            self._histograms["vllm:time_to_first_token_seconds"].observe(seconds)
            self.recent_ttft.append(round(seconds, 4))

    def rejected(self, reason: str) -> None:
        """A request was turned away."""
        self._counters["vllm:admission_rejections"].labels(*self._labels, reason).inc()

    def _finish(self, result: RequestOutput, params: SamplingParams, seconds: float) -> None:
        metrics = result.metrics
        num_computed = metrics.num_prompt_tokens - metrics.num_cached_tokens
        found: dict[str, float] = {
            "vllm:e2e_request_latency_seconds": seconds,
            "vllm:request_prompt_tokens": metrics.num_prompt_tokens,
            "vllm:request_generation_tokens": metrics.num_output_tokens,
            "vllm:request_num_preemptions": metrics.num_preemptions,
            "vllm:request_prefill_kv_computed_tokens": num_computed,
            "vllm:request_params_n": params.n,
        }
        if params.max_tokens is not None:
            found["vllm:request_params_max_tokens"] = params.max_tokens
        scheduled, first = metrics.first_scheduled_time, metrics.first_token_time
        if scheduled is not None:
            found["vllm:request_queue_time_seconds"] = scheduled - metrics.arrival_time
            found["vllm:request_inference_time_seconds"] = metrics.finished_time - scheduled
            if first is not None:
                found["vllm:request_prefill_time_seconds"] = first - scheduled
                found["vllm:request_decode_time_seconds"] = metrics.finished_time - first
                num_answers = len(result.outputs)
                if (num_later := metrics.num_output_tokens - num_answers) > 0:
                    each = (metrics.finished_time - first) * num_answers / num_later
                    found["vllm:request_time_per_output_token_seconds"] = each
        for name, value in found.items():
            self._histograms[name].observe(value)
        self._counters["vllm:prompt_tokens_cached"].inc(metrics.num_cached_tokens)
        sources = self._counters["vllm:prompt_tokens_by_source"]
        sources.labels(*self._labels, "local_cache_hit").inc(metrics.num_cached_tokens)
        sources.labels(*self._labels, "local_compute").inc(num_computed)
        if result.error is not None:
            self._counters["vllm:corrupted_requests"].inc()

    def _describe_cache(self, engine: Engine) -> None:
        options = engine.options
        values = {
            "block_size": options.block_size,
            "num_gpu_blocks": engine.blocks.num_blocks,
            "cache_dtype": options.kv_dtype,
            "enable_prefix_caching": options.enable_prefix_caching,
            "engine": "0",
        }
        text = "How the KV cache is set up."
        info = Gauge("vllm:cache_config_info", text, list(values), registry=self._registry)
        info.labels(*map(str, values.values())).set(1)
