"""What tests of `octavo batch` share: lines to ask, and running it in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.cli import main

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello fox"}]


def openai(custom_id: Any, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(model: str, source: Path, target: Path, *more: str) -> int:
    arguments = ["batch", str(source), str(target), "-m", model, "--load-format", "dummy"]
    return main([*arguments, *more])


def read(path: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["custom_id"] for record in records}) == len(records)
    return {record["custom_id"]: record for record in records}
