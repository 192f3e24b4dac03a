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


def test_the_stages_are_copied_from_and_end_with_the_processor() -> None:
    stages = [line.rpartition(" AS ")[2] for line in instructions("FROM")]
    assert stages == ["build-cpu", "build-cuda", "cuda", "cpu"]
    assert set(re.findall(r"from=([\w-]+)", DOCKERFILE)) == {"build-cpu", "build-cuda"}
    assert re.findall(r"--target (\w+)", DOCUMENT) == ["cuda"]


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
    assert set(re.findall(r"-Ccmake\.define\.(\w+)=(\w+)", DOCKERFILE)) == {
        *(("OCTAVO_CUDA", "OFF"), ("OCTAVO_CUDA", "ON"))
    }


def test_both_images_serve_as_another_user_with_a_health_check() -> None:
    assert instructions("ENTRYPOINT") == ['["octavo"]'] * 2
    assert instructions("USER") == ["10001"] * 2 and instructions("VOLUME") == ["/models"] * 2
    for command in instructions("CMD"):
        check_command(json.loads(command))
    app = (ROOT / "python" / "octavo" / "server" / "app.py").read_text("utf-8")
    checks = re.findall(r"HEALTHCHECK.* CMD (\[.+\])", DOCKERFILE)
    assert len(checks) == 2
    for check in checks:
        program = json.loads(check)[2]
        compile(program, "HEALTHCHECK", "exec")
        assert f'@app.get("{re.findall(r":8000(/[a-z]+)", program)[0]}"' in app
    assert "OCTAVO_HOME=/models" in DOCKERFILE and DOCKERFILE.count("--no-cache-dir") == 4


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
