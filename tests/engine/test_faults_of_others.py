"""What fails for one request, or in its drafts, leaves the others and the caches as they were."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import ManualClock, fake_engine, plain_tokenizer_directory, run_to_end
from fake_runtime import EOS
from invariance_helpers import first_layers, make_engine, prompt_of
from quantization_helpers import write_family_model

from octavo.draft_tree import read_tree
from octavo.engine.engine import Engine
from octavo.errors import InvalidArgumentError
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.search.beam import BeamSearch
from octavo.search.contrastive import Amateur
from octavo.search.params import BeamSearchParams
from octavo.search.similarity import ContrastiveSearch
from octavo.speculation.speculator import Speculator
from octavo.text.stream import StreamDecoder
from octavo.text.tokenizer import Tokenizer

PLAIN = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 48,
    "max_position_embeddings": 256,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1 + 0.7 * i for i in range(8)],
    },
}


def ask_beams(engine: Engine) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    search = BeamSearch(params, {EOS}, 4)
    engine.add_request("x", [1, 2, 3], params.sampling_params(), search=search)


@pytest.mark.parametrize("overlap", [False, True])
def test_beams_whose_text_cannot_be_made(tmp_path: Path, overlap: bool) -> None:
    plain_tokenizer_directory(tmp_path)
    without_text: set[int] = set()

    class Forgetful(Tokenizer):
        def token(self, token_id: int) -> str | None:
            if token_id in without_text:
                raise RuntimeError("no text")
            return super().token(token_id)

    def engine() -> Engine:
        tokenizer = Forgetful(tmp_path)
        return fake_engine(60, tokenizer=tokenizer, overlap_steps=overlap, max_num_seqs=8)

    alone = engine()
    alone.add_request("y", [7, 8, 9, 10], PLAIN)
    expected = run_to_end(alone)["y"].outputs[0].token_ids
    alone = engine()
    ask_beams(alone)
    of_beams = {t for each in run_to_end(alone)["x"].outputs for t in each.token_ids}
    without_text.update(of_beams - set(expected))
    both = engine()
    ask_beams(both)
    both.add_request("y", [7, 8, 9, 10], PLAIN)
    outputs = run_to_end(both)
    assert outputs["y"].outputs[0].token_ids == expected
    assert {each.finish_reason for each in outputs["x"].outputs} == {"error"}
    assert "no text" in str(outputs["x"].error)
    both.check_integrity()


def test_a_deadline_ends_a_request_whose_text_cannot_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_tokenizer_directory(tmp_path)
    clock = ManualClock()
    engine = fake_engine(60, tokenizer=Tokenizer(tmp_path), clock=clock, max_num_seqs=8)
    engine.add_request("x", [1, 2, 3], replace(PLAIN, max_tokens=40), timeout=5)
    broken: list[Any] = [answer._decoder for answer in engine._requests["x"]]
    engine.add_request("y", [7, 8, 9, 10], PLAIN)
    flush = StreamDecoder.flush

    def flush_or_fail(decoder: StreamDecoder) -> str:
        if decoder in broken:
            raise RuntimeError("no text")
        return flush(decoder)

    monkeypatch.setattr(StreamDecoder, "flush", flush_or_fail)
    ended = {}
    for step in range(1, 30):
        clock.now += 1
        for chunk in engine.step():
            if chunk.result is not None:
                ended[chunk.request_id] = step, chunk.result.outputs[0].finish_reason
    assert ended == {"x": (5, "timeout"), "y": (12, "length")}


class Failing:
    """A runtime one of whose calls fails."""

    def __init__(self, runtime: Any, name: str, number: int) -> None:
        self._runtime, self._name, self._left = runtime, name, number

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._runtime, name)
        if name != self._name:
            return found

        def fail_once(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise MemoryError("planted")
            return found(*arguments, **options)

        return fail_once


@pytest.mark.parametrize("name", ["submit", "wait"])
@pytest.mark.parametrize("number", [2, 5])
def test_a_failed_step_of_the_draft_model_keeps_no_blocks(name: str, number: int) -> None:
    source = first_layers(2)
    runtime: Any = Failing(source.loaded.runtime, name, number)
    source.loaded = replace(source.loaded, runtime=runtime)
    tree = read_tree([[0], [1], [0, 0], [1, 0]], 2)
    drafter = Speculator(source, 2, adaptive=False, tree=tree)
    engine = make_engine(drafter=drafter, num_spare_seqs=8, max_num_seqs=4)
    engine.add_request("0", prompt_of(20, seed=1), replace(PLAIN, max_tokens=30))
    errors = []
    while engine.has_unfinished_requests:
        try:
            engine.step()
        except MemoryError as error:
            errors.append(error)
    source.begin_step([])
    source.blocks.check_integrity()
    assert len(errors) == 1 and not source.blocks.holders()
    assert source.blocks.num_free_blocks == source.blocks.num_blocks


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_model(tmp_path_factory.mktemp("long") / "m", "phi3", **LONG_ROPE)


@pytest.mark.parametrize("method", ["layers", "draft_model"])
def test_drafts_of_a_model_whose_rope_changes_with_the_length(long_rope: Path, method: str) -> None:
    """One request begins beyond the length, one crosses it, and one stays below."""
    rng = random.Random(3)
    prompts = [[rng.randrange(60) for _ in range(count)] for count in (60, 30, 4)]
    params = [replace(PLAIN, max_tokens=30)] * 3
    own = {"method": "layers", "num_layers": 1} if method == "layers" else {"model": str(long_rope)}
    options: dict[str, Any] = {"max_model_len": 200, "num_threads": 1, "dtype": "f32"}
    plain = LLM(long_rope, **options).generate(prompts, params, progress=False)
    config = {**own, "num_speculative_tokens": 3, "adaptive": False}
    llm = LLM(long_rope, **options, speculative_config=config)
    drafted = llm.generate(prompts, params, progress=False)
    for before, after in zip(plain, drafted, strict=True):
        assert after.outputs[0].token_ids == before.outputs[0].token_ids
    stats = llm.engine.stats()
    if method == "draft_model":  # the model itself is always right, with the right frequencies
        assert stats.num_accepted_per_position[0] >= 0.9 * stats.num_drafts
    assert stats.num_drafts > 20


def test_contrastive_search_and_decoding_refuse_such_a_model(long_rope: Path) -> None:
    options: dict[str, Any] = {"max_model_len": 128, "num_threads": 1}
    with pytest.raises(InvalidArgumentError, match="max_model_len is 128.*at most 48"):
        ContrastiveSearch(long_rope, top_k=2, **options)
    ContrastiveSearch(long_rope, top_k=2, **{**options, "max_model_len": 48})
    llm = LLM(long_rope, num_kv_blocks=32, **options)
    with pytest.raises(InvalidArgumentError, match="max_model_len is 128.*at most 48"):
        Amateur(str(long_rope), llm.config, llm.engine.vocab_size)
