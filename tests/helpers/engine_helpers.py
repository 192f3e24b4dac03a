"""Engines over a fake runtime, and what their answers must be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_runtime import (
    EOS,
    NAN_TOKEN,
    ROPE_MARK,
    VOCAB,
    FakeBatch,
    FakeRuntime,
    draw,
    rank_of,
    top_tokens,
)

from octavo.config import RuntimeOptions
from octavo.engine.drafter import Drafter
from octavo.engine.engine import Engine
from octavo.engine.outputs import OutputChunk, RequestOutput, TokenLogprob
from octavo.engine.request import Sequence as EngineSequence
from octavo.errors import InvalidArgumentError, WeightsError
from octavo.models.adapter import Adapter, LowRank
from octavo.sampling_params import SamplingParams


@dataclass
class FakeDrafter(Drafter):
    """Proposes up to num_drafts tokens, of which the share `right` is what the answer goes on with.

    future: the tokens that a sequence's answer goes on with, as many as asked for, or fewer.
    num_branches: other chains, which leave the first one at some place, and are right from there on
    as often as drafts are.
    """

    future: Callable[[EngineSequence, int], Sequence[int]]
    num_drafts: int = 4
    right: float = 1.0
    wrong: int = NAN_TOKEN
    num_proposed: int = 0
    num_branches: int = 0

    def propose(self, sequence: EngineSequence) -> list[int]:
        position = sequence.num_tokens
        drafts = list(self.future(sequence, hash((position, self.num_drafts)) % 8))
        for index in range(len(drafts[: self.num_drafts])):
            if hash((position, index, self.num_drafts)) % 100 >= 100 * self.right:
                drafts[index] = self.wrong if index % 2 else (drafts[index] + 1) % (VOCAB - 1)
        self.num_proposed += len(drafts[: self.num_drafts])
        return drafts[: self.num_drafts]

    def branches(self, sequence: EngineSequence) -> list[list[int]]:
        if not self.num_branches:
            return []
        position, num_proposed = sequence.num_tokens, self.num_proposed
        first = self.propose(sequence)
        self.num_proposed = num_proposed
        future = list(self.future(sequence, len(first) + 2))
        chains: dict[int, list[int]] = {}
        for index in range(self.num_branches if first else 0):
            place = hash((position, index)) % len(first)
            chain = [*first[:place], *future[place:]][: len(first) + index % 3 - 1]
            if hash((position, index, 1)) % 100 >= 100 * self.right and chain[place:]:
                chain[-1] = (chain[-1] + 7) % (VOCAB - 1)
            chains[place] = chain
        # The order of a walk: those that leave the first chain last come first.
        return [chains[place] for place in sorted(chains, reverse=True)]


def fake_future(sequence: EngineSequence, count: int) -> list[int]:
    """What the fake model goes on with."""
    history, params = list(sequence.token_ids), sequence.params
    sampling = (params.temperature, params.top_k, params.top_p, params.min_p)
    for _ in range(count):
        history.append(draw(history, sampling, params.seed or 0, sequence.sample_index)[0])
    return history[sequence.num_tokens :]


def check_published(engine: Engine) -> None:
    """Every block that can be found by its name holds the tokens that the name stands for."""
    runtime = engine.runtime
    assert isinstance(runtime, FakeRuntime)
    size = engine.options.block_size
    for sequence in engine.scheduler._running:
        for index, name in enumerate(sequence.block_hashes[: sequence.num_published_blocks]):
            mark = ROPE_MARK * sequence.rope_set
            own = [mark + token for token in sequence.token_ids[index * size : (index + 1) * size]]
            for group in range(len(runtime.kv_windows)):
                block = engine.blocks.pool.find(name, group)
                assert block is None or runtime.slots[block, :, 0].tolist() == own
                assert block is None or set(runtime.slots[block, :, 2].tolist()) == {group}


def fake_options(**changes: Any) -> RuntimeOptions:
    """Small limits, which `changes` override."""
    values: dict[str, Any] = {
        "dtype": "f32",
        "kv_dtype": "f32",
        "block_size": 4,
        "max_model_len": 48,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 11,
    }
    return RuntimeOptions(**{**values, **changes})


def fake_engine(
    num_blocks: int = 40,
    kv_windows: tuple[int, ...] = (0,),
    tokenizer: Any = None,
    eos: Sequence[int] = (EOS,),
    seed: int = 3,
    clock: Callable[[], float] = time.monotonic,
    drafter: Drafter | None = None,
    read_adapter: Callable[[Path], Adapter] | None = None,
    **options: Any,
) -> Engine:
    """An engine over a fake runtime."""
    resolved = fake_options(**options)
    most = resolved.max_num_seqs + resolved.num_spare_seqs  # as the loader makes the real one
    return Engine(
        FakeRuntime(replace(resolved, max_num_seqs=most), num_blocks, kv_windows),
        resolved,
        num_kv_blocks=num_blocks,
        vocab_size=VOCAB,
        kv_windows=kv_windows,
        tokenizer=tokenizer,
        eos_token_ids=eos,
        seed=seed,
        make_batch=FakeBatch,
        clock=clock,
        drafter=drafter,
        read_adapter=read_adapter,
    )


def fake_adapter(path: Path) -> Adapter:
    """The adapter in the folder 7 makes another model of the fake one than that in the folder 8."""
    if not path.name.isdecimal():
        raise WeightsError(f"the adapter in {path} is damaged")
    a = np.full((1, VOCAB), int(path.name), np.float32)
    return Adapter(str(path), {"embed": LowRank(a, np.ones((4, 1), np.float32), 1.0)})


class ManualClock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class ExpectedAnswer:
    """What one answer must be, computed with no engine at all."""

    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | None
    logprobs: tuple[TokenLogprob, ...] | None


def solo_answer(
    prompt: Sequence[int],
    params: SamplingParams,
    sample_index: int = 0,
    max_model_len: int = 48,
    eos: Sequence[int] = (EOS,),
) -> ExpectedAnswer:
    """The fake model alone in a loop: token ids, why it ended, log-probabilities."""
    history = list(prompt)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    sampling = (params.temperature, params.top_k, params.top_p, params.min_p)
    logprobs: list[TokenLogprob] = []
    reason, stop_reason = "length", None
    limit = min(len(prompt) + params.max_tokens, max_model_len)
    while len(history) < limit:
        if NAN_TOKEN in history:
            reason = "error"
            break
        num_drawn = len(history) - len(prompt)
        forbidden = frozenset(stops) if num_drawn < params.min_tokens else frozenset()
        token, logprob = draw(history, sampling, params.seed or 0, sample_index, forbidden)
        if params.logprobs is not None:
            tops = top_tokens(history, params.logprobs)
            logprobs.append(TokenLogprob(token, logprob, *tops, rank_of(history, token)))
        history.append(token)
        if token in stops:
            reason = "stop"
            stop_reason = token if token in params.stop_token_ids else None
            break
    found = None if params.logprobs is None else tuple(logprobs)
    return ExpectedAnswer(tuple(history[len(prompt) :]), reason, stop_reason, found)


def check_answers(output: RequestOutput, params: SamplingParams, max_model_len: int = 48) -> None:
    """Every answer of a finished request is the one the fake model gives alone."""
    assert [answer.index for answer in output.outputs] == list(range(params.n))
    expected = [
        solo_answer(output.prompt_token_ids, params, index, max_model_len)
        for index in range(params.n)
    ]
    if any(answer.finish_reason == "error" for answer in expected):
        assert output.error is not None
        assert {answer.finish_reason for answer in output.outputs} <= {"error", "stop", "length"}
        assert "error" in {answer.finish_reason for answer in output.outputs}
        return
    for answer, solo in zip(output.outputs, expected, strict=True):
        assert answer.token_ids == solo.token_ids
        assert answer.finish_reason == solo.finish_reason
        assert answer.stop_reason == solo.stop_reason
        assert answer.logprobs == solo.logprobs


def run_to_end(
    engine: Engine,
    max_steps: int = 10_000,
    on_chunk: Callable[[OutputChunk], None] = lambda chunk: None,
) -> dict[str, RequestOutput]:
    """Step until nothing is left; the outputs by request id."""
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests:
            return outputs
        steps = engine.num_steps
        for chunk in engine.step():
            on_chunk(chunk)
            if chunk.result is not None:
                outputs[chunk.request_id] = chunk.result
        engine.check_integrity()
        assert engine.num_steps == steps + 1, "a step with requests unfinished computed nothing"
    raise AssertionError(f"{len(engine._requests)} requests never ended")


def is_refused(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> str | None:
    """The message with which the engine refuses a request, None where it accepts it."""
    try:
        engine.check_request(prompt, params)
    except InvalidArgumentError as error:
        return str(error)
    return None


def plain_tokenizer_directory(directory: Path, vocab_size: int = VOCAB) -> Path:
    """A tokenizer whose token i is one character, the i-th from "!" on; EOS is special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(
        models.BPE({chr(33 + i): i for i in range(vocab_size)}, [], unk_token=None)
    )
    tokenizer.decoder = decoders.Fuse()
    special = AddedToken(chr(33 + EOS), special=True, normalized=False)
    tokenizer.add_special_tokens([special])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
