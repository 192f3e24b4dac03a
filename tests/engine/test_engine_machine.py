"""Random arrivals, aborts and preemptions over tiny caches, against the fake model alone.

No block is leaked or held twice, every request ends, and every answer is the one that its request
gets when it runs alone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from engine_helpers import (
    FakeDrafter,
    ManualClock,
    check_answers,
    check_published,
    fake_engine,
    fake_future,
    is_refused,
    run_to_end,
    solo_answer,
)
from fake_runtime import EOS, NAN_TOKEN, VOCAB, FakeRuntime
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from speculation_helpers import fake_drafting, ngram_drafting

from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.sampling_params import SamplingParams

MAX_MODEL_LEN = 40

# Prompts that often begin alike, and end where a block ends or not.
SYSTEM_PROMPTS = [[(7 * i + j * j) % (VOCAB - 1) for j in range(22)] for i in range(2)]
tokens = st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=MAX_MODEL_LEN + 2)
alike = st.builds(
    lambda which, kept, rest: [*SYSTEM_PROMPTS[which][:kept], *rest],
    st.integers(0, 1),
    st.sampled_from([3, 8, 12, 13, 20]),
    st.lists(st.integers(0, 1), max_size=6),
)
prompts = st.one_of(alike, alike, tokens, tokens.map(lambda prompt: [*prompt, NAN_TOKEN]))
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 3, 2**40]),
    top_p=st.sampled_from([0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.one_of(st.integers(0, 5), st.just(2**64 - 1)),
    max_tokens=st.integers(6, 30),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
    n=st.sampled_from([1, 1, 1, 3]),
)


drafters = st.builds(
    FakeDrafter,
    st.just(fake_future),
    num_drafts=st.integers(1, 6),
    right=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    num_branches=st.sampled_from([0, 0, 1, 4]),
)
speculators = st.one_of(
    st.builds(
        fake_drafting,
        num_blocks=st.integers(5, 60),
        error_every=st.sampled_from([0, 2, 5]),
        depth=st.integers(1, 6),
        adaptive=st.booleans(),
    ),
    st.builds(
        ngram_drafting,
        shortest=st.integers(1, 3),
        depth=st.integers(1, 6),
        adaptive=st.booleans(),
    ),
)


class EngineMachine(RuleBasedStateMachine):
    """What happens to an engine in use, in any order."""

    @initialize(
        num_blocks=st.integers(10, 24),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.sampled_from([1, 3, 7, 64]),
        kv_windows=st.sampled_from([(0,), (0, 1), (0, 3), (0, 8), (0, 100), (0, 13, 5)]),
        enable_prefix_caching=st.sampled_from([True, True, True, False]),
        overlap_steps=st.booleans(),
        rope_switch=st.sampled_from([0, 0, 7, 14, 23]),
        drafter=st.one_of(st.none(), drafters, speculators),
    )
    def start(self, num_blocks: int, kv_windows: tuple[int, ...], **options: Any) -> None:
        self.clock = ManualClock()
        num_blocks *= len(kv_windows)
        self.engine = fake_engine(
            num_blocks, kv_windows, clock=self.clock, max_model_len=MAX_MODEL_LEN, **options
        )
        self.num_in_flight = options["max_num_batched_tokens"] * (1 + options["overlap_steps"])
        self.num_blocks = num_blocks
        self.num_requests = 0
        self.running: dict[str, SamplingParams] = {}
        self.streamed: dict[tuple[str, int], list[OutputChunk]] = {}
        self.deadlines: dict[str, float] = {}

    @rule(
        prompt=prompts,
        params=sampling,
        stream=st.booleans(),
        priority=st.sampled_from([0, 0, 0, 1, -2]),
        timeout=st.sampled_from([None, None, None, 0.5, 5.0]),
        cache_salt=st.sampled_from([None, None, "tenant"]),
    )
    def arrive(
        self, prompt: list[int], params: SamplingParams, timeout: float | None, **options: Any
    ) -> None:
        if is_refused(self.engine, prompt, params):
            needed = min(len(prompt) + params.max_tokens, MAX_MODEL_LEN) - 1
            assert len(prompt) >= MAX_MODEL_LEN or self.most_blocks(needed) > self.num_blocks
            return
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        self.engine.add_request(request_id, prompt, params, timeout=timeout, **options)
        self.running[request_id] = params
        if timeout is not None:
            self.deadlines[request_id] = self.clock.now + timeout
        if options["stream"]:
            self.streamed.update({(request_id, index): [] for index in range(params.n)})

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks of 4 for the tokens: of a window those that it and the tokens in flight touch."""
        windows = self.engine.blocks.groups.windows
        held = [-(-(window + self.num_in_flight - 1) // 4) + 1 for window in windows]
        needed = -(-num_tokens // 4)
        return sum(min(needed, h) if w else needed for h, w in zip(held, windows, strict=True))

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.clock.now += 0.125
            for chunk in self.engine.step():
                self.take(chunk)
            self.engine.check_integrity()

    @precondition(lambda self: getattr(self, "running", None))
    @rule(when=st.sampled_from(["fail_next", "fail_wait"]))
    def fail_a_step(self, when: str) -> None:
        """A step that fails in the runtime can be repeated."""
        runtime = self.engine.runtime
        assert isinstance(runtime, FakeRuntime)
        setattr(runtime, when, RuntimeError("out of luck"))
        for _ in range(2):
            try:
                chunks = self.engine.step()
            except RuntimeError:
                self.engine.check_integrity()
                continue
            for chunk in chunks:
                self.take(chunk)
        setattr(runtime, when, None)

    @precondition(lambda self: getattr(self, "running", None))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        params = self.running.pop(request_id)
        output = self.engine.abort(request_id)
        assert output is not None
        assert self.engine.abort(request_id) is None
        self.check_cut_short(output, params, "abort")

    def check_cut_short(self, output: RequestOutput, params: SamplingParams, reason: str) -> None:
        for answer in output.outputs:
            solo = solo_answer(output.prompt_token_ids, params, answer.index, MAX_MODEL_LEN)
            assert answer.token_ids == solo.token_ids[: len(answer.token_ids)]
            assert answer.finish_reason in (reason, solo.finish_reason)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            check_published(self.engine)
            assert len(self.engine._requests) == len(self.running)
            for sequence in self.engine.scheduler._running:
                held = self.engine.blocks.blocks_of(sequence.key)
                assert len(held) <= self.most_blocks(MAX_MODEL_LEN)
            late = [r for r in self.running if self.deadlines.get(r, math.inf) < self.clock.now]
            assert not late, "a deadline passed, and the request still runs"

    def take(self, chunk: OutputChunk) -> None:
        if (chunk.request_id, chunk.index) in self.streamed:
            self.streamed[chunk.request_id, chunk.index].append(chunk)
        if chunk.result is not None:
            self.finish(chunk.result)

    def finish(self, output: RequestOutput) -> None:
        params = self.running.pop(output.request_id)
        if any(answer.finish_reason == "timeout" for answer in output.outputs):
            assert self.clock.now >= self.deadlines[output.request_id]
            self.check_cut_short(output, params, "timeout")
            return
        check_answers(output, params, MAX_MODEL_LEN)
        for answer in output.outputs:
            chunks = self.streamed.get((output.request_id, answer.index))
            if chunks is not None and output.error is None:
                assert tuple(t for c in chunks for t in c.token_ids) == answer.token_ids
                assert [c.finish_reason for c in chunks if c.finish_reason] == [
                    answer.finish_reason
                ]
                assert tuple(p for c in chunks for p in c.logprobs) == (answer.logprobs or ())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        run_to_end(self.engine, on_chunk=self.take)
        assert not self.running
        assert self.engine.blocks.num_free_blocks == self.num_blocks
        runtime = self.engine.runtime
        assert isinstance(runtime, FakeRuntime)
        assert runtime.max_tokens_seen <= self.engine.options.max_num_batched_tokens


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


@pytest.mark.parametrize("num_blocks", [12, 13, 17, 30, 200])
@pytest.mark.parametrize("overlap", [False, True])
def test_thirty_requests_in_a_small_cache(num_blocks: int, overlap: bool) -> None:
    engine = fake_engine(
        num_blocks, max_num_seqs=9, max_num_batched_tokens=16, overlap_steps=overlap
    )
    params = {}
    for i in range(30):
        prompt = [(i * i + 3 * j) % (VOCAB - 1) for j in range(1 + 5 * i % 17)]
        params[f"{i}"] = SamplingParams(
            temperature=i % 2, seed=i, max_tokens=31, ignore_eos=bool(i % 3), logprobs=i % 2
        )
        engine.add_request(f"{i}", prompt, params[f"{i}"])
    outputs = run_to_end(engine)
    assert outputs.keys() == params.keys()
    for request_id, output in outputs.items():
        check_answers(output, params[request_id])
    preemptions = sum(output.metrics.num_preemptions for output in outputs.values())
    assert (preemptions > 0) == (num_blocks < 200)


def test_planted_error_in_a_block_table_is_found() -> None:
    """The fake runtime is worth something: one slot shared by two sequences does not pass."""
    engine = fake_engine(max_num_seqs=2)
    engine.add_request("a", [1, 2, 3, 4, 6], SamplingParams(temperature=0, ignore_eos=True))
    engine.add_request("b", [9, 8, 7, 6, 4], SamplingParams(temperature=0, ignore_eos=True))
    engine.step()
    table = engine.blocks.block_table(("b", 0))
    own = table[0]
    table[0] = engine.blocks.block_table(("a", 0))[0]
    engine.step()
    table[0] = own
    output = run_to_end(engine)["b"]
    with pytest.raises(AssertionError):
        check_answers(output, SamplingParams(temperature=0, ignore_eos=True))


def test_eos_is_drawn_at_times() -> None:
    """Else the tests above would say little about stopping."""
    reasons = {
        solo_answer([i, i + 1], SamplingParams(temperature=0, max_tokens=40)).finish_reason
        for i in range(60)
    }
    assert reasons == {"stop", "length"}
    assert EOS != NAN_TOKEN
