"""lm-eval's tasks give the same results on octavo, in memory and as a server, as on transformers.

The tasks are made of a small local file: choices (loglikelihood), whole texts
(loglikelihood_rolling) and answers (generate_until). Log-likelihoods agree to 1e-3.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference_helpers import SMOLLM2_MISSING, smollm2_path
from server_helpers import listening

from octavo.llm import LLM

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: make test-hf installs it")

pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING),
    pytest.mark.filterwarnings("ignore"),
]

QUESTIONS = [
    ("The capital of France is", [" Paris", " Berlin", " a kind of bread"], 0),
    ("Two and two make", [" five", " four", " a pair of shoes", " 4"], 1),
    ("Water freezes at", [" zero degrees Celsius", " a hundred degrees"], 0),
    ("The opposite of hot is", [" warm", " cold", " tomato"], 1),
    ("Once upon a time there was a little", [" girl", " integral"], 0),
    ("Ein Haus hat ein Dach und vier", [" Wände", " Fenster", " dogs 🐕"], 0),
]


def tasks(folder: Path) -> list[dict[str, Any]]:
    path = folder / "questions.jsonl"
    records = [{"text": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    choices = {
        **data,
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    texts = {
        **data,
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text * 4}}",  # up to 48 tokens: two windows
        "metric_list": [{"metric": "word_perplexity"}],
    }
    answers = {
        **data,
        "task": "answers",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [choices, texts, answers]


def results(model: Any, folder: Path, names: set[str], **arguments: Any) -> dict[str, Any]:
    """Task -> the model's own responses, in the order of the documents; and the metrics."""
    asked = [task for task in tasks(folder) if task["task"] in names]
    found = lm_eval.simple_evaluate(model, tasks=asked, bootstrap_iters=0, **arguments)
    responses = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return {"responses": responses, "metrics": found["results"]}


def flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in flat(item)]
    return [value]


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, responses in found["responses"].items():
        ours, theirs = flat(responses), flat(expected["responses"][name])
        assert len(ours) == len(theirs) > 5
        for a, b in zip(ours, theirs, strict=True):
            assert a == b if isinstance(b, (str, bool)) else abs(a - b) < 1e-3, name
    assert found["metrics"].keys() == found["responses"].keys()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = smollm2_path()
    arguments = {"pretrained": str(path), "dtype": "float32", "max_length": 30}
    # torch's log_softmax in float32 loses the small terms of 49,152: 1.4e-5 too high for each
    # token, always (measured with AVX2), which adds up over a text.
    arguments["softmax_dtype"] = "float64"
    folder = tmp_path_factory.mktemp("hf")
    names = {"choices", "texts", "answers"}
    return results("hf", folder, names, model_args=arguments, device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(smollm2_path(), dtype="f32", max_model_len=32, device="cpu")


def test_in_memory(expected: dict[str, Any], llm: LLM, tmp_path: Path) -> None:
    from octavo.eval.lm_eval import OctavoLM

    found = results(OctavoLM(llm=llm), tmp_path, {"choices", "texts", "answers"})
    assert_close(found, expected)
    assert found["metrics"]["choices"]["acc,none"] > 0.5
    shifted = {"responses": {"choices": expected["responses"]["choices"][1:]}, "metrics": {}}
    with pytest.raises(AssertionError):
        assert_close(shifted, expected)


def test_against_the_server(expected: dict[str, Any], llm: LLM, tmp_path: Path) -> None:
    path = smollm2_path()
    with listening(llm, served_names=("smollm2",)) as url:
        arguments = {
            "model": "smollm2",
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(path),
            "max_length": 30,
            "num_concurrent": 2,
        }
        found = results("local-completions", tmp_path, {"choices"}, model_args=arguments)
    assert_close(found, expected)


def test_other_models_of_lm_eval_stay_known() -> None:
    """In a process of its own: whatever was imported first decides."""
    code = (
        "import octavo.eval.lm_eval; from lm_eval.api.registry import get_model;"
        "print(get_model('hf').__name__, get_model('octavo').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["HFLM", "OctavoLM"], done.stderr
