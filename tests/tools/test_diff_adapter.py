"""`octavo diff --adapter`: the native core's products with an adapter, held to the definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import ALL, adapter_config, random_adapter, write_adapter
from weights_helpers import tiny_config, write_model

from octavo.cli import main
from octavo.models.adapter import Adapter, LowRank

EVERYTHING = (*ALL, "embed_tokens", "lm_head")


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    config = tiny_config(tie_word_embeddings=True)
    write_model(tmp_path / "model", config)
    write_adapter(
        tmp_path / "adapter",
        random_adapter(config, EVERYTHING),
        adapter_config(target_modules=list(EVERYTHING)),
    )
    return [str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"), "--random", "40"]


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"], ["--quantize", "int8"], ["--judge"]])
def test_equal_to_the_definition(options: list[str], paths: list[str], capsys: Any) -> None:
    assert main(["diff", *paths, *options]) == 0, capsys.readouterr().out
    assert "with an adapter" in capsys.readouterr().out


def wrong(matrices: dict[str, LowRank], name: str) -> dict[str, LowRank]:
    part = matrices[name]
    return {**matrices, name: replace(part, b=np.roll(part.b, 1, axis=0))}


@pytest.mark.parametrize("name", ["layers.1.q", "layers.0.down", "lm_head", "embed"])
def test_a_wrong_adapter_is_found(
    name: str, paths: list[str], monkeypatch: Any, capsys: Any
) -> None:
    """Of a matrix of the layers, the op is named."""
    native = Adapter.native

    def planted(self: Adapter) -> Any:
        return native(replace(self, matrices=wrong(dict(self.matrices), name)))

    monkeypatch.setattr(Adapter, "native", planted)
    assert main(["diff", *paths]) == 1
    shown = capsys.readouterr().out
    tap = {"layers.0.down": "layers.0.mlp_out", "lm_head": "logits"}.get(name, name)
    assert tap in shown


def test_an_adapter_that_does_not_fit(paths: list[str], capsys: Any) -> None:
    assert main(["diff", *paths[:1], "--adapter", paths[0], "--random", "5"]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
