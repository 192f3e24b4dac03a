"""octavo generate, on a tiny model with random weights: what goes where, and that it is right."""

from __future__ import annotations

import io
import json
import sys

import pytest
from text_helpers import tiny_model

from octavo.cli import main
from octavo.cli.common import printable
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.search.params import BeamSearchParams
from octavo.weights import model_files

DUMMY = ["--load-format", "dummy"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "base", chat_template=None))


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model, load_format="dummy")


def test_chat_is_the_default_where_there_is_a_template(model, llm, capsys):
    params = SamplingParams(temperature=0.0, max_tokens=12)
    assert main(["generate", "Hello fox", "-m", model, *DUMMY, "-n", "12"]) == 0
    shown = capsys.readouterr()
    messages = [{"role": "user", "content": "Hello fox"}]
    assert shown.out == llm.chat(messages, params, progress=False)[0].text + "\n"
    assert "prompt tokens" in shown.err and "first token after" in shown.err
    assert "12 tokens at" in shown.err and "cut off (--max-tokens 12)" in shown.err

    assert main(["generate", "Hello fox", "-m", model, *DUMMY, "-n", "12", "--raw", "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out == llm.generate("Hello fox", params, progress=False)[0].text + "\n"
    assert shown.err == ""


def test_a_base_model_continues(base_model, capsys):
    assert main(["generate", "Hello fox", "-m", base_model, *DUMMY, "-n", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Hello fox"
    assert main(["generate", "hi", "-m", base_model, *DUMMY, "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_configuration_is_read_once(model, capsys, monkeypatch):
    read = []
    keep = model_files.read_json_object
    monkeypatch.setattr(
        model_files, "read_json_object", lambda path: read.append(path.name) or keep(path)
    )
    assert main(["generate", "hi", "-m", model, *DUMMY, "-n", "1"]) == 0
    assert read.count("config.json") == 1


def test_beams(model, llm, capsys, monkeypatch):
    arguments = ["generate", "Once", "-m", model, *DUMMY, "-n", "6", "--raw", "--beams", "3"]
    expected = llm.beam_search("Once", BeamSearchParams(3, 6, 0.5), progress=False)[0]
    assert main([*arguments, "--length-penalty", "0.5"]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert main([*arguments, "--length-penalty", "0.5", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["text"] for answer in answers] == [answer.text for answer in expected.outputs]
    monkeypatch.setattr("octavo.cli.common.load_llm", None)  # refused before it is called
    for wrong in (["-t", "0.7"], ["--answers", "2"], ["--regex", "a*"], ["--stop", "x"]):
        assert main([*arguments, *wrong]) == 2
        assert "does not go with --beams" in capsys.readouterr().err, wrong


def test_json_has_it_all(model, llm, capsys):
    arguments = ["generate", "Once", "-m", model, *DUMMY, "-n", "6", "--raw", "--json"]
    assert main([*arguments, "--logprobs", "3", "--ignore-eos"]) == 0
    record = json.loads(capsys.readouterr().out)
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
    output = llm.generate("Once", params, progress=False)[0]
    assert record["text"] == output.text
    assert tuple(record["token_ids"]) == output.outputs[0].token_ids
    assert tuple(record["prompt_token_ids"]) == output.prompt_token_ids
    assert record["finish_reason"] == "length"
    assert record["usage"] == {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": 6,
        "total_tokens": len(output.prompt_token_ids) + 6,
    }
    assert record["timings"]["total_seconds"] >= record["timings"]["time_to_first_token_seconds"]
    assert [entry["token_id"] for entry in record["logprobs"]] == record["token_ids"]
    assert all(len(entry["top"]) == 3 for entry in record["logprobs"])
    total = sum(entry["logprob"] for entry in record["logprobs"])
    assert record["cumulative_logprob"] == pytest.approx(total, abs=1e-5)


def test_prompt_from_stdin(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße \xff".encode("latin-1"))))
    assert main(["generate", "-", "-m", model, *DUMMY, "-n", "3", "--raw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Gr\ufffd\ufffde \ufffd"


def test_system_message(model, capsys):
    arguments = ["generate", "hi", "-m", model, *DUMMY, "-n", "2", "--json"]
    assert main([*arguments, "--system", "Be terse."]) == 0
    prompt = json.loads(capsys.readouterr().out)["prompt"]
    assert "<|im_start|>system\nBe terse.<|im_end|>" in prompt


def test_seeds_repeat_and_differ(model, capsys):
    def text(*more: str) -> dict:
        assert main(["generate", "hi", "-m", model, *DUMMY, "-n", "20", "-t", "1.5", *more]) == 0
        return json.loads(capsys.readouterr().out)

    first = text("--json", "--seed", "7")
    assert first == {**text("--json", "--seed", "7"), "timings": first["timings"]}
    assert first["text"] != text("--json", "--seed", "8")["text"]
    seeds = set()
    for more in ([], ["--seed", "-1"], ["--seed", "-1"]):
        drawn = text("--json", *more)  # a seed is drawn, and told, so that it can be had again
        assert drawn["text"] == text("--json", "--seed", str(drawn["seed"]))["text"]
        seeds.add(drawn["seed"])
    assert len(seeds) == 3


def test_several_answers(model, capsys):
    arguments = ["generate", "hi", "-m", model, *DUMMY, "-n", "8", "-t", "1", "--answers", "3"]
    assert main([*arguments, "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("--- answer") == 3
    assert main([*arguments, "--seed", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    texts = [answer["text"] for answer in record["answers"]]
    assert len(texts) == 3 and len(set(texts)) > 1 and record["text"] == texts[0]


def test_stop_string(model, llm, capsys):
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    whole = llm.generate("ship", params, progress=False)[0].text
    stop = whole[4:6]
    arguments = ["generate", "ship", "-m", model, *DUMMY, "-n", "30", "--raw", "--ignore-eos", "-q"]
    assert main([*arguments, "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"
    assert main([*arguments, "--stop", stop, "--include-stop"]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + stop + "\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_prompt_before_its_continuation(model, base_model, monkeypatch):
    """One text, unless it is a chat."""
    shown = {}
    for name in (model, base_model):
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert main(["generate", "Hello fox", "-m", name, *DUMMY, "-n", "4"]) == 0
        shown[name] = sys.stdout.getvalue()
    assert "Hello fox" not in shown[model] and "Hello fox" in shown[base_model]


def test_control_characters_are_shown_and_not_sent_to_a_terminal():
    text = "a\x1b[2Jb\tc\nd\x07\x9b"
    assert printable(text, io.StringIO()) == text
    assert printable(text, Terminal()) == "a\u241b[2Jb\tc\nd\u2407\ufffd"


def test_event_log(model, tmp_path, capsys):
    log = tmp_path / "events.jsonl"
    arguments = ["generate", "hi", "-m", model, *DUMMY, "-n", "4", "--event-log", str(log)]
    assert main(arguments) == 0
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert events[:2] == ["log", "arrived"] and events[-1] == "finished"
