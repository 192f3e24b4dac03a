"""`octavo plan`, `bench`, `diff` and `eval` with models of embeddings, with and without a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_helpers import vectors_by_hand, write_embedding_model

from octavo import LLM, _native
from octavo.bench.benchmark import Runner, bench
from octavo.bench.cases import Case, make_cases
from octavo.cli import main
from octavo.config import EngineConfig, read_environment
from octavo.models.pooling import Pooling
from octavo.runtime.loader import load_runtime
from octavo.runtime.session import Session
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model
from octavo.weights.pooling import without_head

CASES = make_cases([40, 100], [3], [2], [0])
NAMES = ("headed", "headless", "bare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("embeddings")
    write_embedding_model(made / "headed", "mean", tokenizer=True)
    write_embedding_model(made / "headless", "mean", headless=True, tokenizer=True)
    write_embedding_model(made / "bare", headless=True, tokenizer=True, modules=False)
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is not measured."""
    monkeypatch.setattr(_native, "measure_bandwidth", lambda *_, **__: 2e10)
    monkeypatch.setattr(_native, "measure_flops", lambda *_, **__: 1e12)


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(device="cpu", dtype="f32", num_threads=1, **fields)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_no_head_and_decodes_nothing(name, folder, capsys):
    words = ["plan", str(folder / name), "-c", "64", "-b", "3", "--dtype", "f32", "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["speed"]) == ["prefill"]
    with LLM(folder / name, config=config(max_model_len=64)) as llm:
        weights = llm.engine.runtime.memory()["weights"]
    assert 0 <= weights - facts["memory"]["weights"] < 8192  # tables of rope
    assert main([*words, "--runner", "generate"]) == 0
    texts = json.loads(capsys.readouterr().out)
    assert texts["speed"]["decode"] > 0
    head = 4 * 512 * 96
    assert texts["memory"]["weights"] - facts["memory"]["weights"] == head
    states = 2 * 3 * 64 * 96 * 4  # of two steps' tokens
    assert facts["memory"]["activations"] - texts["memory"]["activations"] == states


def test_a_plan_beside_what_is_measured(folder, capsys):
    words = ["plan", str(folder / "headless"), "-c", "64", "--check"]
    assert main([*words, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["decode"] is None and measured["prefill"] > 0
    assert list(measured["within"]) == ["memory"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "text of 64 tokens" in shown and "decode" not in shown and "Memory within" in shown


@pytest.mark.parametrize("name", NAMES)
def test_prompts_alone_are_measured(name, folder, capsys):
    results = [
        bench(str(folder / name), config(max_num_batched_tokens=size), CASES, 1, read_environment())
        for size in (512, 7)
    ]
    for result in results:
        assert result.passed and result.embeds
        assert [row.case for row in result.rows] == [Case("embed", 40), Case("embed", 100)]
    assert [row.gate for row in results[0].rows] == [row.gate for row in results[1].rows]
    words = ["bench", str(folder / name), "-r", "1", "--device", "cpu"]
    assert main([*words, "-p", "40"]) == 0
    shown = capsys.readouterr()
    assert "emb40" in shown.out and "states" in shown.out and "tg" not in shown.out
    assert "an embedding model decodes nothing: -n has no effect" in shown.err
    assert main([*words, "-p", "0"]) == 2
    assert "expected a -p above 0" in capsys.readouterr().err


def runner_of(folder: Path) -> Runner:
    files = without_head(read_model(folder))
    settings = config(max_model_len=128, max_num_seqs=2, max_num_batched_tokens=9, num_kv_blocks=16)
    return Runner(
        load_runtime(files, open_checkpoint(files), settings), files.spec, None, embeds=True
    )


def test_what_is_timed_computes_the_states_and_reads_no_head(folder, monkeypatch):
    runner = runner_of(folder / "headless")
    prompt = runner.tokens(0, 33)
    pooling = Pooling(96, "last", normalize=False)
    (expected,) = vectors_by_hand(folder / "headless", [prompt], pooling)
    np.testing.assert_allclose(runner.prefill(prompt), expected, atol=1e-5)
    rows: list[int] = []
    make = runner._session.loaded.make_batch
    loaded = runner._session.loaded

    def watched(**arrays: Any) -> Any:
        rows.append(len(arrays["logit_rows"]))
        return make(**arrays)

    monkeypatch.setattr(type(loaded), "make_batch", property(lambda _: watched), raising=False)
    runner.time(Case("embed", 20), 1)
    assert len(rows) == 2 * 3 and not any(rows)
    assert runner.step_bytes == runner.weight_bytes - 4 * 512 * 96  # the embedding's rows alone


def test_states_that_depend_on_their_neighbours_get_no_figure(folder, monkeypatch, capsys):
    right = Session.states

    def wrong(self: Session, new: Any) -> Any:
        states = right(self, new)
        return np.nextafter(states, np.float32(np.inf)) if len(new) > 1 else states

    monkeypatch.setattr(Session, "states", wrong)
    words = ["bench", str(folder / "headless"), "-p", "20", "-n", "0", "-r", "1", "--device", "cpu"]
    assert main(words) == 1
    assert "a gate failed" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_diff_compares_the_hidden_states(name, folder, capsys):
    words = ["diff", str(folder / name), "--random", "9", "--steps", "2"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"layers.1.out", "final_norm", "logits"} <= {tap["name"] for tap in result["taps"]}
    assert main(words) == 0
    assert ("the embedding as head" in capsys.readouterr().out) == (name != "headed")


@pytest.mark.parametrize("name", NAMES)
def test_eval_says_what_to_do_instead(name, folder, tmp_path, capsys):
    words = ["eval", str(folder / name), "--random", "64", "--max-windows", "1"]
    assert main(words) == 2
    message = f"{name} gives embeddings and makes no texts: it predicts no tokens, and has no"
    assert message in capsys.readouterr().err
    code = main([*words, "--runner", "generate"])
    assert code == (0 if name == "headed" else 2)
    assert code == 0 or "holds no head" in capsys.readouterr().err
    texts = write_embedding_model(tmp_path / "texts", modules=False, vocab_size=512)
    words[1] = str(texts)
    assert main([*words, "--against", str(folder / name)]) == 2
    assert message in capsys.readouterr().err
