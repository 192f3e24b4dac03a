"""GGUF models used as they lie: without being pulled first, and in one file or in parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from weights_helpers import gguf_config, memory_below, tiny_config, write_gguf, write_model

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.config import Environment
from octavo.errors import ModelNotFoundError, TokenizerError, UnsupportedModelError, WeightsError
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.convert import convert_gguf
from octavo.weights.gguf_parts import find_gguf
from octavo.weights.hub import pull, resolve_model
from octavo.weights.model_files import read_model

GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)


def write_parts(folder: Path, tensors: int = 8, **options: Any) -> list[Path]:
    """Write a split GGUF by the gguf package; its parts in order."""
    folder.mkdir(exist_ok=True)
    write_gguf(folder / "tiny.gguf", tensors_per_part=tensors, **options)
    parts = sorted(folder.iterdir())
    assert parts[0].name == f"tiny-00001-of-{len(parts):05}.gguf"
    return parts


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


def everything_below(folder: Path) -> dict[str, int]:
    return {str(entry): entry.stat().st_mtime_ns for entry in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_pull_writes(kind: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_config(tie_word_embeddings=tied), kind=kind)
    # Not as codes, which `octavo pull` does not write.
    files, pulled = read_model(path, "auto"), read_model(converted(path, tmp_path / "pulled"))
    assert (files.path, files.config, files.spec) == (path, pulled.config, pulled.spec)
    assert files.eos_token_ids == pulled.eos_token_ids == (1, 2)
    ours, theirs = open_checkpoint(files), open_checkpoint(pulled)
    assert ours.infos == theirs.infos and ours.dtype == theirs.dtype
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)


def test_answers_are_those_of_the_pulled_model_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    parts = write_parts(folder, kind="F16")
    home = tmp_path / "home"
    monkeypatch.setenv("OCTAVO_HOME", str(home))
    monkeypatch.chdir(folder)
    before = everything_below(tmp_path)
    answers = []
    for model in (parts[1], folder):
        llm = LLM(model, max_model_len=64)
        assert llm.chat_template is not None
        answers.append(llm.generate("the cat", GREEDY, progress=False)[0].outputs[0])
    assert everything_below(tmp_path) == before and not home.exists()
    llm = LLM(converted(parts[0], tmp_path / "pulled"), max_model_len=64)
    expected = llm.generate("the cat", GREEDY, progress=False)[0].outputs[0]
    for answer in answers:
        assert answer.token_ids == expected.token_ids
        assert answer.logprobs == expected.logprobs


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_stands_for_all(part: int, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    assert len(parts) == 3
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    files, single = read_model(parts[part]), read_model(whole)
    assert files.config == single.config and files.path == parts[0]
    ours, theirs = open_checkpoint(files), open_checkpoint(single)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)


def test_a_split_model_is_pulled_under_its_own_name(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    environment = Environment(home=tmp_path / "home", num_threads=0, isa="auto")
    folder = pull(str(parts[2]), environment)
    assert folder.name == "tiny" and len(open_checkpoint(read_model(folder))) == 21
    # The same model through another part, and another one when any part differs.
    assert pull(str(parts[0]), environment) == folder
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    with pytest.raises(Exception, match="made from another file"):
        pull(str(parts[0]), environment)


def rewrite(path: Path, changes: dict[str, Any], drop: str = "") -> None:
    """Write a part again with other metadata, with one tensor under another name."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for name, value in changes.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        name = drop if drop and tensor is reader.tensors[0] else tensor.name
        writer.add_tensor(name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("missing", r"one of 3 parts.*missing.*\n.*tiny-00002-of-00003\.gguf"),
        ("two missing", r"tiny-00001-of-00003\.gguf\n.*tiny-00002-of-00003\.gguf"),
        ("renamed", r"is part 3 of 3.*call it NAME-00003-of-00003\.gguf"),
        ("other count", r"is part 3 of 3.*call it NAME-00003-of-00003\.gguf"),
        ("another part", r"00002-of-00003\.gguf says that it is part 1 of 3; expected part 2 of 3"),
        ("no part", r"00002-of-00003\.gguf says that it is part 1 of 0"),
        ("twice", r"'token_embd\.weight' is in tiny-00002-of-00003\.gguf and before"),
        ("tensors", r"split\.tensors\.count is 22; they hold 21 tensors"),
        ("damaged", "truncated"),
        ("absurd", r"split\.count is 100000"),
        ("above int32", r"split\.tensors\.count is 2147483648; supported: .*2147483647"),
    ],
)
def test_parts_that_are_no_whole_model(change: str, cause: str, tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    given = parts[2]
    stated = {"split.no": 1, "split.count": 3, "split.tensors.count": 21}
    if change in ("missing", "two missing"):
        parts[1].unlink()
        if change == "two missing":
            parts[0].unlink()
    elif change == "renamed":
        given = given.rename(tmp_path / "x.gguf")
    elif change == "other count":
        given = given.rename(tmp_path / "tiny-00003-of-00004.gguf")
    elif change == "another part":
        rewrite(parts[1], {**stated, "split.no": 0})
    elif change == "no part":
        rewrite(parts[1], {})
    elif change == "twice":
        rewrite(parts[1], stated, drop="token_embd.weight")
    elif change == "tensors":
        rewrite(given, {**stated, "split.no": 2, "split.tensors.count": 22})
    elif change == "damaged":
        parts[1].write_bytes(parts[1].read_bytes()[:-1000])
    elif change == "absurd":
        rewrite(given, {**stated, "split.count": 100000})
    else:
        rewrite(given, {**stated, "split.no": 2, "split.tensors.count": 2**31})
    with pytest.raises((WeightsError, UnsupportedModelError)) as caught:
        read_model(given)
    assert re.search(cause, str(caught.value), re.DOTALL), str(caught.value)


def test_a_lone_part_of_one_is_a_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, metadata={"split.no": 0, "split.count": 1, "split.tensors.count": 21})
    assert len(open_checkpoint(read_model(path))) == 21


def test_what_a_directory_of_gguf_files_stands_for(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    parts = write_parts(folder)
    (folder / "readme.md").write_text("?")
    assert find_gguf(folder) == parts[0]
    assert read_model(folder).path == parts[0]
    (folder / "Other.GGUF").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"several GGUF models.*Other\.GGUF.*tiny-00001"):
        read_model(folder)
    # Beside a configuration, they are not looked at.
    write_model(folder, tiny_config())
    assert find_gguf(folder) is None
    assert read_model(folder).spec.hidden_size == 24


def test_names_of_gguf_files(tmp_path: Path) -> None:
    environment = Environment(home=tmp_path / "home", num_threads=0, isa="auto")
    write_gguf(tmp_path / "A b.GGUF")
    blob = tmp_path / "0123abc"  # as the cache of the Hub names its files, with a link to it
    blob.write_bytes((tmp_path / "A b.GGUF").read_bytes())
    (tmp_path / "link.gguf").symlink_to(blob)
    for name in ("A b.GGUF", "0123abc", "link.gguf"):
        path = tmp_path / name
        assert resolve_model(str(path), environment) == path
        assert len(open_checkpoint(read_model(path))) == 21
    assert pull(str(tmp_path / "A b.GGUF"), environment).name == "A-b"


def test_the_small_files(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    folder = read_model(path).folder
    pulled = converted(path, tmp_path / "pulled")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (pulled / name).read_bytes()
    assert not (folder / "chat_template.jinja").is_file()
    with pytest.raises(FileNotFoundError, match=r"tiny\.gguf \(license\)"):
        (folder / "license").read_text(encoding="utf-8")
    assert Tokenizer(folder).encode("12 the") == Tokenizer(pulled).encode("12 the")
    template = ChatTemplate.load(folder)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi"


def test_a_tokenizer_that_is_refused_does_not_hide_the_model(tmp_path: Path) -> None:
    """`octavo info` needs no tokenizer; what does, says why it has none."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, pre="viking")
    files = read_model(path)
    assert len(open_checkpoint(files)) == 21
    with pytest.raises(TokenizerError, match="viking"):
        LLM(path)


def test_a_big_table_is_decoded_once_and_in_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_config(vocab_size=30_000, num_hidden_layers=1), kind="Q8_0")
    monkeypatch.setattr("octavo.weights.gguf._ROWS_AT_ONCE", 1 << 16)
    checkpoint = open_checkpoint(read_model(path, "auto"))
    assert checkpoint["layers.0.up.weight"].shape == (512, 256)  # what is imported late
    in_runs = {name: tensor.data for name, tensor in checkpoint.items()}
    num_bytes = 2 * 30_000 * 256
    with memory_below(1.15 * num_bytes):
        assert checkpoint["embed.weight"].data.nbytes == num_bytes
    monkeypatch.undo()
    for name, tensor in checkpoint.items():  # in one run each
        np.testing.assert_array_equal(in_runs[name], tensor.data, err_msg=name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", "MODEL", "the cat", "--max-tokens", "4", "--temperature", "0"],
        ["info", "MODEL"],
        ["eval", "MODEL", "--random", "40", "--json"],
        ["diff", "MODEL", "--random", "20", "--steps", "2"],
        ["quantize", "MODEL", "OUT", "--scheme", "int8", "--json"],
        ["batch", "IN", "ANSWERS", "-m", "MODEL", "--max-tokens", "3", "--temperature", "0"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_takes_a_gguf_file(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And does what it does with the pulled model."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind="BF16")
    pulled = converted(path, tmp_path / "pulled")
    (tmp_path / "in.txt").write_text("the cat\n")
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    seen = []
    for model in (path, pulled):
        names = {"MODEL": str(model), "IN": str(tmp_path / "in.txt")}
        names |= {"OUT": str(tmp_path / f"{model.stem}-out")}
        names |= {"ANSWERS": str(tmp_path / f"{model.stem}.jsonl")}
        assert main([names.get(argument, argument) for argument in arguments]) == 0
        seen.append(capsys.readouterr().out)
    if arguments[0] == "generate":
        assert seen[0] == seen[1] != ""
    elif arguments[0] == "eval":
        measured = [json.loads(text)["model"]["perplexity"] for text in seen]
        assert measured[0] == measured[1]
    elif arguments[0] == "quantize":
        contents = [
            (tmp_path / f"{model.stem}-out" / "model.safetensors").read_bytes()
            for model in (path, pulled)
        ]
        assert contents[0] == contents[1]
        assert Tokenizer(tmp_path / "tiny-out").encode("the cat")
    elif arguments[0] == "batch":
        texts = [
            json.loads((tmp_path / f"{model.stem}.jsonl").read_text())["response"]["body"][
                "choices"
            ]
            for model in (path, pulled)
        ]
        assert texts[0] == texts[1]
