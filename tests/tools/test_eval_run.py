"""`octavo eval` on tiny models: against the NumPy reference, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_helpers import write_quantized_model
from text_helpers import tiny_model

from octavo.cli import main
from octavo.config import EngineConfig, read_environment
from octavo.errors import InvalidArgumentError
from octavo.eval.evaluation import EvalRequest, EvalResult, evaluate
from octavo.eval.measures import perplexity, surprisals
from octavo.reference.llama import ReferenceModel
from octavo.text.tokenizer import Tokenizer
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

TEXT = (
    """A ship is built plank by plank. 12 men carry the first one; nobody remembers the last.
"Überall", says the captain, "is a place I have not been to yet." """
    * 3
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("eval") / "tiny", context=96)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(model: Path, text: Path | None, config: dict[str, Any], **request: Any) -> EvalResult:
    config = {"device": "cpu", "load_format": "dummy", "num_threads": 1, **config}
    return evaluate(
        EvalRequest(str(model), EngineConfig(**config), text=text, **request), read_environment()
    )


def test_ranks_score_as_one_process_does(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(model, text, {"dtype": "f32"}, window=40)
    two = run(model, text, {"dtype": "f32", "tensor_parallel_size": 2}, window=40)
    assert two.model.perplexity.value == pytest.approx(one.model.perplexity.value, rel=1e-5)
    assert (one.model.tensor_parallel_size, two.model.tensor_parallel_size) == (1, 2)
    assert two.model.weight_bytes > one.model.weight_bytes
    arguments = ["eval", str(model), "--load-format", "dummy", "--text", str(text), "-tp", "2"]
    assert main([*arguments, "--window", "40"]) == 0
    assert "2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(("window", "stride"), [(96, 48), (40, 40), (33, 7)])
def test_perplexity_is_the_references(model: Path, text: Path, window: int, stride: int) -> None:
    """Each window by the NumPy model from scratch, and each token scored by the rule."""
    result = run(model, text, {"dtype": "f32"}, window=window, stride=stride)
    files = read_model(model)
    weights = {n: t.to_float32() for n, t in open_checkpoint(files, "dummy").items()}
    tokens = np.array(Tokenizer(model).encode(TEXT), np.int32)
    found, done = [], 0
    for begin in range(0, len(tokens), stride):
        piece = tokens[begin : begin + window]
        logits = ReferenceModel(files.spec, weights).forward(piece)
        fresh = max(done - begin, 1)
        found.append(surprisals(logits[fresh - 1 : -1], piece[fresh:]))
        done = begin + len(piece)
        if done == len(tokens):
            break
    expected = perplexity(np.concatenate(found))
    assert result.num_tokens == len(tokens) and result.num_scored == expected.num_tokens
    assert result.model.perplexity.value == pytest.approx(expected.value, rel=1e-5)
    assert result.against is None and result.divergence is None  # f32 is what it would be held to


def test_bf16_is_held_against_f32_of_itself(model: Path, text: Path) -> None:
    result = run(model, text, {"dtype": "bf16"})
    assert result.window == 96 and result.stride == 48  # the model's limit, and half of it
    assert result.against is not None and result.divergence is not None
    assert (result.model.dtype, result.against.dtype) == ("bf16", "f32")
    assert 0 < result.divergence.mean_kl < 1e-3 and result.divergence.top_agreement > 0.9
    alone = run(model, text, {"dtype": "f32"})
    assert result.against.perplexity == alone.model.perplexity
    ratio = result.model.perplexity.value / alone.model.perplexity.value
    assert result.divergence.perplexity_ratio == ratio


def test_quantized_weights_are_held_against_f32(model: Path, text: Path) -> None:
    """The fewer bits, the further; and the same text is as hard for f32 as ever."""
    plain = run(model, text, {"dtype": "f32"}).model.perplexity
    divergences = []
    for quantize in (None, "int8", "int4", "w8a8"):
        result = run(model, text, {"dtype": "bf16", "quantize": quantize})
        assert result.against is not None and result.divergence is not None
        assert result.against.weights == "f32" and result.against.perplexity == plain
        assert (quantize or "bf16") in result.model.weights
        divergences.append(result.divergence.mean_kl)
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    exact = run(model, text, {"dtype": "f32", "quantize": "int8"})
    assert exact.divergence is not None and exact.divergence.mean_kl > 0


def test_a_quantized_directory_has_no_unquantized_self(tmp_path: Path) -> None:
    source, quantized = write_quantized_model(tmp_path, "int4")
    settings = {"load_format": "auto"}
    alone = run(quantized, None, settings, random=90)
    assert alone.against is None and "int4" in alone.model.weights
    with pytest.raises(InvalidArgumentError, match="--against MODEL, the one it was made from"):
        run(quantized, None, settings, random=90, against="same")
    held = run(quantized, None, settings, random=90, against=str(source))
    assert held.model == alone.model and held.divergence is not None
    assert held.against is not None and held.against.weights == "f32"
    assert held.divergence.mean_kl > 0


def test_f32_against_itself_is_no_difference(model: Path, text: Path) -> None:
    result = run(model, text, {"dtype": "f32"}, against="same")
    assert result.divergence is not None
    assert result.divergence.max_kl == 0 and result.divergence.top_agreement == 1
    assert result.divergence.perplexity_ratio == 1


def test_another_model_is_seen_to_be_another(model: Path, text: Path, tmp_path: Path) -> None:
    """One number of the configuration is wrong: far more than rounding."""
    other = tiny_model(tmp_path / "other", context=96)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 20.0}))
    rounded = run(model, text, {"dtype": "bf16"}).divergence
    wrong = run(other, text, {"dtype": "f32"}, against=str(model)).divergence
    assert rounded is not None and wrong is not None
    assert wrong.mean_kl > 20 * rounded.mean_kl


def test_random_tokens_need_no_tokenizer(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = run(tmp_path, None, {"dtype": "bf16"}, random=200, max_windows=3)
    assert result.num_tokens == 200 and result.num_windows == 3 and result.num_scored == 191
    again = run(tmp_path, None, {"dtype": "bf16"}, random=200, max_windows=3)
    assert again.text_sha256 == result.text_sha256
    assert again.model.perplexity == result.model.perplexity


def test_chunks_change_nothing(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, text, {"dtype": "bf16"}, window=90, stride=31)
    monkeypatch.setattr("octavo.eval.scorer._MAX_LOGITS", 1)  # 16 tokens a step, the least
    chunked = run(model, text, {"dtype": "bf16"}, window=90, stride=31)
    assert chunked.model == whole.model and chunked.divergence == whole.divergence


def test_the_shipped_text_is_the_default(model: Path) -> None:
    result = run(model, None, {}, max_windows=2)
    assert "Alice" in result.text and len(result.text_sha256) == 64
    assert result.num_tokens > 10_000


def test_the_command(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(model), "--load-format", "dummy", "--device", "cpu", "--text"]
    arguments += [str(text), "--dtype", "bf16"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["perplexity"]["num_tokens"] == found["num_scored"]
    assert set(found["divergence"]) >= {"mean_kl", "p99_kl", "top_agreement", "perplexity_ratio"}
    assert main(arguments) == 0
    table = capsys.readouterr().out
    for heading in ("perplexity", "mean KL", "99 %", "same first choice"):
        assert heading in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "97"], "max_model_len is 97; expected at most 96"),
        (["--window", "20", "--stride", "21"], "stride is 21; expected 1 to 20"),
        (["--random", "9", "--text", "{text}"], "expected one of them"),
        (["--against", "{other}"], "has a vocabulary of 600 tokens"),
        (["--text", "{bytes}"], "is not UTF-8"),
        (["--dtype", "f64"], "dtype is 'f64'"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    values = {"text": text, "other": other, "bytes": tmp_path / "bytes"}
    arguments = [argument.format(**values) for argument in arguments]
    assert main(["eval", str(model), "--load-format", "dummy", "--device", "cpu", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
