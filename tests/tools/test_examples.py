"""The programs of examples/ run as they are printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_helpers import random_adapter, write_adapter
from reference_helpers import SMOLLM2_MISSING, smollm2_path

EXAMPLES = Path(__file__).parents[2] / "examples"
needs_smollm2 = pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING)


def run(name: str, *words: str, stdin: str = "") -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OCTAVO_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_smollm2
def test_chat() -> None:
    for end in ("\n", ""):  # an empty line, Ctrl-D
        out = run("chat.py", stdin="What is the capital of France?\n" + end)
        assert out.count("you: ") == 2 and len(out) > 30


@needs_smollm2
def test_batch_with_schema() -> None:
    lines = run("batch_with_schema.py").splitlines()
    assert len(lines) == 3 and all("'born':" in line for line in lines)


@needs_smollm2
def test_server_and_client() -> None:
    assert "Paris" in run("server_and_client.py")


@needs_smollm2
def test_score_choices() -> None:
    out = run("score_choices.py")
    assert "The capital of France is Paris" in out and "of 3 right" in out


@needs_smollm2
def test_logits_processor() -> None:
    plain, without = run("logits_processor.py").splitlines()[:2]
    assert "e" in plain and "e" not in without and len(without) > 10


@needs_smollm2
def test_adapter(tmp_path: Path) -> None:
    model = smollm2_path()
    assert model is not None
    config = json.loads((model / "config.json").read_text("utf-8"))
    folder = write_adapter(tmp_path / "random", random_adapter(config))
    out = run("adapter.py", str(model), f"random={folder}")
    texts = {line.partition(" -> ")[2] for line in out.splitlines()}
    assert len(texts) == 4  # two prompts, with and without


@needs_smollm2
def test_speculation() -> None:
    assert "the same text" in run("speculation.py")


def test_every_example_is_tested_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    here, index = Path(__file__).read_text("utf-8"), (EXAMPLES / "README.md").read_text("utf-8")
    assert names and all(f'"{name}"' in here and f"({name})" in index for name in names)
    for name in names:  # what does not come with octavo is named
        row = next(line for line in index.splitlines() if f"({name})" in line)
        text = (EXAMPLES / name).read_text("utf-8")
        imported = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE))
        others = imported - sys.stdlib_module_names - {"octavo", "numpy"}
        assert all(f"pip install {other}" in row for other in others)
        usage = re.search(rf"python examples/{re.escape(name)} ([A-Z].*)", text)
        assert usage is None or usage[1].split(" [")[0] in row
