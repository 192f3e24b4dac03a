"""`LLM(adapters=)` on a real model: every answer is that of the definition with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import ALL, adapter_config, random_adapter, write_adapter
from text_helpers import byte_level_directory
from weights_helpers import tiny_config, write_model

from octavo.cli import main
from octavo.errors import AdapterNotFoundError, InvalidArgumentError, WeightsError
from octavo.llm import LLM
from octavo.reference.llama import KVCache, ReferenceModel
from octavo.sampling_params import SamplingParams
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
KINDS = {"all": (*ALL, "embed_tokens", "lm_head"), "some": ("v_proj", "down_proj")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_config(tie_word_embeddings=True)
    write_model(tmp_path / "model", config)
    byte_level_directory(tmp_path / "model")
    for seed, (name, targets) in enumerate(KINDS.items()):
        tensors = random_adapter(config, targets, seed=seed)
        write_adapter(tmp_path / name, tensors, adapter_config(target_modules=list(targets)))
    return tmp_path


def load(folder: Path, names: Any = KINDS, **options: Any) -> LLM:
    adapters = {name: folder / name for name in names}
    settings = {"device": "cpu", "num_kv_blocks": 64, "max_num_batched_tokens": 16, **options}
    return LLM(folder / "model", adapters=adapters, **settings)


def expected(folder: Path, name: str | None, prompt: list[int]) -> tuple[int, ...]:
    files = read_model(folder / "model")
    checkpoint = open_checkpoint(files)
    adapter = None if name is None else read_adapter(folder / name, files, checkpoint)
    weights = {key: tensor.to_float32() for key, tensor in checkpoint.items()}
    model, cache = ReferenceModel(files.spec, weights, adapter=adapter), KVCache()
    tokens: list[int] = []
    for _ in range(10):
        tokens.append(int(model.forward(tokens[-1:] or prompt, cache)[-1].argmax()))
    return tuple(tokens)


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_tokens_are_those_of_the_definition(folder: Path, overlap: bool) -> None:
    llm = load(folder, overlap_steps=overlap)
    prompts = [((np.arange(17) * (i + 3) + i) % 37).tolist() for i in range(3)]
    for _ in range(2):  # the second time, the prompts are in the cache
        for name in (None, *KINDS):
            outputs = llm.generate(prompts, GREEDY, progress=False, adapter=name)
            found = [output.outputs[0].token_ids for output in outputs]
            assert found == [expected(folder, name, prompt) for prompt in prompts]


def test_more_adapters_than_places(folder: Path) -> None:
    """They take turns in the one place, and each answers as ever."""
    llm = load(folder, max_adapters=1)
    prompt = [5, 3, 7, 11]
    for name in (*KINDS, *KINDS, None):
        (output,) = llm.generate(prompt, GREEDY, progress=False, adapter=name)
        assert output.outputs[0].token_ids == expected(folder, name, prompt)
    llm.unload_adapter("all")
    with pytest.raises(AdapterNotFoundError, match="expected one of some"):
        llm.generate(prompt, GREEDY, progress=False, adapter="all")


def test_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="max_adapters is 0"):
        load(folder, max_adapters=0)
    with pytest.raises(InvalidArgumentError, match="max_adapters is -1"):
        load(folder, max_adapters=-1)
    other = tiny_config(hidden_size=32)
    write_adapter(folder / "other", random_adapter(other))
    with pytest.raises(WeightsError, match="does not fit the model"):
        load(folder, ["other"])


def test_quantized_and_chunked_models_take_adapters(folder: Path) -> None:
    """int8 beneath, the adapter in float32: what it adds is added; alone or together alike."""
    llm = load(folder, quantize="int8")
    prompts = [((np.arange(20) * 7 + i) % 37).tolist() for i in range(4)]
    together = llm.generate(prompts, GREEDY, progress=False, adapter="all")
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, GREEDY, progress=False, adapter="all")
        (plain,) = llm.generate(prompt, GREEDY, progress=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert plain.outputs[0].token_ids != output.outputs[0].token_ids


def test_the_command_line_names_what_is_wrong(folder: Path, capsys: Any) -> None:
    model = str(folder / "model")
    assert main(["generate", "hi", "-m", model, "--adapter", str(folder / "none")]) == 2
    assert "expected an adapter that PEFT" in capsys.readouterr().err
    for given in ("sql", "=x", "sql=", "model=x"):
        assert main(["serve", model, "--adapter", given, "--served-model-name", "model"]) == 2
        assert "expected NAME=PATH" in capsys.readouterr().err
