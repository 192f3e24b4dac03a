"""A folder in which the documentation's commands run: a model, prompts, adapters, a server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from adapter_helpers import adapter_config, random_adapter, write_adapter
from doc_blocks import ROOT, Command
from weights_helpers import write_gguf, write_model

from octavo.config import read_environment
from octavo.weights.hub import resolve_model

MODEL = "smollm2-135m"
LIMIT = 120  # seconds of one command
# The demo model's layers, tokenizer and name, in a sixtieth of its size: all commands of the
# documentation together take minutes with it. What it says is noise.
SIZES = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 64},
}
ENDS = list(range(0, 49152, 16))  # so many tokens end an answer that noise is short


def make_home(folder: Path, ends: Sequence[int] = ENDS) -> Path:
    """An OCTAVO_HOME that holds the small model under the demo model's name.

    ends: the tokens that end an answer.
    """
    demo = resolve_model(MODEL, read_environment())
    model = folder / "models" / MODEL
    shutil.copytree(demo, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text()) | SIZES | {"eos_token_id": [*ends]}
    write_model(model, config, dtype="BF16")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends]}))
    return folder


def make_folder(folder: Path, home: Path) -> None:
    """What the documentation's commands read: prompts, texts, a schema, adapters, a GGUF file."""
    for name in ("docs/learn", "benchmarks", "examples", "slurm", "tests/emulator"):
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "benchmarks/results/eval-smollm2-135m-bf16.json", folder / "results.json")
    prompts = [f"Write about the number {number}." for number in range(40)]
    lines = [json.dumps({"prompt": prompt, "max_tokens": 8}) for prompt in prompts[:8]]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    schema = {
        "type": "object",
        "properties": {name: {"enum": ["Rome", "Italy"]} for name in ("city", "country")},
        "required": ["city", "country"],
    }
    files = {
        **{"prompts.txt": "\n".join(prompts), "prompts.jsonl": "\n".join(lines)},
        **{"letter.txt": text[:5000], "manual.txt": text, "some.txt": text[:5000]},
        "wiki.test.raw": text[:8000],
        "schema.json": json.dumps(schema),
    }
    for name, content in files.items():
        (folder / name).write_text(content + "\n", encoding="utf-8")
    config = json.loads((home / "models" / MODEL / "config.json").read_text())
    for seed, name in enumerate(("sql", "law", "my-adapter")):
        write_adapter(folder / name, random_adapter(config, seed=seed), adapter_config())
    write_gguf(folder / "tiny.gguf")


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Shell:
    """Runs commands in a folder. octavo and python are those of the tests."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._server: subprocess.Popen[bytes] | None = None
        programs = folder / ".programs"
        programs.mkdir()
        for name, arguments in (("octavo", "-m octavo"), ("python", ""), ("python3", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            program.chmod(0o755)
        self.environment = {
            **os.environ,
            **{"OCTAVO_HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
            "PATH": f"{programs}:{os.environ['PATH']}",
        }

    def on_own_port(self, text: str) -> str:
        """Text in which the server has this shell's port: others run beside it."""
        return text.replace("localhost:8000", f"127.0.0.1:{self.port}").replace(
            "127.0.0.1:8000", f"127.0.0.1:{self.port}"
        )

    def run(self, command: Command) -> str:
        """Run a command; returns what is wrong with it, "" if nothing is."""
        text = self.on_own_port(command.substituted())
        if text.startswith("octavo serve"):
            return self._serve(text)
        code, output = self.execute(["bash", "-c", f"set -o pipefail; {text}"])
        fails = command.printed.strip().startswith("error:")
        if fails and command.printed.strip()[:25] not in output:
            return f"expected {command.printed!r}, got exit code {code}: {output}"
        if (code != 0) != fails:
            return f"exit code {code}: {output[-2000:]}"
        return "a traceback: " + output if "Traceback (most recent call last)" in output else ""

    def execute(self, command: list[str]) -> tuple[int, str]:
        """Exit code and output; 124 after LIMIT seconds."""
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self.environment, input=b"Is the sea salty?\n",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return 124, f"longer than {LIMIT} s: {(late.stdout or b'').decode()}"
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def _serve(self, text: str) -> str:
        self.close()
        log = self.folder / "server.log"
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                [*("bash", "-c"), f"exec {text} --port {self.port}"],
                cwd=self.folder, env=self.environment, stdout=output, stderr=output,
            )  # fmt: skip
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and self._server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
                    if answer.status == 200:
                        return ""
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        return f"the server did not get ready: {log.read_text()[-2000:]}"

    def close(self) -> None:
        """End the server, if there is one."""
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            self._server.wait(timeout=30)
            self._server = None
