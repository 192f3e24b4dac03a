"""The Dockerfile names what there is: files, options of the build, commands of octavo.

Docker itself is not asked: it need not be here.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

from octavo.cli.app import VERBS

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
DOCUMENT = (ROOT / "docs" / "container.md").read_text("utf-8")
IGNORE = (ROOT / ".dockerignore").read_text("utf-8").split()
DEVICES = ("cpu", "cuda")


def instructions(name: str) -> list[str]:
    """What follows each instruction of a name, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", joined, re.MULTILINE)


def check_command(words: list[str]) -> None:
    """A command line of octavo has a verb and options that there are."""
    verb = next(verb for verb in VERBS if verb.name == words[0])
    parameters = inspect.signature(verb.load()).parameters
    for word in words[1:]:
        assert not word.startswith("--") or word[2:].replace("-", "_") in parameters, word


def test_each_device_has_the_stages_that_the_image_is_built_from() -> None:
    """A stage named with ${DEVICE} is there for every device, and before it is used."""
    stages: list[str] = []
    for line in instructions("FROM"):
        base, _, name = line.partition(" AS ")
        if "${DEVICE}" in base:
            assert {base.replace("${DEVICE}", device) for device in DEVICES} <= set(stages), line
        stages.append(name)
    assert set(re.findall(r"from=([\w-]+)", DOCKERFILE)) == {"build"} <= set(stages)
    assert re.findall(r"^ARG DEVICE=(\w+)", DOCKERFILE, re.MULTILINE) == ["cpu"]
    assert set(re.findall(r"DEVICE=(\w+)", DOCKERFILE + DOCUMENT)) == set(DEVICES)


def test_what_the_build_needs_is_let_in_and_is_there() -> None:
    assert IGNORE[0] == "*"
    let_in = {line[1:] for line in IGNORE if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    cmake = (ROOT / "CMakeLists.txt").read_text("utf-8")
    named = set(re.findall(r"\b(csrc|cmake|python|reference)/", cmake)) | {"CMakeLists.txt"}
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for field in (r"^readme = (.+)", r"^license-files = \[(.+)\]"):
        files = re.findall(r'"([^"]+)"', re.search(field, project, re.MULTILINE)[1])
        assert files
        named |= {file.split("/")[0] for file in files}
    link = ROOT / "python" / "octavo" / "reference"
    assert link.is_symlink() or link.is_dir()
    assert named | {"reference", "pyproject.toml"} <= let_in
    assert "OCTAVO_CUDA" in cmake
    assert 'cmake.define.OCTAVO_CUDA="${OCTAVO_CUDA}"' in DOCKERFILE
    assert re.findall(r"^ENV OCTAVO_CUDA=(\w+)$", DOCKERFILE, re.MULTILINE) == ["OFF", "ON"]


def test_the_images_serve_as_another_user_with_a_health_check() -> None:
    assert instructions("ENTRYPOINT") == ['["octavo"]'] * 2
    assert instructions("USER") == ["10001"] and instructions("VOLUME") == ["/models"]
    assert "--uid 10001" in DOCKERFILE and "chown octavo /models" in DOCKERFILE
    for command in instructions("CMD"):
        check_command(json.loads(command))
    app = (ROOT / "python" / "octavo" / "server" / "app.py").read_text("utf-8")
    (check,) = re.findall(r"HEALTHCHECK.* CMD (\[.+\])", DOCKERFILE)
    program = json.loads(check)[2]
    compile(program, "HEALTHCHECK", "exec")
    assert f'@app.get("{re.findall(r":8000(/[a-z]+)", program)[0]}"' in app
    assert "OCTAVO_HOME=/models" in DOCKERFILE and DOCKERFILE.count("--no-cache-dir") == 3


@pytest.mark.parametrize("line", re.findall(r"(docker run [^`\n]+)", DOCUMENT))
def test_the_commands_of_the_document(line: str) -> None:
    words = shlex.split(line)
    image = next(index for index, word in enumerate(words) if re.match(r"octavo(:cuda)?$", word))
    if words[image + 1 :]:
        check_command(words[image + 1 :])
    for variable in re.findall(r"-e ([A-Z_]+)=", line):
        source = (ROOT / "python" / "octavo" / "config.py").read_text("utf-8")
        source += (ROOT / "python" / "octavo" / "weights" / "huggingface.py").read_text("utf-8")
        assert variable in source
