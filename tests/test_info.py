"""`octavo info`, and what the machine says of its memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from octavo import machine
from octavo.cli import main
from octavo.cli.info import describe, format_bytes
from octavo.machine import Resident, available_memory, resident_memory, total_memory
from octavo.models.registry import read_model
from octavo.weights import tensor
from weights_helpers import tiny_config, write_model


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
    assert facts["rope"]["scaling"] == "linear" and facts["rope"]["factor"] == 2.0
    assert facts["attention_bias"] is True and facts["mlp_bias"] is False
    fits = facts["memory"]["as"]
    assert fits["f32"]["weight_bytes"] == 2 * fits["bf16"]["weight_bytes"] == 4 * num_parameters
    assert fits["f32"]["fits"] and fits["bf16"]["kv_tokens"] > fits["f32"]["kv_tokens"] > 0
    assert fits["bf16"]["full_length_sequences"] == fits["bf16"]["kv_tokens"] // 128


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


def test_this_machine() -> None:
    assert 0 < available_memory() <= total_memory()


def fake_machine(tmp_path: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"proc": tmp_path / "proc", "cgroup": tmp_path / "cgroup"}


MEMINFO = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n"


def test_the_memory_of_the_machine(tmp_path: Path) -> None:
    folders = fake_machine(tmp_path, {"proc/meminfo": MEMINFO})
    assert available_memory(**folders) == 8_000_000 * 1024
    assert total_memory(folders["proc"]) == 16_000_000 * 1024


def test_a_control_group_lowers_it(tmp_path: Path) -> None:
    """Version 2: the tightest of the groups above the process counts, cached pages do not."""
    folders = fake_machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/job.slice/step\n",
            "cgroup/job.slice/memory.max": "5000000000\n",
            "cgroup/job.slice/memory.current": "3000000000\n",
            "cgroup/job.slice/memory.stat": "anon 1\ninactive_file 1000000000\nslab 7\n",
            "cgroup/job.slice/step/memory.max": "max\n",
            "cgroup/job.slice/step/memory.current": "3000000000\n",
        },
    )
    assert available_memory(**folders) == 3_000_000_000


def test_a_control_group_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n3:memory:/slurm/job_7\n",
        "cgroup/memory/slurm/job_7/memory.limit_in_bytes": "2000000000\n",
        "cgroup/memory/slurm/job_7/memory.usage_in_bytes": "500000000\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cgroup/memory/memory.usage_in_bytes": "500000000\n",
    }
    assert available_memory(**fake_machine(tmp_path, files)) == 1_500_000_000


def test_an_exceeded_group_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "cgroup/memory.max": "1000\n",
        "cgroup/memory.current": "4000\n",
    }
    assert available_memory(**fake_machine(tmp_path, files)) == 0


def test_a_limit_of_the_shell_lowers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = fake_machine(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/statm": "1000 5 5\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**9, resource.RLIM_INFINITY))
    left = 10**9 - 1000 * resource.getpagesize()
    assert available_memory(**folders) == left
    assert available_memory(**folders, reserved=5_000_000) == left + 5_000_000


def test_a_machine_without_proc(tmp_path: Path) -> None:
    folders = {"proc": tmp_path / "none", "cgroup": tmp_path / "none"}
    assert 0 < available_memory(**folders) <= total_memory(folders["proc"])


def test_what_this_process_takes(tmp_path: Path) -> None:
    assert resident_memory(tmp_path) is None
    (tmp_path / "self").mkdir()
    status = tmp_path / "self" / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert resident_memory(tmp_path) == Resident(now=1 << 20, peak=2 << 20)
    status.write_text("Name:\tpython\nVmRSS:\t    1024 kB\n")
    assert resident_memory(tmp_path) is None
    real = resident_memory()
    assert real is None or 0 < real.now <= real.peak
