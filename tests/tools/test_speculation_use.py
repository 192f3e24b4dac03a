"""Speculation in use: the option in Python, on the command line, in the server, and the bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server_helpers import run, serving
from text_helpers import tiny_model

from octavo import LLM, SamplingParams
from octavo.bench.spec import KnownAnswers, SpecBench, bench_spec, tokens_of_step
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.engine.request import Sequence
from octavo.errors import InvalidArgumentError
from octavo.speculation.draft_model import DraftModelSource
from octavo.speculation.speculator import Speculator
from octavo.speculative_config import SpeculativeConfig, read_speculative_config
from octavo.trace.log_file import read_log
from octavo.trace.perfetto import perfetto_trace

WRONG = {
    '{"method": "ngram"': "is not JSON",
    "[1]": "expected an object",
    '{"method": "oracle"}': "method is 'oracle'; expected one of ngram, draft_model, layers",
    '{"num_speculative_tokens": 3}': "method is ''",
    '{"method": "ngram", "num_speculative_tokens": 0}': "is 0; expected an integer from 1 to 32",
    '{"method": "ngram", "num_speculative_tokens": true}': "is True; expected an integer",
    '{"method": "ngram", "prompt_lookup_max": 17}': "prompt_lookup_max is 17; expected",
    '{"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}': "from 1 to 2",
    '{"method": "ngram", "model": "x"}': "does not use it",
    '{"method": "draft_model"}': "no model: add it",
    '{"method": "layers"}': "no num_layers: add it",
    '{"method": "ngram", "tensor_parallel": 2}': "has no tensor_parallel; expected some of",
    '{"model": 3}': "model is 3; expected a text",
    '{"method": "ngram", "adaptive": 1}': "adaptive is 1; expected true or false",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_is_wrong_with_the_option_is_named(given: str) -> None:
    with pytest.raises(InvalidArgumentError, match=WRONG[given]):
        EngineConfig(speculative_config=given)


def test_the_option_in_all_its_forms() -> None:
    wanted = SpeculativeConfig("ngram", prompt_lookup_min=2, prompt_lookup_max=4)
    for given in ({"method": "ngram"}, '{"method": "ngram"}', wanted):
        assert EngineConfig(speculative_config=given).speculative_config == wanted
    assert read_speculative_config(None) is None
    assert SpeculativeConfig(model="small").method == "draft_model"
    one = SpeculativeConfig("ngram", prompt_lookup_max=1)
    assert (one.prompt_lookup_min, one.prompt_lookup_max) == (1, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("spec") / "tiny", context=640)


OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cpu",
    "dtype": "f32",
    "num_threads": 1,
    "max_num_seqs": 8,
}
PARAMS = SamplingParams(max_tokens=30, temperature=0.5, seed=4, ignore_eos=True, logprobs=1)


def load(model: Path, speculative_config: Any = None, **more: Any) -> LLM:
    return LLM(model, **{**OPTIONS, **more}, speculative_config=speculative_config)


METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1},
    "ngram_tree": {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 3},
    "draft_model": {"quantization": "int8"},
    "layers": {"method": "layers", "num_layers": 1},
    "layers_tree": {"method": "layers", "num_layers": 1, "num_branches": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_answers_stay_the_same(model: Path, method: str) -> None:
    config = {**METHODS[method], "num_speculative_tokens": 3, "adaptive": False}
    if method == "draft_model":
        config["model"] = str(model)
    plain, drafted = load(model), load(model, config)
    prompts = ["one two one two one", "a longer prompt with other words in it", "x"]
    expected = plain.generate(prompts, PARAMS, progress=False)
    found = drafted.generate(prompts, PARAMS, progress=False)
    assert [o.outputs for o in found] == [o.outputs for o in expected]
    stats = drafted.engine.stats()
    assert stats.num_draft_tokens > 0
    assert (stats.num_draft_branches > 0) == ("tree" in method)
    if method == "draft_model":
        assert stats.num_accepted_tokens > 0.8 * stats.num_draft_tokens
        assert stats.num_steps < plain.engine.stats().num_steps
    drafted.engine.check_integrity()


def test_memory_of_the_draft_model_is_planned_with_the_target_s(model: Path) -> None:
    """The two caches share what the fraction allows, and have the same number of tokens."""
    config = {"model": str(model), "num_speculative_tokens": 3}
    llm = load(model, config, num_kv_blocks=40)
    drafter = llm.engine.drafter
    assert isinstance(drafter, Speculator) and isinstance(drafter.source, DraftModelSource)
    assert drafter.source.blocks.num_blocks == llm.engine.blocks.num_blocks == 40
    # With twice the bytes for each block, a fraction holds half as many.
    fraction = 3e-6
    alone = load(model, kv_memory_fraction=fraction, max_model_len=16, max_num_seqs=4096)
    both = load(model, config, kv_memory_fraction=fraction, max_model_len=16, max_num_seqs=4096)
    assert 0.3 < both.engine.blocks.num_blocks / alone.engine.blocks.num_blocks < 0.7


def test_draft_models_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", context=640)
    content = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda token: vocabulary[token])[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(InvalidArgumentError, match=r"another vocabulary .* token 10\d is not"):
        load(model, {"model": str(other)})
    (other / "tokenizer.json").unlink()
    with pytest.raises(InvalidArgumentError, match="has no tokenizer, so whether"):
        load(model, {"model": str(other)})
    with pytest.raises(InvalidArgumentError, match="num_layers is 2; expected 1 to 1"):
        load(model, {"method": "layers", "num_layers": 2})
    # Neither has one: the numbers of tokens decide.
    bare = tiny_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    fields = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps({**fields, "vocab_size": 99}), "utf-8")
    with pytest.raises(InvalidArgumentError, match="99 tokens, .* has 512"):
        load(bare, {"model": str(other)})


def test_the_command_line_and_the_log(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, log = [], tmp_path / "events.jsonl"
    drafts = '{"method": "ngram", "adaptive": false, "num_branches": 2}'
    for more in ([], ["--speculative-config", drafts]):
        arguments = ["--load-format", "dummy", "--dtype", "f32", "--num-threads", "1", "-n", "60"]
        arguments += ["--ignore-eos", "--raw", "-q", "--event-log", str(log), *more]
        assert main(["generate", "a b a b a b", "--model", str(model), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    read = read_log(log)
    found = [record for record in read.records if record["event"] == "drafts"]
    assert found and all(r["num_accepted_tokens"] <= r["num_draft_tokens"] for r in found)
    slices = [e for e in perfetto_trace(read)["traceEvents"] if "drafts" in e.get("args", {})]
    assert len(slices) == len(found)
    # Drafts are no prompt tokens: a step that only decodes is named by its answers.
    assert {event["name"] for event in slices} == {"1"}
    wrong = ["generate", "x", "--model", str(model), "--speculative-config", "{}"]
    assert main(wrong) == 2
    assert "method is ''" in capsys.readouterr().err


def test_metrics_under_vllm_s_names(model: Path) -> None:
    drafts = {"model": str(model), "quantization": "int8", "adaptive": False, "num_branches": 3}
    llm = load(model, drafts)

    async def test() -> None:
        async with serving(llm, served_names=("tiny",)) as (client, _):
            before = (await client.get("/metrics")).text
            assert "vllm:spec_decode_num_drafts_total{" in before
            body = {
                "prompt": "a b a b a",
                "max_tokens": 40,
                "ignore_eos": True,
                "temperature": 0,
            }
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            text = (await client.get("/metrics")).text
        stats, labels = llm.engine.stats(), 'engine="0",model_name="tiny"'
        assert stats.num_accepted_tokens > 0
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            line = f"vllm:spec_decode_{name}_total{{{labels}}} {getattr(stats, name)}.0"
            assert line in text, line
        assert stats.num_draft_branches > 0
        for name in ("branches", "branch_wins"):
            count = getattr(stats, f"num_draft_{name}")
            assert f"octavo:spec_decode_num_{name}_total{{{labels}}} {count}.0" in text
        for position, count in enumerate(stats.num_accepted_per_position):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            assert f'{name}{{{labels},position="{position}"}} {count}.0' in text

    run(test)


def test_the_bench_measures_both_on_one_model(model: Path) -> None:
    llm = load(model, {"method": "ngram", "prompt_lookup_min": 1})
    result = bench_spec(llm, "tiny", ["quote", "chat"], [1, 3], [], 12, 1)
    assert [(row.task, row.batch) for row in result.rows] == [
        *(("quote", 1), ("chat", 1), ("quote", 3), ("chat", 3))
    ]
    assert result.passed and json.loads(json.dumps(result.to_json()))["num_tokens"] == 12
    rows = bench_spec(llm, "tiny", [], [2], [0.7, 1.0], 60, 1).rows
    assert [row.task for row in rows] == ["0 right", "0.7 right", "1 right"]
    none, some, every = rows
    assert none.acceptance == 0 and none.tokens_per_step == 1 and none.foretold is not None
    assert 0 < some.acceptance < 1 and every.acceptance == 1
    assert every.tokens_per_step > 5 and all(row.equal for row in rows)
    assert every.foretold == pytest.approx(8 / (every.step_ratio or 0))
    assert tokens_of_step(0.5, 3) == 1.875


def test_the_bench_measures_trees(model: Path) -> None:
    llm = load(model, {"method": "ngram", "num_branches": 2, "num_speculative_tokens": 3})
    rows = bench_spec(llm, "tiny", [], [2], [0.5], 60, 1, second_guess=0.8).rows
    assert all(row.equal for row in rows) and rows[0].tokens_per_step == 1
    chain = tokens_of_step(0.5, 3)
    foretold = (chain + 0.5 * 0.8 * tokens_of_step(0.5, 2)) / (rows[0].step_ratio or 0)
    assert rows[1].foretold == pytest.approx(foretold)
    assert rows[1].tokens_per_step > chain + 0.2
    stats = llm.engine.stats()
    assert stats.num_draft_branches > stats.num_draft_branch_wins > 5
    drafter = llm.engine.drafter
    assert isinstance(drafter, Speculator) and drafter.num_branches == 2  # as it was before


def test_the_bench_sees_changed_answers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted error: the scheduler takes drafts unseen."""
    from octavo.engine import branches

    llm = load(model, {"method": "ngram"})
    monkeypatch.setattr(branches, "num_agreeing", lambda drafts, sampled: len(drafts))
    drafter = llm.engine.drafter
    assert isinstance(drafter, Speculator)
    rows = SpecBench(llm, 30, 1).measure_constructed([0.5], 1)
    assert not any(row.equal for row in rows)


def test_constructed_drafts_are_right_as_often_as_asked() -> None:
    answer = tuple(range(10, 60))
    drafts = KnownAnswers({(1, 2): answer}, 0.8, 0.7)
    sequence = Sequence("a", [1, 2], SamplingParams())
    sequence.token_ids += answer[:4]
    found = [drafts.draft([(sequence, None, 10)])[0] for _ in range(200)]
    assert all(len(each) == 10 for each in found)
    right = sum(d == t for each in found for d, t in zip(each, answer[4:], strict=False))
    assert 0.76 < right / 2000 < 0.84
    trees = [
        drafts.draft_trees([(sequence, None, [(0,) * 4, (1, 0, 0, 0)])])[0] for _ in range(900)
    ]
    seconds = [second[0] == answer[4] for first, second in trees if first[0] != answer[4]]
    assert 0.6 < sum(seconds) / len(seconds) < 0.8
    assert not any(second[0] == answer[4] for first, second in trees if first[0] == answer[4])


def test_bench_spec_on_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["bench", "spec", str(model), "--load-format", "dummy", "--num-threads", "1"]
    plain += ["-n", "8", "-r", "1"]
    assert main([*plain, "--tasks", "chat", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["task"] == "chat"
    assert main([*plain, "--acceptance", "0.5", "-o", "md"]) == 0
    assert "| 0.5 right | 1 |" in capsys.readouterr().out
    assert main([*plain, "--tasks", "chat"]) == 0
    assert main([*plain, "--acceptance", "0.5", "--second-guess", "0.6", "-o", "md"]) == 0
    assert "| 0.5 right | 1 |" in capsys.readouterr().out
    wrong = (["--acceptance", "2"], ["--tasks", "poem"], ["-b", "0"], ["--second-guess", "0.5"])
    for more in wrong:
        assert main([*plain, *more]) == 2
