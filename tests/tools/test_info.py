"""`octavo info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from weights_helpers import tiny_config, write_model

from octavo import machine
from octavo.cli import main
from octavo.cli.info import describe
from octavo.machine import format_bytes
from octavo.weights import tensor
from octavo.weights.model_files import read_model


def test_the_facts(tmp_path: Path) -> None:
    config = tiny_config(
        attention_bias=True,
        rope_scaling={"type": "linear", "factor": 2.0},
        eos_token_id=[2, 5],
    )
    weights = write_model(tmp_path, config, dtype="F16", dtypes={"model.norm.weight": "F32"})
    facts = describe(read_model(tmp_path))
    num_parameters = sum(values.size for values in weights.values())
    assert facts["num_parameters"] == num_parameters
    assert facts["kv_bytes_per_token"] == {"f32": 4 * 2 * 2 * 16, "bf16": 2 * 2 * 2 * 16}
    assert facts["weights"] == {
        "dtype": "f16",
        "total_bytes": 2 * num_parameters + 2 * 24,
        "bytes_by_dtype": {"f16": 2 * (num_parameters - 24), "f32": 4 * 24},
        "num_tensors": len(weights),
    }
    assert facts["eos_token_ids"] == [2, 5]
    assert facts["rope"]["kind"] == "linear" and facts["rope"]["factor"] == 2.0
    assert facts["attention_bias"] is True and facts["mlp_bias"] is False
    fits = facts["memory"]["as"]
    assert fits["f32"]["weight_bytes"] == 2 * fits["bf16"]["weight_bytes"] == 4 * num_parameters
    assert fits["f32"]["fits"] and fits["bf16"]["kv_tokens"] > fits["f32"]["kv_tokens"] > 0
    assert fits["bf16"]["full_length_sequences"] == fits["bf16"]["kv_tokens"] // 128
    assert facts["kv_share_at_full_length"] == 1


def test_windows_leave_memory_for_more_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2**30)
    fits, config = [], tiny_config()
    write_model(tmp_path, config)
    config.update(architectures=["MistralForCausalLM"], model_type="mistral")
    for window in (None, 32):
        config["sliding_window"] = window
        (tmp_path / "config.json").write_text(json.dumps(config))
        fits.append(describe(read_model(tmp_path))["memory"]["as"]["bf16"]["kv_tokens"])
    assert fits[1] == pytest.approx(4 * fits[0], rel=1e-6)  # 32 of 128 positions
    assert main(["info", str(tmp_path)]) == 0
    assert "at full length 25.0% of that" in " ".join(capsys.readouterr().out.split())


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, dtype="BF16")

    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("octavo.weights.safetensors.SafetensorsFile.read", fail)
    monkeypatch.setattr(tensor.Tensor, "to_float32", fail)
    assert describe(read_model(tmp_path))["weights"]["dtype"] == "bf16"


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert describe(read_model(tmp_path))["weights"] is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert main(["info", str(tmp_path)]) == 2


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    files = read_model(tmp_path)
    num_parameters = describe(files)["num_parameters"]
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * num_parameters)
    fits = describe(files)["memory"]["as"]
    assert (fits["bf16"]["fits"], fits["f32"]["fits"]) == (True, False)
    assert fits["f32"]["kv_tokens"] == 0
    assert fits["bf16"]["kv_tokens"] == num_parameters // 2 // 128


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "mlp_bias": True, "num_key_value_heads": 1},
        {"num_key_value_heads": 6, "eos_token_id": None},
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            }
        },
    ],
)
def test_the_command(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**tiny_config(), **changes}
    write_model(tmp_path, config)
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("LlamaForCausalLM", "6 query heads", "128 tokens", "theta 10000", "bf16"):
        assert part in output.out
    assert ("tied to the embedding" in output.out) == config["tie_word_embeddings"]
    assert ("llama3 scaling by 8" in output.out) == ("rope_scaling" in changes)
    assert ("no token" in output.out) == (config["eos_token_id"] is None)
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = describe(read_model(tmp_path))
    del facts["memory"], expected["memory"]  # changes from moment to moment
    assert facts == expected


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 100), "header of"),
    ],
)
def test_damage_is_a_message_and_code_2(
    damage: Any, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path)
    damage(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**52, "4096.0 TiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
