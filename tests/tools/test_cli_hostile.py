"""What a user can get wrong, in every command: one message, exit code 2, never a traceback.

test_cli_paths.py has paths, test_cli_environment.py streams and disks; this has values, names and
networks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from text_helpers import tiny_model

from octavo.cli import main

WRONG = {  # command line: what the message names
    "generate hi -m {empty}": "no config.json",
    "generate hi -m {no_config}": "architectures and model_type are missing",
    "generate hi -m {junk}.gguf": "expected b'GGUF'",
    "generate hi -m {bad}": "expected a model directory or a GGUF file",
    "generate hi -m nobody/nothing --offline": "HF_HUB_OFFLINE is set",
    "--offline generate hi -m nobody/nothing": "HF_HUB_OFFLINE is set",
    "pull nobody/nothing --offline": "offline mode is enabled",
    "info /dev/null": "neither a directory, a GGUF file, nor a pulled model",
    "generate hi -m {textless}": "holds no tokenizer.json; expected the tokenizer in",
    "chat -m {textless}": "holds no tokenizer.json; expected the tokenizer in",
    "generate hi -m {model} --json-schema {bad}": "the JSON schema is no JSON",
    "generate hi -m {model} --regex (": "the regex cannot be followed",
    "generate hi -m {model} --grammar {bad}": "the grammar is in GBNF's syntax, and wrong",
    "generate hi -m {model} --regex x --choice y": "--regex and --choice do not go together",
    "generate hi -m {model} --adapter {empty}": "no adapter_config.json",
    "generate hi -m {model} --speculative-config {{": "is not JSON",
    "generate hi -m {model} --num-threads 99999": "num_threads is 99999",
    "generate hi -m {model} -t nan": "temperature is nan",
    "generate hi -m {model} --beams 0": "beam_width is 0",
    "generate hi -m {model} --stop-token-id -1": "stop_token_ids is -1",
    "generate hi -m {model} -n 0": "max_tokens is 0; expected 1 or more, or prompt_logprobs",
    "generate hi -m {model} --prompt-logprobs 1": "is shown with --json only",
    "generate hi -m {model} --json --prompt-logprobs 99": "prompt_logprobs is 99",
    "generate hi -m {model} --amateur {bad}": "expected a model directory or a GGUF file",
    "generate hi -m {model} --amateur {model} --alpha 2": "alpha is 2.0",
    "serve {model} --port 99999": "port is 99999",
    "serve {model} --host 8.8.8.8": "choose a --host of this machine",
    "serve {model} --shutdown-timeout nan": "shutdown_timeout is nan",
    "serve {model} --adapter x": "expected NAME=PATH",
    "bench serve http://127.0.0.1:99999": "expected one as http://127.0.0.1:8000",
    "bench serve http://[::1": "expected one as http://127.0.0.1:8000",
    "bench serve ftp://x": "expected one as http://127.0.0.1:8000",
    "bench serve --slo x": "--slo is 'x'",
    "bench {model} -p x": "-p is 'x'",
    "bench {model} -r 0": "repetitions is 0",
    "bench spec {model} --acceptance 2": "--acceptance is '2'",
    "bench spec {model} --second-guess 0.5": "expected one number, beside --acceptance",
    "bench spec {model} --acceptance 0.5 --second-guess 2": "--second-guess is '2'",
    "slurm bogus": "No such command 'bogus'",
    "slurm render nope": "the kind of job is 'nope'",
    "slurm render bench -c {bad}": "is no YAML: while parsing",
    "slurm render bench -c {out}": "expected a YAML file that describes a cluster",
    "slurm preflight {bad}": "expected one that `octavo slurm render` wrote",
    "slurm collect {out}": "expected one that a job's --results named",
    "report {bad}": "expected",
    "batch {empty} {out}": "is a directory",
    "batch /dev/null {out}": "is a pipe or a device",
    "pull {junk}.gguf": "expected b'GGUF'",
    "pull a/b/c": "'a/b/c' cannot be pulled",
    "remove ../..": "is not a pulled model",
    "quantize {model} {empty}": "exists; expected the name of a new directory",
    "quantize {model} {out} --group-size 7 --scheme int4": "group_size is 7",
    "merge {model} {no_config} {out}": "holds neither model.safetensors nor",
    "diff {model} --tolerance nan": "--tolerance is nan",
    "diff {model} --random 9999999": "the model has room for 256",
    "eval {model} --window 0": "window is 0; expected 2 tokens or more",
    "eval {model} --stride 0": "stride is 0",
    "plan {model} --gpu z": "--gpu is 'z'",
    "explain --log {bad}": "expected an object in JSON",
    "explain {bad}": "name the log with --log",
    "trace {bad}": "expected an object in JSON",
    "replay {bad} --speed 0": "--speed is 0.0",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    made = {name: folder / name for name in ("empty", "no_config", "junk", "bad", "out", "model")}
    made["empty"].mkdir()
    made["no_config"].mkdir()
    (made["no_config"] / "config.json").write_text("{}")
    made["junk"].with_name("junk.gguf").write_bytes(bytes(range(256)))
    made["bad"].write_text("{")
    tiny_model(made["model"])
    made["textless"] = tiny_model(folder / "textless")
    (made["textless"] / "tokenizer.json").unlink()
    return made


@pytest.mark.parametrize("line", WRONG)
def test_one_message_and_no_traceback(line, files, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    words = [word.format(**files) for word in line.split()]
    if {"generate", "chat", "serve", "bench", "eval"} & {words[0]} and words[1] != "serve":
        words += ["--load-format", "dummy"]
    code = main(words)
    os.environ.pop("HF_HUB_OFFLINE", None)  # what --offline has set
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    message = " ".join(shown.err.split())
    assert message.startswith("error: ") and WRONG[line] in message
    assert "Errno" not in message
    assert not files["out"].exists()


def test_a_server_on_a_port_that_is_taken(files, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["serve", str(files["model"]), "--load-format", "dummy", "--port", str(port)]
        assert main(words) == 2
        assert "Address already in use; choose another --port" in capsys.readouterr().err


def test_a_file_as_the_home(monkeypatch, files, capsys):
    monkeypatch.setenv("OCTAVO_HOME", str(files["bad"]))
    assert main(["list"]) == 0
    assert main(["batch", str(files["bad"]), str(files["out"]), "--event-log", "auto"]) == 2
    assert "the event log cannot be written to" in capsys.readouterr().err


def test_a_batch_without_a_tokenizer(files, tmp_path, capsys):
    words = ["batch", str(files["bad"]), str(tmp_path / "out"), "-m", str(files["textless"])]
    assert main([*words, "--load-format", "dummy"]) == 2
    assert "holds no tokenizer.json; expected the tokenizer in" in capsys.readouterr().err


def test_a_server_without_a_tokenizer_says_so(files, monkeypatch, caplog):
    monkeypatch.setattr("octavo.server.serving.serve", lambda options, load: load())
    for name, expected in (("textless", True), ("model", False)):
        caplog.clear()
        assert main(["serve", str(files[name]), "--load-format", "dummy"]) == 0
        warned = [each.message for each in caplog.records if each.levelname == "WARNING"]
        assert ("holds no tokenizer.json" in " ".join(warned)) == expected
