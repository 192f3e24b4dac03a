"""octavo batch: formats, errors in the lines, and being killed and resumed."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time

import pytest
from batch_helpers import CHAT, COMPLETIONS, HELLO, openai, read, run, write
from parrot import GO, say, write_parrot
from text_helpers import sentencepiece_directory, tiny_model

from octavo.cli import main
from octavo.cli.batch import Tally
from octavo.cli.batch_input import BadLine, BatchLine, BatchRequest, Defaults, parse_line
from octavo.llm import LLM
from octavo.progress import duration
from octavo.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model, load_format="dummy")


def test_all_kinds_of_lines(model, llm, tmp_path, capsys):
    body = {"temperature": 0, "max_tokens": 7}
    source = write(
        tmp_path / "in.jsonl",
        [
            openai("chat", CHAT, messages=HELLO, model="any", **body),
            "",
            openai("text", COMPLETIONS, prompt="ship of", logprobs=2, **body),
            openai("ids", COMPLETIONS, prompt=[40, 50, 60], **body),
            json.dumps({"prompt": "plain object", "max_tokens": 3}),
            json.dumps({"messages": HELLO, "custom_id": "mine", "n": 2, "temperature": 1}),
            json.dumps("a JSON string\nof two lines"),
            "a plain text: ünïcode 🎉",
            '"quoted" at the beginning',
        ],
    )
    target = tmp_path / "out.jsonl"
    assert run(model, source, target, "--max-tokens", "5") == 0
    said = capsys.readouterr().err
    assert "8 prompts in" in said and "all 8 answered" in said
    records = read(target)
    assert list(records) != [] and set(records) == {
        *("chat", "text", "ids", "line-5", "mine", "line-7", "line-8", "line-9"),
    }
    assert all(record["error"] is None for record in records.values())
    params = SamplingParams(temperature=0.0, max_tokens=7)

    chat = records["chat"]["response"]["body"]
    assert records["chat"]["response"]["status_code"] == 200
    expected = llm.chat(HELLO, params, progress=False)[0]
    assert chat["object"] == "chat.completion" and chat["model"] == model
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert chat["usage"]["completion_tokens"] == 7

    text = records["text"]["response"]["body"]
    expected = llm.generate("ship of", params, progress=False)[0]
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == expected.text
    assert len(text["choices"][0]["logprobs"]["token_logprobs"]) == 7
    assert text["choices"][0]["logprobs"]["text_offset"][0] == 0
    ids = records["ids"]["response"]["body"]["choices"][0]
    assert ids["text"] == llm.generate([40, 50, 60], params, progress=False)[0].text
    # Bare prompts are answered, as octavo generate does with a model that has a chat template.
    short = llm.chat(
        [{"role": "user", "content": "plain object"}],
        SamplingParams(temperature=0.0, max_tokens=3),
        progress=False,
    )[0]
    assert records["line-5"]["response"]["body"]["choices"][0]["message"]["content"] == short.text
    assert len(records["mine"]["response"]["body"]["choices"]) == 2
    assert records["line-8"]["response"]["body"]["usage"]["completion_tokens"] == 5


BAD_LINES = {
    "no JSON": ('{"prompt": ', "no valid JSON"),
    "deep JSON": ('{"a":' * 100_000, "no valid JSON"),
    "neither": ('{"text": "x"}', "expected either 'prompt' or 'messages'"),
    "both": ('{"prompt": "x", "messages": []}', "expected either"),
    "id": ('{"prompt": "x", "custom_id": 7}', "custom_id is 7"),
    "no id": (json.dumps({"url": CHAT, "body": {}}), "custom_id is missing"),
    "method": (json.dumps({"custom_id": "m", "method": "GET", "body": {}}), "method is 'GET'"),
    "url": (openai("u", "/v1/embeddings", input="x"), "url is '/v1/embeddings'"),
    "body": ('{"custom_id": "b", "url": "/v1/completions", "body": 3}', "body is int"),
    "no prompt": (openai("p", COMPLETIONS, messages=HELLO), "no 'prompt'"),
    "empty messages": (openai("e", CHAT, messages=[]), "messages is empty"),
    "messages": (openai("s", CHAT, messages="hi"), "messages is str"),
    "role": (openai("r", CHAT, messages=[{"role": 3, "content": "x"}]), "messages[0].role: "),
    "prompt type": (openai("t", COMPLETIONS, prompt={"a": 1}), "expected a text or a list"),
    "prompts": (openai("l", COMPLETIONS, prompt=["a", "b"]), "one prompt a line"),
    "empty prompt": (openai("z", COMPLETIONS, prompt=""), 'prompt is ""'),
    "no ids": (openai("i", COMPLETIONS, prompt=[]), "expected a text or a list"),
    "token": (openai("k", COMPLETIONS, prompt=[5, 99_999]), "99999"),
    "long": (openai("w", COMPLETIONS, prompt="dog " * 400), "expected at most 255"),
    "temperature": (
        openai("n", COMPLETIONS, prompt="x", temperature=-1),
        "temperature: Input should be",
    ),
    "top_p": (openai("o", COMPLETIONS, prompt="x", top_p=1.5), "top_p: Input should be"),
    "type": (openai("y", COMPLETIONS, prompt="x", max_tokens="9"), "max_tokens: Input should be"),
    "bool": (openai("q", COMPLETIONS, prompt="x", max_tokens=True), "max_tokens: Input should be"),
    "stop": (openai("c", COMPLETIONS, prompt="x", stop=["a", 5]), "stop[1]: Input should be"),
    "stream": (openai("v", COMPLETIONS, prompt="x", stream=True), "stream is not offered"),
    "timeout": (openai("v2", COMPLETIONS, prompt="x", timeout=3), "timeout is not offered"),
    "penalty": (openai("g", COMPLETIONS, prompt="x", presence_penalty=5), "presence_penalty: "),
    "unknown": (openai("h", COMPLETIONS, prompt="x", frobnicate=1), "frobnicate is unknown: leave"),
    "slip": (openai("h2", COMPLETIONS, prompt="x", maxTokens=1), "perhaps max_tokens was meant"),
    "other name": (openai("h3", CHAT, messages=HELLO, n_predict=1), "its name here is max_tokens"),
    "grammar": (openai("h4", CHAT, messages=HELLO, grammar="x"), "grammar is not offered"),
    "tools": (openai("h5", CHAT, messages=HELLO, tools=[{"type": "function"}]), "tools is given"),
    "logprobs": (openai("j", CHAT, messages=HELLO, top_logprobs=2), "logprobs must be true"),
    "too many": (openai("d", COMPLETIONS, prompt="x", logprobs=99), "logprobs: Input should be"),
}


def test_options_of_a_bare_prompt_count_whatever_becomes_of_it(tmp_path):
    folder = sentencepiece_directory(tmp_path / "sp", chat_template="{{ messages[0].content }}")
    config = json.loads((tiny_model(tmp_path / "tiny") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    fields = [{}, {"add_special_tokens": False}, {"add_special_tokens": True}, {"echo": True}]
    fields += [{"tools": [{}]}, {"logprobs": 1, "add_special_tokens": True}, {"top_logprobs": 0}]
    lines = [json.dumps({"prompt": "The fox", "max_tokens": 1, **each}) for each in fields]
    lines.append(openai("echo", COMPLETIONS, prompt="The fox", max_tokens=1, echo=True))
    source = write(tmp_path / "in.jsonl", lines)
    counts = []
    for way in ("--raw", "--chat"):
        target = tmp_path / f"{way}.jsonl"
        assert run(str(folder), source, target, way) == 1
        found = read(target)
        for name in ("line-4", "line-5"):
            assert found[name]["error"] is not None
        counts.append(
            [
                found[name]["response"]["body"]["usage"]["prompt_tokens"]
                for name in ("line-1", "line-2", "line-3", "line-6", "line-7")
            ]
        )
    (raw, *_), (chat, *_) = counts
    assert raw == chat + 1  # with <s> before the text, or not
    assert counts == [[raw, chat, raw, raw, raw], [chat, chat, raw, raw, chat]]


def test_bad_lines_get_an_error_and_do_not_stop_the_rest(model, tmp_path, capsys):
    lines = [line for line, _ in BAD_LINES.values()]
    source = write(tmp_path / "in.jsonl", ["good one", *lines, "good two"])
    target = tmp_path / "out.jsonl"
    assert run(model, source, target, "--max-tokens", "3") == 1
    assert f"{len(lines)} of {len(lines) + 2} lines failed" in capsys.readouterr().err
    records = list(read(target).values())
    assert sum(record["error"] is None for record in records) == 2
    messages = [record["error"]["message"] for record in records if record["error"]]
    for name, (_, complaint) in BAD_LINES.items():
        assert any(complaint in message for message in messages), name
    assert all(record["response"] is None for record in records if record["error"])
    # Resumed, there is nothing to do, and the exit code still tells of the errors.
    before = target.read_bytes()
    assert run(model, source, target, "--max-tokens", "3") == 1
    assert target.read_bytes() == before


def test_options_that_ask_for_nothing_are_welcome():
    neutral = {
        **{"stream": False, "presence_penalty": 0.0, "logit_bias": {}, "tools": None},
        **{"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}},
    }
    line = BatchLine(1, "a", openai("a", CHAT, messages=HELLO, top_k=5, stop="x", **neutral))
    found = parse_line(line, Defaults())
    assert isinstance(found, BatchRequest)
    assert found.params == SamplingParams(temperature=1.0, top_k=5, stop="x", max_tokens=256)
    line = BatchLine(
        1, "a", openai("a", CHAT, messages=HELLO, max_completion_tokens=4, logprobs=True, n=2)
    )
    found = parse_line(line, Defaults(temperature=0.5))
    assert isinstance(found, BatchRequest)
    assert found.params == SamplingParams(temperature=0.5, max_tokens=4, logprobs=0, n=2)
    assert isinstance(parse_line(BatchLine(3, "line-3", "{"), Defaults()), BadLine)


def test_half_a_surrogate_pair_anywhere_stops_nothing(model, tmp_path):
    half = "\\ud83d"
    lines = [f'{{"prompt": "a", "custom_id": "{half}"}}', f'{{"prompt": "{half}"}}']
    lines += [f'{{"prompt": "b", "stop": "{half}"}}', f'{{"prompt": "c", "{half}": "{half}"}}']
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    arguments = (model, source, target, "--max-tokens", "3", "-t", "1")
    assert run(*arguments) == 1
    before = target.read_bytes()
    assert run(*arguments) == 1 and target.read_bytes() == before
    failed = {name for name, record in read(target).items() if record["error"]}
    assert failed == {"line-2", "line-4"}


def test_duplicate_ids_are_refused(model, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ["x", '{"prompt": "a", "custom_id": "line-1"}'])
    assert run(model, source, tmp_path / "out.jsonl") == 2
    assert "'line-1' is on line 1 and on line 2" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_torn_last_line_is_dropped_and_only_the_rest_is_answered(model, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [f"prompt {number}" for number in range(12)])
    target = tmp_path / "out.jsonl"
    options = ("-t", "1", "--max-tokens", "6")
    assert run(model, source, target, *options) == 0
    whole = read(target)
    lines = target.read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[4]) // 2, len(lines[4]) - 1):
        target.write_bytes(b"".join(lines[:4]) + lines[4][:cut])
        capsys.readouterr()
        assert run(model, source, target, *options) == 0
        assert "4 of 12 answered by an earlier run" in capsys.readouterr().err
        resumed = read(target)
        assert target.read_bytes().startswith(b"".join(lines[:4]))
        # The seeds depend on the ids alone: the texts are those of the run that was not stopped.
        texts = {k: r["response"]["body"]["choices"] for k, r in resumed.items()}
        assert texts == {k: r["response"]["body"]["choices"] for k, r in whole.items()}


def test_what_an_earlier_run_did_is_finished():
    assert Tally(total=10, skipped=3, failed=1, done=4).finished == 7


def test_killed_and_resumed(model, tmp_path):
    count = 40
    source = write(tmp_path / "in.jsonl", [f"prompt {number}" for number in range(count)])
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "octavo", "batch", str(source), str(target)]
    command += ["-m", model, "--load-format", "dummy", "--max-tokens", "60"]
    command += ["--max-num-seqs", "2"]
    kills = 0
    while kills < 2:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = target.stat().st_size if target.exists() else 0
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if target.exists() and target.stat().st_size > before + 2000:
                break
            time.sleep(0.005)
        if process.poll() is not None:
            break  # it was faster than we
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 0
    assert 0 < len(target.read_bytes().splitlines()) < count
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "answered by an earlier run" in done.stderr
    assert len(read(target)) == count


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_keeps_what_is_done(model, tmp_path, number):
    """Ctrl-C; and SIGUSR1, which also waits for the answers that are under way."""
    source = write(tmp_path / "in.jsonl", [f"prompt {number}" for number in range(100)])
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "octavo", "batch", str(source), str(target)]
    command += ["-m", model, "--load-format", "dummy", "--max-num-seqs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not target.exists() or not target.stat().st_size:
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command goes on" in said and "Traceback" not in said
    assert read(target) and len(read(target)) < 100
    if number == signal.SIGUSR1:
        assert len(read(target)) >= 4, "two prompts run, and two wait"


def test_foreign_output_is_refused(model, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ["a", "b"])
    target = tmp_path / "out.jsonl"
    cases = {
        "not an answer": "just text\n",
        "line 1, is not an answer": json.dumps({"custom_id": "x", "error": None, "response": {}})
        + "\n",
        "an older octavo wrote it": json.dumps(
            {"custom_id": "line-1", "error": None, "response": {"body": {"model": "other"}}}
        )
        + "\n",
    }
    cases["another batch"] = cases["an older octavo wrote it"].replace("line-1", "line-9")
    for complaint, content in cases.items():
        target.write_text(content)
        assert run(model, source, target) == 2
        assert complaint in capsys.readouterr().err
        assert target.read_text() == content
    assert run(model, source, target, "--overwrite", "--max-tokens", "2") == 0
    assert set(read(target)) == {"line-1", "line-2"}


def test_an_output_that_another_process_writes_is_refused(model, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ["a"])
    target = tmp_path / "out.jsonl"
    target.write_text("")
    with target.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(model, source, target, "--overwrite") == 2
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("missing input", ["no.jsonl", "out.jsonl"], "no.jsonl does not exist"),
        ("directory", [".", "out.jsonl"], "is a directory"),
        ("output directory", ["in.jsonl", "no/out.jsonl"], "cannot be written"),
        ("same file", ["in.jsonl", "in.jsonl"], "the output is the input"),
        ("empty", ["empty.jsonl", "out.jsonl"], "is empty"),
        ("max_tokens", ["in.jsonl", "out.jsonl", "--max-tokens", "0"], "max_tokens is 0"),
        ("temperature", ["in.jsonl", "out.jsonl", "-t", "-2"], "temperature is -2"),
        ("raw", ["in.jsonl", "out.jsonl", "--raw", "--system", "x"], "leave out --raw"),
        ("model", ["in.jsonl", "out.jsonl", "-m", "/no/such"], "/no/such"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, name, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "empty.jsonl").write_text("\n \n")
    assert main(["batch", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and complaint in shown and "Traceback" not in shown


def test_durations_read_well():
    assert duration(0.4) == "0 s"
    assert duration(59.4) == "59 s"
    assert duration(312) == "5 min 12 s"
    assert duration(7_500) == "2 h 05 min"


def test_the_event_log_of_a_batch(model, tmp_path, capsys):
    source = write(tmp_path / "in.txt", [f"Hello fox {i}" for i in range(9)])
    log = tmp_path / "events.jsonl"
    arguments = ["--max-tokens", "5", "--event-log", str(log), "--max-num-seqs", "4"]
    assert run(model, source, tmp_path / "out.jsonl", *arguments) == 0
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert events[0]["event"] == "log" and events[0]["max_num_seqs"] == 4
    assert sum(event["event"] == "finished" for event in events) == 9
    capsys.readouterr()
    assert main(["explain", "8", "--log", str(log)]) == 0
    assert "all places in a step (max_num_seqs) were taken" in capsys.readouterr().out


def test_tags_that_are_special_tokens_have_their_bytes(tmp_path):
    chain = say("<think>", "Hm.", "</think>", "Yes.")
    template = "{{ messages[0].content }}{# </think> #}" + GO
    tags = ["<think>", "</think>"]
    model = write_parrot(tmp_path / "parrot", chain, special=tags, template=template)
    body = {"temperature": 0, "max_tokens": 9, "logprobs": True}
    source = write(tmp_path / "in.jsonl", [openai("a", CHAT, messages=HELLO, **body)])
    assert run(str(model), source, tmp_path / "out.jsonl", "--load-format", "auto") == 0
    choice = read(tmp_path / "out.jsonl")["a"]["response"]["body"]["choices"][0]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", "Yes.")
    data = [byte for token in choice["logprobs"]["content"] for byte in token["bytes"]]
    assert bytes(data).decode() == "<think>Hm.</think>Yes."
