"""Metrics for Prometheus, under vLLM's names and types, so that its dashboards work.

Names and meaning are those of vLLM's v1/metrics/loggers.py; what octavo adds is named octavo:….
Everything is observed in the event loop, once a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from octavo.engine.events import WAITING_REASONS
from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.server.step_stats import StepStats
from octavo.server.stream import ResultStream

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


def token_buckets(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    found = [factor * 10.0**power for power in range(12) for factor in (1, 2, 5)]
    return [bucket for bucket in found if bucket <= most] or [1.0]


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, "0")
        self._last = engine.stats()
        self.recent_ttft: deque[float] = deque(maxlen=64)  # seconds
        self._make_gauges()
        self._make_counters()
        self._make_histograms(engine.options.max_model_len)
        self._describe_cache(engine)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def observe_step(self, stats: StepStats) -> None:
        """After every step."""
        now, before = stats.engine, self._last
        self._last = now
        self.running.set(now.num_running)
        self.waiting.set(now.num_waiting)
        self.kv_usage.set(1 - now.num_free_blocks / now.num_blocks)
        if now.num_waiting or before.num_waiting:
            for reason, gauge in self.waiting_by_reason.items():
                gauge.set(now.num_waiting if reason == now.waiting_reason else 0)
            self.waiting_for_capacity.set(now.num_waiting)
        if stats.num_tokens:
            self.iteration_tokens.observe(stats.num_tokens)
        self.cache_queries.inc(now.num_prefix_queries - before.num_prefix_queries)
        self.cache_hits.inc(now.num_prefix_hits - before.num_prefix_hits)
        self.evictions.inc(now.num_evictions - before.num_evictions)
        for reason, count in stats.preemptions.items():
            self.preemptions.inc(count)
            self.preemptions_by_reason.labels(*self._labels, reason).inc(count)

    def watch(self, stream: ResultStream) -> None:
        """Follow one request to its end."""
        params = stream.request.params
        if params.max_tokens is not None:
            self.max_tokens.observe(params.max_tokens)
        self.num_answers.observe(params.n)
        stream.observe = self._follow(stream)

    def rejected(self, reason: str) -> None:
        """A request was turned away."""
        self.rejections.labels(*self._labels, reason).inc()

    def _follow(self, stream: ResultStream) -> Callable[[OutputChunk | None], None]:
        last: dict[int, float] = {}
        num_prompt = len(stream.request.prompt.token_ids)

        def observe(chunk: OutputChunk | None) -> None:
            if chunk is None:
                self.success.labels(*self._labels, "abort").inc()
                return
            now = time.monotonic()
            if chunk.token_ids:
                before = last.get(chunk.index)
                if not last:
                    self.ttft.observe(now - stream.arrival_time)
                    self.recent_ttft.append(round(now - stream.arrival_time, 4))
                    self.prompt_tokens.inc(num_prompt)
                elif before is not None:
                    self.between_tokens.observe(now - before)
                last[chunk.index] = now
                self.generation_tokens.inc(len(chunk.token_ids))
            if chunk.result is not None:
                self._finish(chunk.result, now - stream.arrival_time)

        return observe

    def _finish(self, result: RequestOutput, seconds: float) -> None:
        metrics = result.metrics
        self.e2e.observe(seconds)
        self.request_prompt.observe(metrics.num_prompt_tokens)
        self.request_generation.observe(metrics.num_output_tokens)
        self.request_preemptions.observe(metrics.num_preemptions)
        self.cached_tokens.inc(metrics.num_cached_tokens)
        num_computed = metrics.num_prompt_tokens - metrics.num_cached_tokens
        self.computed_tokens.observe(num_computed)
        by_source = {"local_cache_hit": metrics.num_cached_tokens, "local_compute": num_computed}
        for source, count in by_source.items():
            self.tokens_by_source.labels(*self._labels, source).inc(count)
        for output in result.outputs:
            self.success.labels(*self._labels, output.finish_reason or "abort").inc()
        if result.error is not None:
            self.corrupted.inc()
        scheduled, first = metrics.first_scheduled_time, metrics.first_token_time
        if scheduled is not None:
            self.queue_time.observe(scheduled - metrics.arrival_time)
            self.inference_time.observe(metrics.finished_time - scheduled)
            if first is not None:
                self.prefill_time.observe(first - scheduled)
                self.decode_time.observe(metrics.finished_time - first)
        per_second = metrics.tokens_per_second
        if per_second:
            self.per_token.observe(1.0 / per_second)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry)
        return gauge.labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, _LABELS, registry=self.registry)
        return counter.labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry
        )
        return histogram.labels(*self._labels)

    def _make_gauges(self) -> None:
        self.running = self._gauge("num_requests_running", "Sequences in execution.")
        self.waiting = self._gauge("num_requests_waiting", "Sequences waiting.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "KV cache in use; 1 is all of it.")
        names = (*_LABELS, "reason")
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting; octavo defers none for another reason than capacity.",
            names,
            registry=self.registry,
        )
        self.waiting_for_capacity = by_reason.labels(*self._labels, "capacity")
        by_reason.labels(*self._labels, "deferred")
        exactly = Gauge(
            "octavo:num_requests_waiting_for",
            "Sequences waiting, under what the first of them waits for.",
            names,
            registry=self.registry,
        )
        self.waiting_by_reason = {
            reason: exactly.labels(*self._labels, reason) for reason in WAITING_REASONS
        }

    def _make_counters(self) -> None:
        self.preemptions = self._counter("num_preemptions", "Preemptions.")
        self.cached_tokens = self._counter(
            "prompt_tokens_cached", "Prompt tokens that the prefix cache had, of ended requests."
        )
        self.cache_queries = self._counter(
            "prefix_cache_queries", "Tokens that the prefix cache was asked for."
        )
        self.cache_hits = self._counter("prefix_cache_hits", "Those of them that it had.")
        self.evictions = Counter(
            "octavo:kv_cache_evictions",
            "Cached blocks that were given to others.",
            _LABELS,
            registry=self.registry,
        ).labels(*self._labels)
        self.tokens_by_source = self._labelled(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of ended requests, by source.",
            "source",
            ("local_compute", "local_cache_hit"),
        )
        self.preemptions_by_reason = self._labelled(
            "octavo:preemptions",
            "Preemptions, by what the blocks were taken for.",
            "reason",
            ("kv_blocks", "priority"),
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.corrupted = self._counter(
            "corrupted_requests", "Requests that a NaN, or another error of their own, ended."
        )
        self.success = self._labelled(
            "vllm:request_success",
            "Answers that ended, by reason.",
            "finished_reason",
            ("stop", "length", "abort", "error", "timeout"),
        )
        self.rejections = self._labelled(
            "vllm:admission_rejections",
            "Requests turned away, by reason.",
            "reason",
            ("queue_full", "unavailable"),
        )

    def _labelled(self, name: str, text: str, label: str, values: Sequence[str]) -> Counter:
        """A counter with one label more, each of whose values stands at 0 from the start."""
        counter = Counter(name, text, (*_LABELS, label), registry=self.registry)
        for value in values:
            counter.labels(*self._labels, value)
        return counter

    def _make_histograms(self, max_model_len: int) -> None:
        make, tokens = self._histogram, token_buckets(max_model_len)
        self.ttft = make("time_to_first_token_seconds", "From arrival to the first token.", _TTFT)
        self.between_tokens = make(
            "inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN_TOKENS
        )
        self.per_token = make(
            "request_time_per_output_token_seconds",
            "A request's mean time for each token after the first.",
            _BETWEEN_TOKENS,
        )
        self.e2e = make("e2e_request_latency_seconds", "From arrival to the end.", _LATENCY)
        self.queue_time = make("request_queue_time_seconds", "Spent waiting.", _LATENCY)
        self.prefill_time = make("request_prefill_time_seconds", "Spent in prefill.", _LATENCY)
        self.decode_time = make("request_decode_time_seconds", "Spent in decode.", _LATENCY)
        self.inference_time = make("request_inference_time_seconds", "Spent running.", _LATENCY)
        self.request_prompt = make("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self.request_generation = make(
            "request_generation_tokens", "Tokens generated for a request.", tokens
        )
        self.max_tokens = make("request_params_max_tokens", "The max_tokens asked for.", tokens)
        self.num_answers = make("request_params_n", "The n asked for.", (1, 2, 5, 10, 20))
        self.computed_tokens = make(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", tokens
        )
        self.iteration_tokens = make("iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS)
        self.request_preemptions = make(
            "request_num_preemptions", "Preemptions of a request.", (0, 1, 2, 5, 10, 20)
        )

    def _describe_cache(self, engine: Engine) -> None:
        names = ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
        info = Gauge(
            "vllm:cache_config_info",
            "How the KV cache is set up.",
            (*names, "engine"),
            registry=self.registry,
        )
        options = engine.options
        values = (options.block_size, engine.blocks.num_blocks, options.kv_dtype)
        info.labels(*map(str, (*values, options.enable_prefix_caching)), "0").set(1)
