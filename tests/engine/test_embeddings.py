"""Embeddings: vectors beside the reference's, the promise about bits, requests, and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import random_adapter, write_adapter
from cuda_helpers import DEVICE, needs_cuda
from embedding_helpers import (
    LIMITS,
    WINDOWED,
    prompts,
    vectors_by_hand,
    write_embedding_model,
)
from engine_helpers import run_to_end
from rank_helpers import DIVISIBLE, ended_ranks
from weights_helpers import random_weights, write_model

from octavo import LLM, AsyncLLM, SamplingParams
from octavo.engine.engine import Engine
from octavo.engine.pooling import (
    EMBED,
    Pooled,
    PoolingEngine,
    Recorder,
    embedding_of,
    normalized,
)
from octavo.errors import EngineStepError, InvalidArgumentError, UnsupportedModelError
from octavo.model import load_model
from octavo.models.pooling import Pooling

KINDS = ("last", "mean", "first")
TOLERANCE = 2e-6  # of states near 1: float32 sums in another order than the reference's
LENGTHS = (1, 3, 16, 33, 61, 100, 128)
MODELS: dict[str, dict[str, Any]] = {"plain": {}, "windows": WINDOWED}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models by kind of pooling and name, written once."""
    base = tmp_path_factory.mktemp("embeddings")

    @cache
    def folder(kind: str, model: str = "plain") -> Path:
        return write_embedding_model(base / f"{kind}-{model}", kind, **MODELS[model])

    return folder


def embed(llm: LLM, texts: Sequence[Sequence[int]], **options: Any) -> list[np.ndarray]:
    return [each.embedding for each in llm.embed(texts, progress=False, **options)]


def vector_of(output: Any, kind: str) -> np.ndarray:
    """Of a request that went to the engine itself."""
    return embedding_of(output, Pooling(96, kind), None)  # type: ignore[arg-type]


def equal(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> bool:
    """Whether all bits are the same."""
    pairs = list(zip(found, expected, strict=True))
    return all(one.tobytes() == other.tobytes() for one, other in pairs)


def alone(folder: Path, **options: Any) -> list[np.ndarray]:
    """Each text by itself and in one piece, nothing reused."""
    own = {**LIMITS, "max_num_batched_tokens": 128, "enable_prefix_caching": False, **options}
    llm = LLM(folder, **own)
    return [embed(llm, [text])[0] for text in prompts(*LENGTHS)]


@every_model
@every_kind
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_the_reference(
    tmp_path: Path, kind: str, model: str, normalize: bool
) -> None:
    folder = write_embedding_model(tmp_path / "model", kind, normalize, **MODELS[model])
    llm, texts = LLM(folder, **LIMITS), prompts(*LENGTHS)
    expected = vectors_by_hand(folder, texts, Pooling(96, kind, normalize))  # type: ignore[arg-type]
    assert llm.pooling == Pooling(96, kind, normalize)  # type: ignore[arg-type]
    for found, vector in zip(embed(llm, texts), expected, strict=True):
        assert found.dtype == np.float32 and found.shape == (96,)
        np.testing.assert_allclose(found, vector, atol=TOLERANCE * (1 if normalize else 4), rtol=0)


@every_model
@every_kind
def test_neither_company_nor_chunks_change_a_bit(folders: Any, kind: str, model: str) -> None:
    folder = folders(kind, model)
    expected, texts = alone(folder), prompts(*LENGTHS)
    for chunk in (1, 7, 64):
        llm = LLM(folder, **{**LIMITS, "max_num_batched_tokens": chunk})
        assert equal(embed(llm, texts), expected), chunk
    llm = LLM(folder, **LIMITS, overlap_steps=True)  # two steps in flight
    assert equal(embed(llm, texts * 5), expected * 5)
    llm = LLM(folder, **{**LIMITS, "num_threads": 2})
    assert equal(embed(llm, texts), expected)


@every_model
@every_kind
def test_a_prefix_hit_changes_no_bit(folders: Any, kind: str, model: str) -> None:
    """Only the last token's vector may begin with what others have computed."""
    folder = folders(kind, model)
    llm, texts = LLM(folder, **LIMITS), prompts(*LENGTHS)
    expected = alone(folder)
    assert equal(embed(llm, texts), expected)
    again = llm.embed(texts, progress=False)
    assert equal([each.embedding for each in again], expected)
    cached = [each.metrics.num_cached_tokens for each in again]
    assert (max(cached) >= 112) == (kind == "last") == any(cached)


@every_model
@every_kind
def test_a_preemption_changes_no_bit(folders: Any, kind: str, model: str) -> None:
    """Half-way through its prompt a request gives its only place to an urgent one."""
    folder, texts = folders(kind, model), prompts(*LENGTHS)
    expected = alone(folder)
    engine = load_model(folder, **{**LIMITS, "max_num_seqs": 1, "max_num_batched_tokens": 9}).engine
    engine.add_request("late", texts[-1], EMBED, priority=1)
    outputs: dict[str, Any] = {}
    for length in (0, 3):  # twice
        for _ in range(5):
            outputs |= {chunk.request_id: chunk.result for chunk in engine.step()}
        engine.add_request(f"urgent{length}", texts[length], EMBED)
    outputs |= run_to_end(engine)
    assert outputs["late"].metrics.num_preemptions == 2
    found = [vector_of(outputs[name], kind) for name in ("late", "urgent0", "urgent3")]
    assert equal(found, [expected[-1], expected[0], expected[3]])


def test_a_step_that_fails_is_computed_again(folders: Any) -> None:
    llm, texts = LLM(folders("mean"), **{**LIMITS, "max_num_batched_tokens": 16}), prompts(*LENGTHS)
    engine, failing = llm.engine, [3, 5]
    wait = engine.runtime.wait

    def failing_wait(ticket: int) -> Any:
        output = wait(ticket)
        if engine.num_steps in failing:
            failing.remove(engine.num_steps)
            raise RuntimeError("a device failed")
        return output

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return failing_wait if name == "wait" else getattr(runtime, name)

    runtime = engine.runtime
    engine._pipeline._runtime = Failing()  # type: ignore[assignment]
    engine.add_request("whole", texts[-1], EMBED)
    outputs = {}
    while engine.has_unfinished_requests:
        try:
            outputs |= {chunk.request_id: chunk.result for chunk in engine.step()}
        except RuntimeError:
            engine.check_integrity()
    assert not failing
    assert equal([vector_of(outputs["whole"], "mean")], alone(folders("mean"))[-1:])


def test_no_step_multiplies_by_the_head(folders: Any) -> None:
    llm = LLM(folders("last"), **LIMITS)
    make, rows = llm.engine._pipeline._make_batch, []

    def watched(**arrays: Any) -> Any:
        rows.append(len(arrays["logit_rows"]))
        return make(**arrays)

    llm.engine._pipeline._make_batch = watched
    embed(llm, prompts(*LENGTHS))
    assert len(rows) > 3 and not any(rows)
    assert llm.engine.stats().num_sampled_tokens == 0


class TakesTheTokenBefore(Recorder):
    def _take(self, sequence: Any, start: int, rows: Any) -> None:
        super()._take(
            sequence, start, rows[[*range(len(rows) - 2), -1, -2]] if len(rows) > 1 else rows
        )


class AddsOneTooMany(Recorder):
    def _take(self, sequence: Any, start: int, rows: Any) -> None:
        super()._take(sequence, start, rows)
        if isinstance(sequence.drafting, Pooled) and self.pooling.kind == "mean":
            sequence.drafting.values += rows[-1]


class MixesSequences(Recorder):
    def end_step(self, schedule: Any, output: Any, seconds: float) -> None:
        rolled = output.states[::-1].copy()
        super().end_step(schedule, type("Output", (), {"states": rolled}), seconds)


class NeverBeginsAnew(Recorder):
    def _take(self, sequence: Any, start: int, rows: Any) -> None:
        before = sequence.drafting
        super()._take(sequence, start, rows)
        if before is not None and start == 0:
            sequence.drafting.values += before.values


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (TakesTheTokenBefore, "last"),
        (AddsOneTooMany, "mean"),
        *[(MixesSequences, kind) for kind in KINDS],
    ],
)
def test_a_planted_error_is_seen(folders: Any, wrong: type[Recorder], kind: str) -> None:
    folder, texts = folders(kind), prompts(*LENGTHS)
    llm = LLM(folder, **LIMITS)
    plant(llm.engine, wrong)
    expected = vectors_by_hand(folder, texts, Pooling(96, kind))  # type: ignore[arg-type]
    worst = max(np.abs(np.subtract(embed(llm, texts), expected)).ravel())
    assert worst > 100 * TOLERANCE


def test_a_planted_error_after_a_preemption_is_seen(folders: Any) -> None:
    engine = load_model(
        folders("mean"), **{**LIMITS, "max_num_seqs": 1, "max_num_batched_tokens": 9}
    ).engine
    plant(engine, NeverBeginsAnew)
    texts = prompts(*LENGTHS)
    engine.add_request("late", texts[-1], EMBED, priority=1)
    for _ in range(5):
        engine.step()
    engine.add_request("urgent", texts[3], EMBED)
    outputs = run_to_end(engine)
    assert outputs["late"].metrics.num_preemptions == 1
    assert not equal([vector_of(outputs["late"], "mean")], alone(folders("mean"))[-1:])


def plant(engine: Engine, wrong: type[Recorder]) -> None:
    assert isinstance(engine, PoolingEngine)
    recorder = wrong(engine.pooling)
    engine.drafter = engine.scheduler.drafter = engine.recorder = recorder


def test_dimensions_are_the_first_numbers_normalized_anew(folders: Any, tmp_path: Path) -> None:
    texts = prompts(5, 40)
    llm = LLM(folders("last"), **LIMITS)
    whole = embed(llm, texts)
    assert equal(embed(llm, texts, dimensions=96), whole)
    for found, vector in zip(embed(llm, texts, dimensions=11), whole, strict=True):
        assert found.shape == (11,) and abs(np.linalg.norm(found) - 1) < 1e-6
        np.testing.assert_allclose(found, normalized(vector[:11]), rtol=1e-6)
    for wrong in (0, 97, -1, True, 2.0, "8"):
        with pytest.raises(InvalidArgumentError, match=r"dimensions is .*; expected 1 to 96"):
            llm.embed(texts, dimensions=wrong)  # type: ignore[arg-type]
    raw = LLM(write_embedding_model(tmp_path / "raw", normalize=False), **LIMITS)
    cut = embed(raw, texts, dimensions=11)
    assert equal(cut, [vector[:11] for vector in embed(raw, texts)])


def test_vectors_are_normalized_or_not_as_it_is_asked(folders: Any, tmp_path: Path) -> None:
    """The same bits as of a model whose files say so."""
    texts = prompts(5, 40)
    raw = LLM(write_embedding_model(tmp_path / "raw", "mean", normalize=False), **LIMITS)
    llm = LLM(folders("mean"), **LIMITS)
    for dimensions in (None, 11):
        for one, other in ((llm, raw), (raw, llm)):
            asked = bool(other.pooling and other.pooling.normalize)
            expected = embed(other, texts, dimensions=dimensions)
            found = embed(one, texts, dimensions=dimensions, normalize=asked)
            assert equal(found, expected) and found[0].dtype == np.float32
            assert not equal(embed(one, texts, dimensions=dimensions), expected)

    async def alone() -> Any:
        async with AsyncLLM(folders("mean"), **LIMITS) as concurrent:
            return (await concurrent.embed(texts[0], normalize=False)).embedding

    assert equal([asyncio.run(alone())], embed(raw, texts[:1]))


def test_prompts_that_cannot_be_embedded(folders: Any) -> None:
    llm = LLM(folders("last"), **LIMITS)
    assert llm.embed([], progress=False) == []
    (output,) = llm.embed(prompts(128)[0], progress=False)  # all that fits
    assert output.outputs.embedding is output.embedding and output.prompt is None
    for wrong, message in (
        ([[3] * 129], r"prompt is too long: it has 129 tokens; expected at most 128"),
        ([[3], []], "prompt 1: the prompt has no tokens"),
        ([""], r'the prompt is ""'),
        ([[3, 67]], r"token 1 of the prompt is 67; expected 0 to 66"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            llm.embed(wrong, progress=False)


def test_what_makes_texts_is_refused_by_an_embedding_model_and_the_other_way_round(
    folders: Any,
) -> None:
    llm = LLM(folders("last"), **LIMITS)
    params = SamplingParams(max_tokens=3)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=1)
    for ask in (
        lambda: llm.generate([3, 4], params, progress=False),
        lambda: llm.generate([3, 4], scored, progress=False),
        lambda: llm.stream([3, 4], params),
        lambda: llm.engine.add_request("a", [3, 4], params),
    ):
        with pytest.raises(InvalidArgumentError, match="gives embeddings and makes no texts"):
            ask()
    ((_, output),) = llm.generate_as_completed([("a", [3, 4], params)])
    assert "gives embeddings" in (output.error or "")
    with pytest.raises(InvalidArgumentError, match="draws no tokens"):
        LLM(folders("last"), **LIMITS, speculative_config={"method": "ngram"})
    writer = LLM(folders("last"), **LIMITS, runner="generate")
    assert len(writer.generate([3, 4], params, progress=False)[0].outputs[0].token_ids) == 3
    with pytest.raises(InvalidArgumentError, match="makes texts and gives no embeddings"):
        writer.embed([3, 4])
    with pytest.raises(InvalidArgumentError, match="runner is 'embed'; expected one of auto, gen"):
        LLM(folders("last"), runner="embed")


def test_states_that_are_no_numbers_end_their_request_alone(tmp_path: Path) -> None:
    folder = write_embedding_model(tmp_path / "model", "mean")
    config = json.loads((folder / "config.json").read_text())
    weights = random_weights(config, seed=3)
    weights["model.embed_tokens.weight"][5, 7] = np.nan
    write_model(folder, config, weights=weights)
    with pytest.warns(UserWarning, match="NaN"):
        engine = load_model(folder, **LIMITS).engine
    good, bad = [3, 4, 9], [3, 5, 9]
    engine.add_request("good", good, EMBED)
    engine.add_request("bad", bad, EMBED)
    outputs = run_to_end(engine)
    assert "hidden states hold a NaN" in (outputs["bad"].error or "")
    assert outputs["bad"].embedding is None and outputs["good"].error is None
    assert np.isfinite(outputs["good"].embedding).all()
    with pytest.warns(UserWarning, match="NaN"):
        llm = LLM(folder, **LIMITS)
    with pytest.raises(EngineStepError, match="hidden states hold a NaN"):
        llm.embed([good, bad], progress=False)
    assert len(llm.embed([good], progress=False)) == 1


def test_requests_that_end_early_have_no_vector(folders: Any) -> None:
    engine = load_model(folders("mean"), **{**LIMITS, "max_num_batched_tokens": 9}).engine
    engine.add_request("a", prompts(100)[0], EMBED)
    engine.step()
    output = engine.abort("a")
    assert output is not None and output.embedding is None
    assert output.outputs[0].finish_reason == "abort"
    engine.check_integrity()


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """The same vectors, whatever lies beside the layers."""
    texts = prompts(5, 40)
    whole = write_embedding_model(tmp_path / "whole")
    bare = write_embedding_model(tmp_path / "bare", headless=True, modules=False)
    assert equal(embed(LLM(bare, **LIMITS), texts), embed(LLM(whole, **LIMITS), texts))
    with pytest.raises(UnsupportedModelError, match="bare holds no head.*runner='pool"):
        LLM(bare, **LIMITS, runner="generate")


def test_an_adapter(folders: Any, tmp_path: Path) -> None:
    """Its vectors are others, and do not depend on what is beside them."""
    config = json.loads((folders("mean") / "config.json").read_text())
    adapter = write_adapter(tmp_path / "sql", random_adapter(config))
    llm, texts = LLM(folders("mean"), **LIMITS, adapters={"sql": adapter}), prompts(3, 33, 61)
    plain, adapted = embed(llm, texts), embed(llm, texts, adapter="sql")
    assert all(one @ other < 0.9999 for one, other in zip(plain, adapted, strict=True))
    for index, text in enumerate(texts):
        assert equal(embed(llm, [text], adapter="sql"), adapted[index : index + 1])
    assert equal(embed(llm, texts), plain)


def test_tasks_of_an_event_loop(folders: Any) -> None:
    texts, expected = prompts(*LENGTHS), alone(folders("mean"))

    async def ask() -> list[Any]:
        async with AsyncLLM(folders("mean"), **LIMITS) as llm:
            with pytest.raises(InvalidArgumentError, match="dimensions is 0"):
                await llm.embed(texts[0], dimensions=0)
            with pytest.raises(InvalidArgumentError, match="gives embeddings"):
                await llm.generate(texts[0])
            return await asyncio.gather(*(llm.embed(text) for text in texts))

    found = asyncio.run(ask())
    assert equal([output.outputs.embedding for output in found], expected)

    async def ask_a_writer() -> None:
        async with AsyncLLM(folders("mean"), **LIMITS, runner="generate") as llm:
            await llm.embed(texts[0])

    with pytest.raises(InvalidArgumentError, match="makes texts"):
        asyncio.run(ask_a_writer())


def test_two_ranks(tmp_path: Path) -> None:
    """Sums of the ranks' parts are rounded in another order than in one process."""
    texts = prompts(*LENGTHS[:5])
    for kind in KINDS:
        folder = write_embedding_model(tmp_path / kind, kind, headless=True, **DIVISIBLE)
        one = embed(LLM(folder, **LIMITS), texts)
        with ended_ranks(LLM(folder, **LIMITS, tensor_parallel_size=2)) as llm:
            two = embed(llm, texts)
            assert equal([embed(llm, [text])[0] for text in texts], two)
        np.testing.assert_allclose(two, one, atol=3e-6, rtol=0)


@needs_cuda
@every_model
@every_kind
def test_on_a_gpu(folders: Any, kind: str, model: str) -> None:
    """The same bits in any batch; in bfloat16 near the CPU's in float32."""
    folder, texts = folders(kind, model), prompts(3, 16, 33, 70)
    own = {**LIMITS, "device": DEVICE, "dtype": "bf16", "deterministic": True}
    whole = {**own, "max_num_batched_tokens": 128, "enable_prefix_caching": False}
    llm = LLM(folder, **whole, overlap_steps=False, enforce_eager=True)
    expected = [embed(llm, [text])[0] for text in texts]
    near = embed(LLM(folder, **LIMITS), texts)
    # Of numbers near 0.1 a bfloat16 keeps 2^-9 of each, through two layers.
    np.testing.assert_allclose(expected, near, atol=0.01, rtol=0)
    for chunk in (7, 64):
        llm = LLM(folder, **{**own, "max_num_batched_tokens": chunk})
        assert equal(embed(llm, texts), expected), chunk
        assert equal(embed(llm, texts), expected), chunk  # from the prefix cache, or a graph
