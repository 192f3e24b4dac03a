"""`octavo embed`: where texts come from, what becomes of their vectors, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from embedding_helpers import write_embedding_model

from octavo import LLM
from octavo.cli import main

TEXTS = ["The capital of France is Paris.", "naïve café", '"quoted', "two\nlines"]
LINES = f'\ufeff{TEXTS[0]}\r\n{TEXTS[1]}\n"quoted\n"two\\nlines"'
LOADING = ["--dtype", "f32", "--num-threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding_model(tmp_path_factory.mktemp("embed") / "tiny", "mean", tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="f32", num_threads=1)


def expected(llm: LLM, **options: object) -> np.ndarray:
    outputs = llm.embed(TEXTS, progress=False, **options)  # type: ignore[arg-type]
    return np.stack([each.embedding for each in outputs])


def embed(folder: Path, *words: str) -> int:
    return main(["embed", *words, "-m", str(folder), *LOADING])


def read(text: str) -> tuple[list[dict[str, object]], np.ndarray]:
    records = [json.loads(line) for line in text.splitlines()]
    return records, np.array([each.pop("embedding") for each in records], np.float32)


def test_texts_of_arguments_a_file_and_standard_input(folder, llm, tmp_path, monkeypatch, capsys):
    file = tmp_path / "texts"
    file.write_bytes(LINES.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    for words in (TEXTS, ["-i", str(file)], []):
        assert embed(folder, *words) == 0
        shown = capsys.readouterr()
        records, vectors = read(shown.out)
        counts = [len(llm.encode_prompt(text).token_ids) for text in TEXTS]
        assert records == [
            {"index": index, "text": text, "tokens": counts[index]}
            for index, text in enumerate(TEXTS)
        ]
        np.testing.assert_array_equal(vectors, expected(llm))
        assert f"4 texts · {sum(counts)} tokens · 96 numbers each" in shown.err


def test_vectors_go_to_a_file_of_either_kind(folder, llm, tmp_path, capsys):
    options = {"dimensions": 17, "normalize": False}
    words = [*TEXTS, "--dimensions", "17", "--no-normalize", "-q", "-o"]
    assert embed(folder, *words, str(tmp_path / "a.npy")) == 0
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected(llm, **options))
    assert embed(folder, *words, str(tmp_path / "a.jsonl")) == 0
    records, vectors = read((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    assert [each["text"] for each in records] == TEXTS
    np.testing.assert_array_equal(vectors, found)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ("a\n\nb\n", [], "line 2 of standard input is empty"),
        ("a\n" + "b " * 300, [], "line 2 of standard input: the prompt is too long"),
        ("", [], "there is no text; expected some"),
        ("", ["a", " "], "text 2 is empty"),
        ("", ["a", "-i", "b"], "texts are given, and --input as well"),
        ("", ["a", "-o", "b.txt"], "expected a name that ends with .jsonl or .npy"),
        ("", ["a", "--dimensions", "97"], "dimensions is 97; expected 1 to 96"),
        ("", ["a", "--runner", "generate"], "gives no embeddings: name a model that does"),
    ],
)
def test_what_cannot_be_embedded(given, words, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert embed(folder, *words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in " ".join(shown.err.split())


def test_no_model_is_fetched_to_be_refused(monkeypatch, capsys):
    monkeypatch.setattr("octavo.weights.hub.resolve_model", None)
    assert main(["embed", "a"]) == 2
    assert "no embedding model is named; expected -m MODEL" in capsys.readouterr().err


def test_a_model_of_texts_is_taken_as_one_of_embeddings(tmp_path, capsys):
    folder = write_embedding_model(tmp_path / "plain", tokenizer=True, modules=False)
    assert embed(folder, "a") == 2
    message = "plain makes texts and gives no embeddings: name a model that does, or take this"
    assert message in capsys.readouterr().err
    assert embed(folder, "a", "--runner", "pooling") == 0
    _, vectors = read(capsys.readouterr().out)
    assert vectors.shape == (1, 96) and abs(np.linalg.norm(vectors) - 1) < 1e-6
