"""What an error message advises is done, and has to help."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cuda_helpers import DEVICE, needs_cuda
from parrot import say, write_parrot
from text_helpers import tiny_model
from weights_helpers import tiny_config

from octavo import _native
from octavo.cli.app import run
from octavo.config import EngineConfig, RuntimeOptions
from octavo.diff.setup import _check_length
from octavo.errors import InsufficientMemoryError, InvalidArgumentError, OctavoError
from octavo.llm import LLM
from octavo.models.llama import read_spec
from octavo.quantization.plan import Scheme, weight_bytes
from octavo.quantize.sensitivity import PartCost, Sensitivity, spend_bits
from octavo.runtime import loader
from octavo.runtime.remedies import Needs
from octavo.server.options import ServerOptions
from octavo.server.serving import _bind
from octavo.weights.model_files import read_model

KIB = 1024


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model for load_format="dummy", 187 KiB in float32, 16 KiB of cache a block of 16 tokens."""
    return tiny_model(tmp_path / "model")


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what the machine has before a model is loaded; its weights then take their part."""
    memory = {"all": 0, "weights": 0, "taken": 0}
    make_runtime, fill = loader._make_runtime, loader.fill

    def set_memory(num_bytes: int) -> None:
        memory["all"] = num_bytes

    def make(device: str, spec: Any, options: RuntimeOptions, *more: Any) -> Any:
        memory["weights"] = weight_bytes(spec, options.formats, options.dtype)
        memory["taken"] = 0
        return make_runtime(device, spec, options, *more)

    def load(*arguments: Any) -> None:
        fill(*arguments)
        memory["taken"] = memory["weights"]

    monkeypatch.setattr(loader, "_make_runtime", make)
    monkeypatch.setattr(loader, "fill", load)
    monkeypatch.setattr(loader, "available_memory", lambda **_: memory["all"] - memory["taken"])
    return set_memory


def load(model: Path, **options: Any) -> LLM:
    return LLM(model, load_format="dummy", num_threads=1, **options)


GIVEN: list[dict[str, Any]] = [
    {},
    {"kv_dtype": "bf16"},
    {"kv_dtype": "int8"},
    {"dtype": "bf16"},
    {"dtype": "bf16", "kv_dtype": "f32"},
    {"quantize": "int8"},
    {"quantize": "int8", "keep_embedding": True},
    {"quantize": "int4", "kv_dtype": "int8"},
    {"kv_memory_fraction": 0.95},
    {"num_kv_blocks": 16},
    {"num_kv_blocks": 64, "kv_dtype": "bf16"},
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(map(str, given.values())))
def test_memory(model: Path, memory_of: Any, given: dict[str, Any]) -> None:
    """With little memory, then with more and more, until the model fits as it is."""
    refused = followed = 0
    for kib in (*range(20, 400, 60), 600, 1000, 1400):
        memory_of(kib * KIB)
        try:
            load(model, **given)
        except InsufficientMemoryError as error:
            refused += 1
            for remedy in error.remedies:
                assert any(given.get(name) != value for name, value in remedy.items()), remedy
                load(model, **{**given, **remedy})
                followed += 1
            if not error.remedies:
                assert "use a smaller model" in str(error)
                with pytest.raises(InsufficientMemoryError):  # nothing would have helped
                    load(model, quantize="int4", kv_dtype="int8", max_model_len=16)
    assert refused and followed > refused / 2
    memory_of(10**9)
    load(model, **given)


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=needs_cuda)])
def test_sizes_of_caches(device: str) -> None:
    spec = read_spec(tiny_config())
    kinds: list[Any] = ["f32", "bf16", "int8"]
    options = [RuntimeOptions("f32", kind, 32, 64, 2, 32, 1) for kind in kinds]
    sizes = [_native.Runtime(device, spec, each).kv_bytes_per_block() for each in options]
    for each, size in zip(options, sizes, strict=True):
        needs = Needs(spec, EngineConfig(), each, {}, 0, size)
        assert [needs.bytes_of_block(kind) for kind in kinds] == sizes


def test_nothing_is_advised_that_is_so_already(model: Path, memory_of: Any) -> None:
    memory_of(600 * KIB)
    with pytest.raises(InsufficientMemoryError) as error:
        load(model, dtype="f32")
    assert {"kv_dtype": "bf16"} in error.value.remedies
    memory_of(200 * KIB)
    with pytest.raises(InsufficientMemoryError) as error:
        load(model, dtype="bf16", kv_dtype="bf16")
    assert "kv_dtype='bf16'" not in str(error.value) and "as bf16" in str(error.value)


def advised_options(message: str) -> list[list[str]]:
    """ "…: use --a 1 --b 2, or --c 3, or free memory" -> [["--a", "1", "--b", "2"], …]"""
    (advice,) = re.findall(r": use (--.*), or free memory$", message.strip())
    return [shlex.split(way) for way in advice.split(", or ")]


@pytest.mark.parametrize("kib", [60, 120, 250])
def test_memory_on_the_command_line(
    model: Path, memory_of: Any, capsys: pytest.CaptureFixture[str], kib: int
) -> None:
    """In the words of the command line, and only with options that the verb has."""
    command = ["generate", "-m", str(model), "--load-format", "dummy", "-n", "1", "--raw", "hi"]
    command += ["--num-threads", "1"]
    memory_of(kib * KIB)
    assert run(command) == 2
    message = capsys.readouterr().err
    ways = advised_options(message)
    assert ways and "kv_memory_fraction=" not in message
    for way in ways:
        assert run([*command, *way]) == 0, (way, capsys.readouterr().err)


def test_too_few_blocks(model: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 16.*max_model_len to 112"):
        load(model, num_kv_blocks=7)
    assert load(model, num_kv_blocks=16).max_model_len == 256
    assert load(model, num_kv_blocks=7, max_model_len=112).max_model_len == 112


def test_a_cache_that_cannot_be_allocated(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory is in pieces, or another process was quicker."""

    class Runtime(_native.Runtime):  # type: ignore[misc]
        def alloc_kv(self, num_blocks: int) -> None:
            if num_blocks > most:
                raise MemoryError
            super().alloc_kv(num_blocks)

    monkeypatch.setattr(_native, "Runtime", Runtime)
    for most in (300, 10):
        with pytest.raises(InsufficientMemoryError, match="blocks .* could not be") as error:
            load(model)
        (remedy,) = error.value.remedies
        assert ("max_model_len" in remedy) == (most == 10)
        load(model, **remedy)


def message_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command that has to fail says."""
    capsys.readouterr()
    assert run(list(command)) == 2
    return capsys.readouterr().err


def test_a_base_model_asked_to_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(write_parrot(tmp_path / "base", say("there", after="hi"), template=None))
    generate = ["generate", "hi", "-m", base, "-t", "0", "-q", "--num-threads", "1"]
    assert "leave out --system" in message_of(capsys, *generate, "--system", "x")
    assert "leave out --chat" in message_of(capsys, *generate, "--chat")
    assert "leave out one" in message_of(capsys, *generate, "--system", "x", "--raw")
    assert run(generate) == 0 and capsys.readouterr().out == "there\n"
    llm = LLM(base, num_threads=1)
    with pytest.raises(OctavoError, match="a text to continue instead of messages"):
        llm.chat([{"role": "user", "content": "hi"}], progress=False)


def test_an_address_that_cannot_be_listened_on() -> None:
    with pytest.raises(OctavoError, match="--host of this machine") as error:
        _bind(ServerOptions(host="192.0.2.1", port=0))  # of no machine: RFC 5737
    assert "--port" not in str(error.value)
    with _bind(ServerOptions(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OctavoError, match="--port 0"):
            _bind(ServerOptions(port=port))


@pytest.mark.parametrize(
    ("random", "steps", "ways"),
    [(250, 20, ["236 tokens, or lower --steps to 6"]), (300, 1, ["255"]), (3, 300, ["253"])],
)
def test_a_comparison_longer_than_the_model(
    model: Path, capsys: pytest.CaptureFixture[str], random: int, steps: int, ways: list[str]
) -> None:
    command = ["diff", str(model), "--load-format", "dummy"]
    said = message_of(capsys, *command, "--random", str(random), "--steps", str(steps))
    assert all(way in said for way in ways)
    for name, number in re.findall(r"(at most|--steps to) (\d+)", said):
        count = int(number) if name == "at most" else random
        _check_length(read_model(model).spec, count, int(number) if count == random else steps)


def test_bits_that_do_not_suffice() -> None:
    part = PartCost("layers.0.qkv", ("layers.0.q",), 1000, 4.5, 8.0, 0.1)
    with pytest.raises(InvalidArgumentError, match=r"takes 4\.500.*more, or a group_size of 64$"):
        spend_bits(Sensitivity((part,), 4.5, 1), Scheme("int4", group_size=32), 4.3)
    with pytest.raises(InvalidArgumentError, match="or more$"):
        spend_bits(Sensitivity((part,), 4.125, 1), Scheme("int4", group_size=128), 4.0)
    assert spend_bits(Sensitivity((part,), 4.25, 1), Scheme("int4", group_size=64), 4.3)


def test_no_choice_is_named_that_ordinary_builds_lack() -> None:
    with pytest.raises(InvalidArgumentError, match="auto, cpu, cuda$"):
        EngineConfig(device="gpu")


@pytest.mark.parametrize(
    "given",
    [["smollm2-135m", "--revision", "x"], ["smollm2-135m", "--name", "x"], ["a/b", "--name"]],
)
def test_options_of_pull_that_would_do_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
) -> None:
    """--force was advised, and --revision was then left aside again."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    said = message_of(capsys, "pull", *given, *(["x"] if given[-1] == "--name" else []))
    assert "leave it out" in said and given[1] in said


def limited(model: Path, kib: int, **options: Any) -> str:
    """Load in a process of so much address space: "fits", or what is advised instead."""
    program = (
        "import resource, sys\n"
        "from octavo import LLM, _native\n"
        "from octavo.runtime import loader\n"
        "from octavo.errors import InsufficientMemoryError\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (pages + {kib * KIB}, resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    LLM(sys.argv[1], load_format='dummy', num_threads=1, **{options!r})\n"
        "    print('fits')\n"
        "except InsufficientMemoryError as error:\n"
        "    print(error.remedies)\n"
    )
    words = [sys.executable, "-c", program, str(model)]
    # Without an arena of the C library's for each thread, of which the number is not certain.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    found = subprocess.run(words, capture_output=True, text=True, timeout=60, env=env)
    assert not found.returncode, found.stderr
    return found.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and an enforced RLIMIT_AS")
def test_a_limit_of_the_shell(tmp_path: Path) -> None:
    """What weights take of it counts once, and where they cannot be mapped, smaller ones help."""
    config = tiny_config(hidden_size=1024, intermediate_size=8192, num_hidden_layers=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = 4 * 3 * 1024 * 8192 * 4 // KIB  # of the MLPs as float32: 384 MiB
    advised = limited(tmp_path, 3 * weights // 4, dtype="f32")
    remedies = ast.literal_eval(advised)
    assert "quantize" in remedies[0]
    assert limited(tmp_path, 3 * weights // 4, dtype="f32", **remedies[0]) == "fits"
    assert limited(tmp_path, 9 * weights // 5, dtype="f32") == "fits"


@pytest.mark.skipif(sys.platform != "linux", reason="needs an enforced RLIMIT_AS")
def test_no_room_for_a_thread() -> None:
    """It has a stack of megabytes, for which the address space may be too small."""
    program = (
        "import resource, sys, threading\n"
        "from octavo import _native\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + 16 * 2**20, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    _native.measure_flops(64, seconds=0.01)\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert found.stdout.startswith("a thread could not be started: "), found.stderr
