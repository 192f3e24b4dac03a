"""Structured outputs in the engine: the same answers in any batch, and no request harms another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import run_to_end
from text_helpers import byte_level_directory, sentencepiece_directory, tiny_model

from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.errors import InvalidArgumentError
from octavo.grammar.matcher import Matcher
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputs

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
JSON = StructuredOutputs(json=SCHEMA, whitespace_pattern=" ")
NUMBER = StructuredOutputs(regex=r"\d{3}-\d{4}")
WORD = StructuredOutputs(choice=["the ship", "the sea", "Paris"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context=1024)


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, load_format="dummy", num_threads=1, **options)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return load(folder)


def asked(seed: int, wanted: StructuredOutputs | None, **options: Any) -> SamplingParams:
    given = {"temperature": 1.5, "max_tokens": 200, "seed": seed, **options}
    return SamplingParams(structured_outputs=wanted, **given)


MIXED = [
    asked(i, wanted, max_tokens=60 + i, ignore_eos=wanted is None)
    for i, wanted in enumerate([None, JSON, None, None, JSON, NUMBER, WORD, None] * 2)
]
PROMPTS = [f"{'The ship ' * (i % 5)}of {i}" for i in range(16)]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[tuple[int, ...]]:
    """The tokens of each of MIXED, one request at a time."""
    return [
        llm.generate(prompt, params, progress=False)[0].outputs[0].token_ids
        for prompt, params in zip(PROMPTS, MIXED, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap_steps": False},
        {"max_num_batched_tokens": 16},
        {
            "num_kv_blocks": 8,
            "max_model_len": 128,
            "block_size": 16,
        },  # too few for all: some are preempted
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_the_answers_are_those_of_requests_alone(
    folder: Path, alone: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    llm = load(folder, **options)
    outputs = llm.generate(PROMPTS, MIXED, progress=False)
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert (llm.engine.stats().num_preemptions > 0) == ("num_kv_blocks" in options)
    for output, params in zip(outputs, MIXED, strict=True):
        check(output.outputs[0], params)


@needs_cuda
def test_on_the_gpu(folder: Path) -> None:
    llm = load(folder, device=DEVICE)
    outputs = llm.generate(PROMPTS, MIXED, progress=False)
    for output, params in zip(outputs, MIXED, strict=True):
        check(output.outputs[0], params)


def check(answer: Any, params: SamplingParams) -> None:
    """A finished text is what was asked for."""
    wanted = params.structured_outputs
    if wanted is None or answer.finish_reason == "length":
        return
    assert answer.finish_reason == "stop" and answer.stop_reason is None
    if wanted == JSON:
        assert list(json.loads(answer.text)) == ["name", "sizes"]
    elif wanted == NUMBER:
        assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", answer.text)
    else:
        assert answer.text in ("the ship", "the sea", "Paris")


def test_n_answers_follow_it_each_on_its_own(llm: LLM) -> None:
    (output,) = llm.generate("a", asked(3, WORD, n=12, temperature=100), progress=False)
    texts = {answer.text for answer in output.outputs}
    assert texts <= {"the ship", "the sea", "Paris"} and len(texts) > 1


def test_a_stream_gives_the_text_as_it_grows(llm: LLM) -> None:
    chunks = list(llm.stream("a", asked(5, NUMBER)))
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", "".join(chunk.text for chunk in chunks))
    assert len(chunks) > 3


def test_the_end_comes_only_where_the_grammar_may_end(llm: LLM) -> None:
    """A strong wish to end, or never to, makes no difference to the grammar."""
    (eos,) = llm.engine.eos_token_ids
    for bias in (100, -100):
        params = asked(1, NUMBER, logit_bias={eos: bias})
        (output,) = llm.generate("a", params, progress=False)
        assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", output.text)
    many = StructuredOutputs(regex="(ab)+")
    (output,) = llm.generate("a", asked(1, many, logit_bias={eos: 100}), progress=False)
    assert output.text == "ab"


def test_max_tokens_cut_the_text(llm: LLM) -> None:
    (output,) = llm.generate("a", asked(1, JSON, max_tokens=4), progress=False)
    assert output.outputs[0].finish_reason == "length" and output.text[0] == "{"


def test_min_tokens_make_it_longer_where_it_can_be(llm: LLM) -> None:
    many = StructuredOutputs(regex="(ab)*")
    (eos,) = llm.engine.eos_token_ids
    params = asked(1, many, min_tokens=7, logit_bias={eos: 100}, temperature=0)
    (output,) = llm.generate("a", params, progress=False)
    assert len(output.outputs[0].token_ids) in (8, 9) and re.fullmatch("(ab)+", output.text)
    (output,) = llm.generate("a", asked(1, WORD, min_tokens=50), progress=False)
    assert output.text in ("the ship", "the sea", "Paris")  # which cannot be longer


def test_stop_tokens_and_stop_strings(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    other = tokenizer.token_id("<|endoftext|>")
    assert other is not None
    (eos,) = llm.engine.eos_token_ids
    params = asked(1, NUMBER, stop_token_ids=[other], logit_bias={other: 100, eos: -100})
    (output,) = llm.generate("a", params, progress=False)
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", output.text)
    assert output.outputs[0].stop_reason == other
    (output,) = llm.generate("a", asked(1, NUMBER, stop="-"), progress=False)
    assert re.fullmatch(r"[0-9]{3}", output.text) and output.outputs[0].stop_reason == "-"


def test_what_does_not_go_together(llm: LLM, folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="ignore_eos is True beside"):
        llm.generate("a", asked(1, NUMBER, ignore_eos=True), progress=False)
    with pytest.raises(InvalidArgumentError, match="prompt 1: .*at its root: Invalid type"):
        bad = asked(1, StructuredOutputs(json={"type": "strin"}))
        llm.generate(["a", "b"], [asked(1, NUMBER), bad], progress=False)
    with pytest.raises(InvalidArgumentError, match="structured_outputs has 'x'"):
        SamplingParams(structured_outputs={"x": 1})
    with pytest.raises(InvalidArgumentError, match="structured_outputs is 5"):
        SamplingParams(structured_outputs=5)  # type: ignore[arg-type]
    engine = llm.engine
    without = Engine(
        engine.runtime, engine.options, num_kv_blocks=64, vocab_size=512, eos_token_ids=(2,)
    )
    with pytest.raises(InvalidArgumentError, match="this model has no tokenizer"):
        without.check_request([1], asked(1, NUMBER))
    endless = Engine(
        engine.runtime, engine.options, num_kv_blocks=64, vocab_size=512, tokenizer=llm.tokenizer
    )
    with pytest.raises(InvalidArgumentError, match="no token that ends a text"):
        endless.check_request([1], asked(1, NUMBER))


def test_a_matcher_that_fails_ends_its_own_request_alone(
    llm: LLM, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = Matcher.allowed

    def failing(self: Matcher) -> Any:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls == 20:  # type: ignore[attr-defined]
            raise ValueError("too ambiguous")
        return allowed(self)

    failing.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Matcher, "allowed", failing)
    outputs = llm.generate(PROMPTS, MIXED, progress=False)
    failed = [output for output in outputs if output.error is not None]
    assert len(failed) == 1 and "ValueError: too ambiguous" in str(failed[0].error)
    assert failed[0].outputs[0].finish_reason == "error"
    for output, tokens in zip(outputs, alone, strict=True):
        assert output.error is not None or output.outputs[0].token_ids == tokens


def test_a_mask_that_is_one_token_off_is_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: these tests see it."""
    allowed = Matcher.allowed

    def shifted(self: Matcher) -> Any:
        words, may_end = allowed(self)
        words[:] = (words << 1) | np.append(0, words[:-1] >> 31).astype(np.uint32)
        return words, may_end

    monkeypatch.setattr(Matcher, "allowed", shifted)
    outputs = llm.generate(["a"] * 8, [asked(i, NUMBER) for i in range(8)], progress=False)
    assert all(output.error is not None for output in outputs)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_sentencepiece_model_writes_what_is_asked(tmp_path: Path, is_chat: bool) -> None:
    """Its first token brings no space in a chat, and one in a completion."""
    tiny_model(tmp_path, "{{ messages[0].content }}", context=256)
    sentencepiece_directory(tmp_path, chat_template="{{ messages[0].content }}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 640}))
    llm = load(tmp_path)
    wanted = StructuredOutputs(choice=["the ship", " the ship", "Paris"])
    params = [asked(i, wanted, temperature=100) for i in range(30)]
    if is_chat:
        talks = [[{"role": "user", "content": "a"}]] * 30
        outputs = llm.chat(talks, params, progress=False)
    else:
        outputs = llm.generate(["a"] * 30, params, progress=False)
    assert {output.text for output in outputs} <= {"the ship", " the ship", "Paris"}
    assert len({output.text for output in outputs}) >= 2


def test_an_engine_that_is_driven_by_hand(tmp_path: Path, llm: LLM) -> None:
    byte_level_directory(tmp_path)
    engine = load(tiny_model(tmp_path)).engine
    assert isinstance(engine.options, RuntimeOptions)
    engine.add_request("x", [5, 6], asked(1, NUMBER))
    text = run_to_end(engine)["x"].text
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", text)
    assert engine.grammars.num_compiled == 1
