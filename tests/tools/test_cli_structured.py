"""octavo generate with a schema, an expression, choices, a grammar, an amateur: text and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from text_helpers import tiny_model

from octavo.cli import main
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.search.contrastive import ContrastiveParams

SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "size": {"enum": ["s", "m"]}},
    "required": ["sure", "size"],
    "additionalProperties": False,
}
LARK = 'start: NAME ("," NAME)~2\nNAME: /[a-c]{2}/\n'
GBNF = 'root ::= ("ab" | "cd"){2} "."\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def generate(model: str, *more: str) -> int:
    return main(["generate", "Hello", "-m", model, "--load-format", "dummy", "-q", *more])


def test_the_text_is_what_was_asked_for(model, tmp_path, capsys):
    files = {}
    for name, content in (("schema", json.dumps(SCHEMA)), ("lark", LARK), ("gbnf", GBNF)):
        files[name] = tmp_path / name
        files[name].write_text(content, encoding="utf-8")

    def text(*more: str) -> str:
        assert generate(model, "-n", "80", "-t", "1.5", "--seed", "4", *more) == 0
        return capsys.readouterr().out.removesuffix("\n")

    jsonschema.validate(json.loads(text("--json-schema", str(files["schema"]))), SCHEMA)
    assert re.fullmatch(r"[0-9]{3}-x{2,4}", text("--regex", r"[0-9]{3}-x{2,4}"))
    assert text("--choice", "yes", "--choice", "perhaps not") in ("yes", "perhaps not")
    assert re.fullmatch(r"[a-c]{2}(,[a-c]{2}){2}", text("--grammar", str(files["lark"])))
    assert re.fullmatch(r"(ab|cd){2}\.", text("--grammar", str(files["gbnf"])))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--regex", "a", "--choice", "b"], "--regex and --choice do not go together"),
        (["--regex", "(a"], "regex"),
        (["--json-schema", "no-such-file"], "no-such-file"),
        (["--json-schema", "SCHEMA"], "the JSON schema cannot be followed at its root"),
        (["--grammar", "SCHEMA"], "grammar"),
        (["-n", "0", "--json"], "max_tokens is 0; expected 1 or more, or prompt_logprobs"),
        (["--prompt-logprobs", "2"], "--prompt-logprobs is shown with --json only; add --json"),
        (["--amateur", "SELF", "--beams", "2"], "--beams is 2, which does not go with --amateur"),
        (["--amateur", "SELF", "-t", "1"], "temperature is 1.0, which does not go with --amateur"),
        (["--amateur", "SELF", "--alpha", "2"], "alpha is 2.0; expected"),
        (["--alpha", "0.2"], "--alpha is 0.2, which does nothing here; expected it with --amateur"),
        (["--length-penalty", "2"], "--length-penalty is 2.0, which does nothing here; expected"),
    ],
)
def test_mistakes(model, tmp_path: Path, capsys, more, message):
    broken = tmp_path / "broken"
    broken.write_text('{"type": "strange"}', encoding="utf-8")
    named = {"SCHEMA": str(broken), "SELF": model}
    assert generate(model, *(named.get(each, each) for each in more)) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


@pytest.mark.parametrize("count", [2, 0])
def test_prompt_log_probabilities(model, capsys, count):
    """One entry a token, the first None, with the rank among the whole vocabulary."""
    words = ["generate", "Hello", "-m", model, "--load-format", "dummy", "--raw", "--json"]
    assert main([*words, "-n", str(count), "--prompt-logprobs", "1"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert len(record["token_ids"]) == count and (record["text"] == "") == (count == 0)
    assert ("cut off" in err) == (count > 0)  # where no answer is asked for, none is cut off
    llm = LLM(model, load_format="dummy")
    params = SamplingParams(temperature=0, max_tokens=count, prompt_logprobs=1)
    (output,) = llm.generate("Hello", params, progress=False)
    assert record["prompt_logprobs"][0] is None
    assert len(record["prompt_logprobs"]) == len(record["prompt_token_ids"]) > 2
    for shown, entry in zip(record["prompt_logprobs"][1:], output.prompt_logprobs[1:], strict=True):
        assert (shown["token_id"], shown["rank"]) == (entry.token_id, entry.rank)
        assert shown["logprob"] == pytest.approx(entry.logprob)
        assert [top["token_id"] for top in shown["top"]] == list(entry.top_token_ids)
        assert (shown["rank"] == 1) == (shown["top"][0]["token_id"] == shown["token_id"])


def test_contrastive_decoding(model, capsys):
    """Beside itself a model finds nothing more likely than it does: what counts is `alpha`."""
    found = {}
    llm = LLM(model, load_format="dummy")
    for alpha in ("0.1", "1"):
        assert generate(model, "--raw", "-n", "6", "--amateur", model, "--alpha", alpha) == 0
        params = ContrastiveParams(6, float(alpha))
        (output,) = llm.contrastive_decoding("Hello", model, params, progress=False)
        found[alpha] = capsys.readouterr().out
        assert found[alpha] == output.text + "\n"
    (greedy,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=6), progress=False)
    assert found["1"] == greedy.text + "\n"
