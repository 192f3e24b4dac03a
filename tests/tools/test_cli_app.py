"""The command line as a whole: help, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time

import pytest
from text_helpers import tiny_model

from octavo.cli import main, streams
from octavo.cli.app import VERBS
from octavo.config import EngineConfig
from octavo.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_verb_and_imports_none_of_them():
    start = time.monotonic()
    done = run("--help")
    seconds = time.monotonic() - start
    assert done.returncode == 0 and done.stderr == ""
    for verb in VERBS:
        assert verb.name in done.stdout and verb.summary in done.stdout
    assert seconds < 5  # half a second alone; the machine may be busy
    code = (
        "import sys; from octavo.cli import main; main(['--help']);"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'gguf', 'huggingface_hub', 'octavo._native'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_explains_itself(verb, capsys):
    assert verb.load().__doc__
    assert main([*verb.name.split(), "--help"]) == 0
    assert f"octavo {verb.name}" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_ctrl_c_before_the_command_is_imported(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "octavo.cli.app":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "octavo.cli.app")
    assert main(["--help"]) == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_that_comes_as_another_error(monkeypatch, capsys):
    """As Python 3.11 wraps what interrupts the making of a class, in the middle of an import."""

    def stopped(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    monkeypatch.setattr("octavo.cli.app.build_app", stopped)
    assert main(["--help"]) == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_where_python_drops_it_comes_again(monkeypatch):
    class Dropping:
        def __del__(self):
            raise KeyboardInterrupt

    others = []
    monkeypatch.setattr(sys, "unraisablehook", others.append)
    streams.keep_interrupts()
    dropping = Dropping()
    with pytest.raises(KeyboardInterrupt):
        del dropping
        time.sleep(10)
    monkeypatch.setattr(Dropping, "__del__", lambda _: 1 / 0)
    Dropping()
    assert [each.exc_type for each in others] == [ZeroDivisionError]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("octavo ")


MISTAKES = {
    "unknown verb": (["gnerate"], "gnerate"),
    "unknown option": (["generate", "hi", "--tempature", "1"], "--temp"),
    "missing argument": (["generate"], "prompt"),
    "not a number": (["generate", "hi", "--max-tokens", "many"], "'many'"),
    "not whole": (["generate", "hi", "-n", "1.5"], "--max-tokens is '1.5'; expected a valid int"),
    "no number": (["chat", "-t", "hot"], "--temperature is 'hot'; expected a valid number"),
    "missing model": (["generate", "hi", "-m", "/no/such/model"], "/no/such/model"),
    "negative temperature": (["generate", "hi", "-t", "-1"], "temperature is -1.0"),
    "top_p": (["generate", "hi", "--top-p", "1.5"], "top_p is 1.5"),
    "max_tokens": (["generate", "hi", "--max-tokens", "0"], "max_tokens is 0"),
    "empty prompt": (["generate", ""], "prompt is empty"),
    "blank prompt": (["generate", "  \n"], "prompt is empty"),
    "dtype": (["generate", "hi", "--dtype", "f8"], "dtype is 'f8'"),
    "device": (["generate", "hi", "--device", "tpu"], "device is 'tpu'"),
    "logprobs without json": (["generate", "hi", "--logprobs", "2"], "add --json"),
    "system with raw": (["generate", "hi", "--raw", "--system", "x"], "leave out one"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_message_and_exit_code_2(name, capsys):
    arguments, hint = MISTAKES[name]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("error:") == 1
    assert hint.lower() in shown.err.lower() and "Traceback" not in shown.err


def test_prompt_longer_than_the_context(model, capsys):
    words = "dog " * 300
    assert main(["generate", words, "-m", model, "--load-format", "dummy"]) == 2
    assert "expected at most 255" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", '{"model": {"type": "nope"}}'])
def test_malformed_tokenizer(tmp_path, capsys, content):
    path = tiny_model(tmp_path)
    (path / "tokenizer.json").write_text(content)
    assert main(["generate", "hi", "-m", str(path), "--load-format", "dummy"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and str(path / "tokenizer.json") in shown


def test_malformed_template(tmp_path, capsys):
    path = tiny_model(tmp_path, chat_template="{% if %}")
    assert main(["generate", "hi", "-m", str(path), "--load-format", "dummy"]) == 2
    assert "malformed at line 1" in capsys.readouterr().err


def test_unknown_architecture(tmp_path, capsys):
    path = tiny_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (path / "config.json").write_text(json.dumps(config))
    assert main(["generate", "hi", "-m", str(path), "--load-format", "dummy"]) == 2
    assert "MambaForCausalLM" in capsys.readouterr().err


def test_a_bad_environment_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("OCTAVO_NUM_THREADS", "lots")
    assert main(["generate", "hi"]) == 2
    assert "OCTAVO_NUM_THREADS is 'lots'" in capsys.readouterr().err


def test_a_terminal_that_is_not_utf_8(model):
    command = [sys.executable, "-m", "octavo", "generate", "Grüße 🎉", "-m", model]
    command += ["--load-format", "dummy", "-n", "5", "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert "Grüße 🎉" in json.loads(done.stdout.decode("ascii"))["prompt"]


def test_a_prompt_that_the_locale_does_not_decode(model):
    """Under an ASCII locale without Python's own remedies, and bytes that are no text at all."""
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "octavo", "generate", "-m", model, "-n", "2", "--json"]
    command += ["--load-format", "dummy", "--raw"]
    for environment, words, text in (
        (locale, "Grüße".encode(), "Grüße"),
        ({}, b"a\xff", "a\ufffd"),
    ):
        done = subprocess.run(
            [*map(os.fsencode, command), words],
            env={**os.environ, **environment},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["prompt"] == text


def test_a_closed_pipe_ends_quietly(model):
    command = f"'{sys.executable}' -m octavo --help | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stderr == ""


def test_memory_that_ends_in_a_small_piece_is_no_traceback(model, monkeypatch, capsys):
    def take(*_args, **_options):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("octavo.cli.common.load_llm", take)
    assert main(["generate", "hi", "-m", str(model)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is too little memory (std::bad_alloc): use")


ENGINE_WORDS = {
    "device": "cpu",
    "dtype": "f32",
    "quantize": "int8",
    "keep_embedding": True,
    "kv_dtype": "int8",
    "max_model_len": 77,
    "num_threads": 1,
    "load_format": "dummy",
    "deterministic": True,
    "enforce_eager": True,
    "speculative_config": '{"method": "ngram"}',
}
SAMPLING_WORDS = {
    "max_tokens": ("--max-tokens", 9),
    "min_tokens": ("--min-tokens", 3),
    "stop": ("--stop", ("x",)),
    "stop_token_ids": ("--stop-token-id", (5,)),
    "include_stop_str_in_output": ("--include-stop", True),
    "ignore_eos": ("--ignore-eos", True),
    "temperature": ("--temperature", 0.5),
    "top_k": ("--top-k", 4),
    "top_p": ("--top-p", 0.75),
    "min_p": ("--min-p", 0.125),
    "seed": ("--seed", 11),
    "repetition_penalty": ("--repetition-penalty", 1.5),
    "frequency_penalty": ("--frequency-penalty", 0.25),
    "presence_penalty": ("--presence-penalty", -0.5),
    "top_n_sigma": ("--top-n-sigma", 1.25),
    "typical_p": ("--typical-p", 0.5),
    "xtc_probability": ("--xtc-probability", 0.25),
    "xtc_threshold": ("--xtc-threshold", 0.375),
    "dry_multiplier": ("--dry-multiplier", 0.75),
    "dry_base": ("--dry-base", 1.5),
    "dry_allowed_length": ("--dry-allowed-length", 3),
    "dry_penalty_last_n": ("--dry-penalty-last-n", 64),
    "dry_sequence_breakers": ("--dry-sequence-breaker", (";",)),
    "bad_words": ("--bad-word", ("x",)),
}


def as_words(option: str, value: object) -> list[str]:
    """The words on the command line that give an option this value."""
    if value is True:
        return [option]
    return [option, str(value[0] if isinstance(value, tuple) else value)]


class Taken(Exception):
    """Stands for what a command would do next."""


@pytest.mark.parametrize("name", [verb.name for verb in VERBS])
def test_options_of_loading_reach_the_engine(name, model, tmp_path, monkeypatch):
    """Each option by itself: all others keep their default."""
    places = {
        "generate": ("octavo.cli.common.load_llm", 1, ["hi", "-m", model]),
        "chat": ("octavo.cli.common.load_llm", 1, ["-m", model]),
        "embed": ("octavo.cli.common.load_llm", 1, ["hi", "-m", model]),
        "serve": ("octavo.server.application.load_logged", 1, [model]),
        "batch": ("octavo.cli.batch.describe_run", 1, ["{in}", "{out}", "-m", model]),
        "bench": ("octavo.bench.benchmark.bench", 1, [model]),
        "bench spec": ("octavo.cli.bench_spec.load_llm", 1, [model]),
        "eval": ("octavo.eval.evaluation.evaluate", 0, [model]),
        "plan": ("octavo.plan.plan.make_plan", 1, [model, "--gpu", "h100"]),
    }
    parameters = inspect.signature(next(v for v in VERBS if v.name == name).load()).parameters
    if name not in places:
        assert name == "diff" or not set(ENGINE_WORDS) & set(parameters) - {"dtype"}
        return
    taken: list[EngineConfig] = []
    place, index, words = places[name]

    def take(*arguments, **_):
        taken.append(getattr(arguments[index], "config", arguments[index]))
        raise Taken

    monkeypatch.setattr(place, take)
    monkeypatch.setattr("octavo.server.serving.serve", lambda _, load: load())
    (tmp_path / "in").write_text("hi")
    words = [word.format(**{"in": tmp_path / "in", "out": tmp_path / "out"}) for word in words]
    unlike = {"max_waiting_requests": 512} if name == "serve" else {}
    if name == "bench spec":
        drafts = {"method": "ngram"}
        unlike = {"max_num_seqs": 1, "max_model_len": 640, "speculative_config": drafts}
    fixed = {"speculative_config"} if name == "embed" else set()
    if name in ("bench", "eval", "plan"):
        fixed = {"max_model_len", "speculative_config"}
    if name == "plan":  # for another machine
        fixed |= {"device", "deterministic", "num_threads", "isa", "enforce_eager"}
    for field, value in ENGINE_WORDS.items():
        if field in fixed:
            assert field not in parameters
            continue
        option = "--" + field.replace("_", "-")
        with pytest.raises(Taken):
            main([*name.split(), *words, *as_words(option, value)])
        assert taken.pop() == EngineConfig(**{**unlike, field: value})


@pytest.mark.parametrize(
    "words", ["serve", "chat", "info", "plan", "diff", "bench", "bench spec", "eval"]
)
def test_a_model_is_named_with_m_and_without(words, capsys):
    given = ["--gpu", "h100"] if words == "plan" else []
    for way in (["nope"], ["-m", "nope"], ["--model", "nope"]):
        assert main([*words.split(), *given, *way]) == 2
        assert "'nope' is neither a directory" in capsys.readouterr().err
    assert main([*words.split(), "one", "-m", "two"]) == 2
    assert "the model is named twice, " in capsys.readouterr().err


def test_a_model_in_the_place_of_a_prompt(capsys):
    assert main(["generate", "smollm2-135m", "hi"]) == 2
    assert "name the model with -m MODEL" in capsys.readouterr().err
    assert main(["info", "one", "two"]) == 2
    assert "name the model with" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_options_of_sampling_reach_the_sampler(name, model, monkeypatch):
    defaults = {"temperature": 0.0} if name == "generate" else {"temperature": 0.6, "top_p": 0.9}
    defaults |= {"max_tokens": 1024, "seed": 1} if name == "chat" else {"seed": None}
    taken: list[SamplingParams] = []

    def take(llm, *arguments, **_):
        taken.extend(each for each in arguments if isinstance(each, SamplingParams))
        raise Taken

    monkeypatch.setattr("octavo.cli.generate._collect", take)
    monkeypatch.setattr("octavo.cli.chat.Conversation.__init__", take)
    monkeypatch.setattr("secrets.randbelow", lambda below: 1)
    words = [name, *(["hi"] if name == "generate" else []), "-m", model, "--load-format", "dummy"]
    for field, (option, value) in SAMPLING_WORDS.items():
        with pytest.raises(Taken):
            main([*words, *as_words(option, value)])
        expected = {**defaults, field: value}
        if name == "generate" and field == "temperature":
            expected["seed"] = 1  # words are drawn now
        assert taken.pop() == SamplingParams(**expected)
