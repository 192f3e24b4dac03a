"""octavo batch, resumed: its own answers are kept, another run's never pass for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from batch_helpers import CHAT, HELLO, openai, read, run, write
from text_helpers import CHATML_TEMPLATE, tiny_model, write_config
from weights_helpers import random_weights, write_model

from octavo.cli import batch_stamp, main

SHORT = ("--max-tokens", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def begun(model, tmp_path) -> tuple[Path, Path]:
    """An input of four lines, and its answers."""
    lines = ["Hello fox", "ship of", json.dumps({"prompt": "own", "custom_id": "mine"}), "the dog"]
    source, target = write(tmp_path / "in.txt", lines), tmp_path / "out.jsonl"
    assert run(model, source, target, *SHORT) == 0
    return source, target


def answer_lines(target: Path, custom_id: str) -> list[str]:
    lines = target.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["custom_id"] == custom_id]


def without(target: Path, custom_id: str) -> None:
    """Delete an answer, as a user would by hand."""
    gone = answer_lines(target, custom_id)
    lines = target.read_text(encoding="utf-8").splitlines()
    write(target, [line for line in lines if line not in gone])


def refused(capsys: pytest.CaptureFixture[str], target: Path, *command: object) -> str:
    """The message of a run that must be refused and leave the file as it is."""
    target.write_bytes(target.read_bytes() + b'{"id": "batch_req_torn')
    before = target.read_bytes()
    capsys.readouterr()
    assert run(*command) == 2
    assert target.read_bytes() == before
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--overwrite" in said
    return said


def test_answers_to_another_input_are_refused(model, begun, tmp_path, capsys):
    _, target = begun
    other = write(tmp_path / "p2.txt", ["other", "prompts", "of the", "same number"])
    without(target, "mine")
    said = refused(capsys, target, model, other, target, *SHORT)
    assert f"another prompt than {other}, line 1 ('line-1'), holds now" in said
    assert "2 more" in said and "known by its number" in said


@pytest.mark.parametrize("content", ["a note", '{"id": "mine"}', "[1]", " ", "0"])
def test_a_file_of_another_program_is_left_alone(model, begun, capsys, content):
    source, target = begun
    for end in ("", "\n"):
        target.write_text(content + end)
        assert run(model, source, target, *SHORT) == 2
        assert "line 1, is not an answer of a batch" in capsys.readouterr().err
        assert target.read_text() == content + end


def test_an_edited_line_is_refused_by_name_and_can_be_answered_anew(model, begun, capsys):
    source, target = begun
    write(source, ["Hello fox", "ship of Paris", *source.read_text().splitlines()[2:]])
    said = refused(capsys, target, model, source, target, *SHORT)
    assert "line 2 ('line-2'), holds now" in said and "more" not in said.split("Nothing")[0]
    assert f"delete their answers from {target}" in said
    kept = target.read_text().splitlines()[:-1]  # but for the torn one
    without(write(target, kept), "line-2")
    rest = target.read_bytes()
    assert run(model, source, target, *SHORT) == 0
    assert target.read_bytes().startswith(rest) and len(read(target)) == 4


OPTIONS = {
    "max_tokens": (["--max-tokens", "4"], "max_tokens was 3 and is 4"),
    "temperature": (["-t", "1"], "temperature was 0.0 and is 1.0"),
    "stop": (["--stop", "x"], 'stop was [] and is ["x"]'),
    "system": (["--system", "Be brief."], "system was left out and is"),
    "raw": (["--raw"], "chat was true and is false"),
    "quantize": (["--quantize", "int4"], 'quantize was left out and is "int4"'),
    "dtype": (["--dtype", "f32"], 'dtype was "bf16" and is "f32"'),
    "kv_dtype": (["--kv-dtype", "int8"], 'kv_dtype was "bf16" and is "int8"'),
    "ranks": (["-tp", "2"], "tensor_parallel_size was left out and is 2"),
    "max_model_len": (["--max-model-len", "128"], "max_model_len was 256 and is 128"),
    "dummy weights": (["--seed", "1"], 'load_format was "dummy, of seed 0" and is'),
}


@pytest.mark.parametrize(("length", "shown"), [(58, 60), (59, 60)])
def test_long_values_of_options_are_cut(length, shown):
    said = batch_stamp._describe("x" * length)  # with its two quotes
    assert len(said) == shown and said.endswith("...") == (length == 59)


@pytest.mark.parametrize("name", OPTIONS)
def test_other_options_are_refused_by_name(model, begun, capsys, name):
    source, target = begun
    more, complaint = OPTIONS[name]
    said = refused(capsys, target, model, source, target, *SHORT, *more)
    assert complaint in said and "line 1 ('line-1'), with other options" in said


def test_the_seed_counts_where_words_are_drawn(tmp_path, capsys):
    directory = tiny_model(tmp_path / "real")
    config = json.loads((directory / "config.json").read_text())
    write_model(directory, config, weights=random_weights(config))
    source = write(tmp_path / "in.txt", ["Hello fox", "ship of"])
    target = tmp_path / "out.jsonl"
    command = ["batch", str(source), str(target), "-m", str(directory), *SHORT]
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 0  # greedy: it changes nothing
    assert main([*command, "-t", "1", "--overwrite"]) == 0
    assert main([*command, "-t", "1.0"]) == 0
    assert main([*command, "-t", "1", "--seed", "1"]) == 2
    assert "seed_of_the_run was 0 and is 1" in capsys.readouterr().err
    # The weights are another version's: the last layer was trained a little more.
    weights = random_weights(config)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    write_model(directory, config, weights=weights)
    assert main([*command, "-t", "1"]) == 2
    assert "is of another model" in capsys.readouterr().err


def test_what_changes_no_answer_does_not_hinder(model, begun, tmp_path, capsys):
    source, target = begun
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    plain = [
        *("--num-threads", "1", "--max-num-seqs", "2", "--deterministic", "--device", "cpu"),
        *("--dtype", "bf16", "--kv-dtype", "bf16", "--max-model-len", "256", "--chat"),
    ]
    before = target.read_bytes()
    assert run(str(moved), source, target, *SHORT, *plain) == 0
    assert target.read_bytes() == before
    # What the lines say themselves leaves nothing to the command, however they are written.
    own = {"max_tokens": 2, "temperature": 2, "top_p": 1, "user": "me"}
    write(source, [openai("a", CHAT, messages=HELLO, **own)])
    assert run(model, source, target, "--overwrite") == 0
    parts = [{"type": "text", "text": "Hello fox"}]
    messages = [{"name": None, "tool_calls": [], "content": parts, "role": "user"}]
    body = {"temperature": 2.0, "messages": messages, "max_completion_tokens": 2}
    line = {"body": body, "url": CHAT, "custom_id": "a"}
    write(source, ["", json.dumps(line)])
    more = ("--max-tokens", "9", "-t", "0.5", "--system", "not for messages", "--raw")
    assert run(model, source, target, *more[:-1]) == 0
    assert "all 1 answered" in capsys.readouterr().err


def test_lines_added_at_the_end_are_answered(model, begun):
    source, target = begun
    before = target.read_bytes()
    source.write_text(source.read_text() + "one more\n")
    assert run(model, source, target, *SHORT) == 0
    assert target.read_bytes().startswith(before)
    assert len(read(target)) == 5


def test_lines_taken_out_or_moved(model, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    named = [json.dumps({"prompt": f"fox {i}", "custom_id": f"id {i}"}) for i in range(3)]
    write(source, named)
    assert run(model, source, target, *SHORT) == 0
    before = target.read_bytes()
    write(source, named[::-1])
    assert run(model, source, target, *SHORT) == 0  # ids tell them apart, in any order
    assert target.read_bytes() == before
    write(source, named[1:])
    said = refused(capsys, target, model, source, target, *SHORT)
    assert "answers 'id 0', which is not in" in said and "Put it back" in said
    write(source, ["fox", "ship"])
    assert run(model, source, target, *SHORT, "--overwrite") == 0
    write(source, ["ship", "fox"])
    said = refused(capsys, target, model, source, target, *SHORT)
    assert "another prompt" in said and "add new ones at the end" in said


def test_errors_are_tried_again_once_their_line_is_another(model, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, ["good", '{"prompt": ', openai("w", CHAT, messages=HELLO, nonsense=1), "fine"])
    assert run(model, source, target, *SHORT) == 1
    good = [*answer_lines(target, "line-1"), *answer_lines(target, "line-4")]
    write(source, ["good", '{"prompt": "whole"}', openai("w", CHAT, messages=[], top_k=1), "fine"])
    capsys.readouterr()
    target.chmod(0o640)
    assert run(model, source, target, *SHORT) == 1
    assert "2 of 4 answered by an earlier run" in capsys.readouterr().err
    found = read(target)  # one record for each id
    assert found["line-2"]["error"] is None and "messages is empty" in str(found["w"]["error"])
    assert target.read_text().splitlines()[:2] == sorted(good, key=target.read_text().index)
    assert target.stat().st_mode & 0o777 == 0o640
    assert not list(tmp_path.glob(".*"))
    # With other options it fails all the same, and the answers do not fit: nothing is dropped.
    refused(capsys, target, model, source, target, "--max-tokens", "4")


def test_a_change_of_the_chat_template_makes_another_model(tmp_path, capsys):
    directory = tiny_model(tmp_path / "tiny")
    source, target = write(tmp_path / "in.txt", ["fox"]), tmp_path / "out.jsonl"
    assert run(str(directory), source, target, *SHORT) == 0
    write_config(directory, chat_template=CHATML_TEMPLATE.replace("\\n", "  "))
    said = refused(capsys, target, str(directory), source, target, *SHORT)
    assert f"is of another model: {str(directory)!r}, whose digest was" in said


def test_outputs_of_parts_can_be_put_together(model, begun, tmp_path, capsys):
    source, target = begun
    whole = target.read_text().splitlines()
    write(target, [*whole[2:], *whole[:2], whole[1]])
    assert run(model, source, target, *SHORT) == 0
    assert run(model, source, tmp_path / "b.jsonl", "--max-tokens", "4") == 0
    other = answer_lines(tmp_path / "b.jsonl", json.loads(whole[0])["custom_id"])
    write(target, [*whole, *other])
    said = refused(capsys, target, model, source, target, *SHORT)
    assert "lines 1 and 5, both answer" in said


def test_overwrite_forgets_answers_only_when_the_model_has_been_loaded(model, begun, capsys):
    source, target = begun
    before = target.read_bytes()
    bare = target.with_name("bare")
    bare.mkdir()
    shutil.copy(Path(model, "config.json"), bare)
    for more in (
        *(["-m", "/no/such"], ["--max-model-len", "999"], ["--load-format", "auto"]),
        *(["--event-log", "/no/such"], ["--event-log", str(target)], ["-m", str(bare)]),
    ):
        assert run(model, source, target, "--overwrite", *more) == 2
        assert target.read_bytes() == before
    assert run(model, source, target, "--overwrite", "--max-tokens", "1") == 0
    assert target.read_bytes() != before and len(read(target)) == 4
