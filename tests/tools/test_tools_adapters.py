"""`--adapter` of octavo batch, eval and bench, on a tiny model with made-up weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import ALL, adapter_config, random_adapter, write_adapter
from batch_helpers import CHAT, HELLO, openai, read, run, write
from text_helpers import tiny_model

from octavo.bench.benchmark import Runner, bench, fit_config
from octavo.bench.cases import make_cases
from octavo.bench.report import header, to_csv
from octavo.cli import main
from octavo.config import EngineConfig, read_environment
from octavo.eval.evaluation import EvalRequest, EvalResult, evaluate
from octavo.eval.measures import surprisals
from octavo.llm import LLM
from octavo.reference.llama import ReferenceModel
from octavo.runtime.loader import load_runtime
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

NAMES = {"sql": (*ALL, "embed_tokens"), "law": ("v_proj", "down_proj", "lm_head")}
TEXT = "A ship is built plank by plank. 12 men carry the first one; nobody remembers the last. " * 2


def make_adapter(folder: Path, model: Path, targets: tuple[str, ...], seed: int) -> Path:
    config = json.loads((model / "config.json").read_text())
    tensors = random_adapter(config, targets, seed=seed)
    return write_adapter(folder, tensors, adapter_config(target_modules=list(targets)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    tiny_model(path / "tiny")
    for seed, (name, targets) in enumerate(NAMES.items()):
        make_adapter(path / name, path / "tiny", targets, seed)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    adapters = {name: folder / name for name in NAMES}
    return LLM(folder / "tiny", load_format="dummy", adapters=adapters)


def options(folder: Path, *names: str) -> list[str]:
    return [each for name in names for each in ("--adapter", f"{name}={folder / name}")]


def reference(folder: Path, name: str | None) -> ReferenceModel:
    files = read_model(folder / "tiny")
    checkpoint = open_checkpoint(files, "dummy")
    weights = {key: tensor.to_float32() for key, tensor in checkpoint.items()}
    adapter = None if name is None else read_adapter(folder / name, files)
    return ReferenceModel(files.spec, weights, adapter=adapter)


# ---- batch ----


def test_lines_of_a_batch_name_their_adapters(folder: Path, llm: LLM, tmp_path: Path) -> None:
    model = str(folder / "tiny")
    wanted = {"one": "sql", "two": None, "three": "law", "four": "sql", "five": model}
    lines = [
        openai(
            key,
            CHAT,
            messages=HELLO,
            temperature=0,
            max_tokens=9,
            **({"model": name} if name else {}),
        )
        for key, name in wanted.items()
    ]
    lines.append(json.dumps({"prompt": "ship of", "model": "law", "custom_id": "bare"}))
    source = write(tmp_path / "in.jsonl", lines)
    target = tmp_path / "out.jsonl"
    assert run(model, source, target, "--max-tokens", "9", *options(folder, *NAMES)) == 0
    records = read(target)
    params = SamplingParams(temperature=0.0, max_tokens=9)
    texts = {}
    for key, name in wanted.items():
        body = records[key]["response"]["body"]
        adapter = None if name == model else name
        (expected,) = llm.chat(HELLO, params, progress=False, adapter=adapter)
        assert body["choices"][0]["message"]["content"] == expected.text
        assert body["model"] == (adapter or model)
        texts[adapter] = expected.text
    assert len(set(texts.values())) == 3  # so that a mixture would show
    bare = records["bare"]["response"]["body"]["choices"][0]["message"]["content"]
    asked = [{"role": "user", "content": "ship of"}]
    assert bare == llm.chat(asked, params, progress=False, adapter="law")[0].text


def test_a_name_that_is_none(folder: Path, tmp_path: Path) -> None:
    """It fails its line where there are adapters; else any name stands for the model."""
    model, target = str(folder / "tiny"), tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": "ship", "model": "sgl", "custom_id": "a"}), "another"]
    source = write(tmp_path / "in.jsonl", lines)
    assert run(model, source, target, "-n", "3", *options(folder, "sql")) == 1
    error = read(target)["a"]["error"]["message"]
    assert f"model is 'sgl'; expected '{model}' or 'sql', or none" in error
    assert run(model, source, target, "-n", "3", "--overwrite") == 0
    assert read(target)["a"]["error"] is None


def test_a_resumed_batch_has_the_adapter_that_it_had(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, target = str(folder / "tiny"), tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": "ship", "model": "own", "custom_id": "a"}), "another"]
    source = write(tmp_path / "in.jsonl", lines)
    make_adapter(tmp_path / "own", folder / "tiny", ("q_proj",), 5)
    adapters = options(tmp_path, "own")
    assert run(model, source, target, "-n", "3", *adapters) == 0
    before = target.read_bytes()
    assert run(model, source, target, "-n", "3", *adapters) == 0
    make_adapter(tmp_path / "own", folder / "tiny", ("q_proj",), 6)
    capsys.readouterr()
    assert run(model, source, target, "-n", "3", *adapters) == 2
    assert 'adapter was "own, with the digest' in capsys.readouterr().err
    assert run(model, source, target, "-n", "3") == 2
    assert "and is left out" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize("given", [["sql"], ["=x"], ["a=x", "a=y"], ["MODEL=x"]])
def test_names_that_will_not_do(
    given: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folder / "tiny")
    source = write(tmp_path / "in.jsonl", ["ship"])
    more = [each for text in given for each in ("--adapter", text.replace("MODEL", model))]
    assert run(model, source, tmp_path / "out.jsonl", *more) == 2
    assert "expected NAME=PATH with a name of its own" in capsys.readouterr().err


# ---- eval ----


def evaluated(folder: Path, text: Path, adapter: str | None, **request: Any) -> EvalResult:
    config = EngineConfig(device="cpu", load_format="dummy", num_threads=1, dtype="f32")
    path = None if adapter is None else folder / adapter
    given = EvalRequest(str(folder / "tiny"), config, text=text, adapter=path, **request)
    return evaluate(given, read_environment())


def test_perplexity_with_an_adapter_is_the_references(folder: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", [TEXT])
    tokens = np.array(Tokenizer(folder / "tiny").encode(TEXT + "\n"), np.int32)
    assert 20 < len(tokens) <= 256
    values = []
    for name in (None, *NAMES):
        result = evaluated(folder, text, name, window=256)
        logits = reference(folder, name).forward(tokens)
        expected = float(surprisals(logits[:-1], tokens[1:]).mean())
        assert result.model.perplexity.mean_surprisal == pytest.approx(expected, rel=1e-5)
        assert result.model.adapter == (None if name is None else str(folder / name))
        values.append(expected)
    assert len({round(value, 3) for value in values}) == 3


def test_what_an_adapter_changes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the same model, both have it; --against the model by name, one has."""
    text = write(tmp_path / "text.txt", [TEXT])
    same = evaluated(folder, text, "sql", against="same")
    assert same.divergence is not None and same.divergence.max_kl < 1e-6
    assert same.against is not None and same.against.adapter == same.model.adapter
    base = ["eval", str(folder / "tiny"), "--text", str(text), "--load-format", "dummy"]
    more = ["--dtype", "f32", "--adapter", str(folder / "law"), "--json"]
    assert main([*base, *more, "--against", str(folder / "tiny")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["divergence"]["mean_kl"] > 1e-3 and found["against"]["adapter"] is None
    assert main([*base, *more[:-1]]) == 0
    assert "tiny + law" in capsys.readouterr().out


# ---- bench ----

CASES = make_cases([20], [3], [3], [0])
CONFIG = EngineConfig(device="cpu", load_format="dummy", num_threads=1, dtype="f32", max_adapters=2)


def test_sequences_have_adapters_in_turn(folder: Path) -> None:
    files = read_model(folder / "tiny")
    checkpoint = open_checkpoint(files, "dummy")
    loaded = load_runtime(files, checkpoint, fit_config(CONFIG, CASES))
    adapters = [read_adapter(folder / name, files, checkpoint) for name in NAMES]
    runner = Runner(loaded, files.spec, None, adapters)
    prompts = [runner.tokens(index, 7) for index in range(3)]
    for first in (0, 1):
        logits = runner.decode_logits(prompts, 1, first_adapter=first)[0]
        for index, prompt in enumerate(prompts):
            name = list(NAMES)[(first + index) % 2]
            expected = reference(folder, name).forward(prompt)[-1]
            np.testing.assert_allclose(logits[index], expected, atol=1e-4)


def test_the_gates_of_a_run_with_adapters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.bench.benchmark.measure_peak", lambda *_: None)
    hashes = []
    for names in ((), ("sql",), ("sql", "law")):
        given = [folder / name for name in names]
        result = bench(str(folder / "tiny"), CONFIG, CASES, 1, read_environment(), adapters=given)
        assert result.passed and result.adapters == tuple(map(str, given))
        hashes.append([row.gate.logits_hash for row in result.rows])
        assert (", adapters " in header(result)[0]) == bool(names)
        assert f",{len(names)}," in to_csv(result).splitlines()[1]
    assert hashes[0] != hashes[1] == hashes[2]  # the first sequence's


def test_a_folder_without_an_adapter_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folder / "tiny")
    for verb in ("eval", "bench"):
        assert main([verb, model, "--load-format", "dummy", "--adapter", model]) == 2
        assert "holds no adapter_config.json" in capsys.readouterr().err
