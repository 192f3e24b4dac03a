"""The digest of a model: equal for the same model, another for any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from text_helpers import CHATML_TEMPLATE, byte_level_directory, write_config
from weights_helpers import random_weights, tiny_config, write_model

from octavo.errors import WeightsError
from octavo.weights.fingerprint import model_digest

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def build(directory: Path, num_shards: int = 1) -> Path:
    byte_level_directory(directory)
    write_model(directory, num_shards=num_shards)
    return directory


def test_where_and_in_how_many_files_a_model_lies_does_not_matter(tmp_path):
    first = model_digest(build(tmp_path / "a"))
    assert len(first) == 16 and int(first, 16)
    (tmp_path / "a" / "README.md").write_text("about")
    assert model_digest(tmp_path / "a") == first
    assert model_digest(build(tmp_path / "b", num_shards=3)) == first


def test_every_file_that_changes_answers_counts(tmp_path):
    directory = build(tmp_path / "a")
    found = {model_digest(directory)}
    for name in FILES:
        file = directory / name
        file.write_text(file.read_text() + " ")
        found.add(model_digest(directory))
    for name in ("generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (directory / name).write_text("{}")
        found.add(model_digest(directory))
    write_config(directory, chat_template=CHATML_TEMPLATE)
    found.add(model_digest(directory))
    (directory / "additional_chat_templates").mkdir()
    for content in ("", "x"):
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(content)
        found.add(model_digest(directory))
    assert len(found) == 4 + len(FILES) + 3


@pytest.mark.parametrize("name", sorted(random_weights(tiny_config())))
def test_every_tensor_counts(tmp_path, name):
    weights = random_weights(tiny_config())
    write_model(tmp_path, weights=weights)
    first = model_digest(tmp_path)
    weights[name] = (weights[name] * np.float32(1.0001)).astype(np.float32)
    write_model(tmp_path, weights=weights)
    assert model_digest(tmp_path) != first
    for place in (0, -1):  # one number is enough
        other = {**weights, name: weights[name].copy()}
        other[name].flat[place] += 1
        write_model(tmp_path, weights=weights)
        before = model_digest(tmp_path)
        write_model(tmp_path, weights=other)
        assert model_digest(tmp_path) != before
    # Zeros are the same bytes in both types.
    weights[name] = np.zeros_like(weights[name])
    found = set()
    for dtype in ("F16", "BF16"):
        write_model(tmp_path, weights=weights, dtypes={name: dtype})
        found.add(model_digest(tmp_path))
    assert len(found) == 2


def test_dummy_weights_need_no_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    dummy = model_digest(tmp_path, "dummy")
    with pytest.raises(WeightsError, match="holds neither"):
        model_digest(tmp_path)
    write_model(tmp_path)
    assert model_digest(tmp_path, "dummy") == dummy != model_digest(tmp_path)
