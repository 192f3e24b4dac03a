"""Which models give embeddings, and how: sentence-transformers' files, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from embedding_helpers import write_embedding_model, write_modules
from gguf_families_helpers import write as write_family_gguf
from text_helpers import sentencepiece_directory
from weights_helpers import write_gguf

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.cli.info import describe
from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.pooling import Pooling
from octavo.models.registry import FAMILIES
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.text.tokenizer import Tokenizer
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.convert import convert_gguf
from octavo.weights.huggingface import _is_small_file
from octavo.weights.model_files import read_model
from octavo.weights.pooling import find_pooling, open_headless, pooling_notes, without_head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_embedding_model(tmp_path / "model")


def change(path: Path, **changes: Any) -> None:
    """Fields of a JSON object; None leaves one out."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found = {**found, **changes}
    path.write_text(json.dumps({name: each for name, each in found.items() if each is not None}))


@pytest.mark.parametrize("kind", ["last", "mean", "first"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("newer", [True, False])
def test_the_modules_of_sentence_transformers(
    folder: Path, kind: Any, normalize: bool, newer: bool
) -> None:
    write_modules(folder, kind, normalize, newer=newer)
    assert find_pooling(read_model(folder)) == Pooling(96, kind, normalize)
    assert find_pooling(read_model(folder), "generate") is None
    change(folder / "sentence_bert_config.json", max_seq_length=100, do_lower_case=False)
    assert find_pooling(read_model(folder)) == Pooling(96, kind, normalize, 100)


def test_a_pooling_without_a_kind_is_a_mean(folder: Path) -> None:
    """As in sentence-transformers."""
    path = folder / "1_Pooling" / "config.json"
    path.write_text("{}")
    assert find_pooling(read_model(folder)) == Pooling(96, "mean")


def test_which_models_give_embeddings(tmp_path: Path) -> None:
    plain = read_model(write_embedding_model(tmp_path / "plain", modules=False))
    assert find_pooling(plain) is None
    assert find_pooling(plain, "pooling") == Pooling(96)  # the last token's, normalized
    bare = read_model(write_embedding_model(tmp_path / "bare", modules=False, headless=True))
    assert find_pooling(bare) == Pooling(96)
    assert find_pooling(bare, "generate") is None
    with pytest.raises(WeightsError, match=r"lm_head.weight is missing"):
        open_checkpoint(bare)
    assert "lm_head.weight" not in open_checkpoint(without_head(bare))


def test_a_head_that_is_there_is_not_loaded(folder: Path) -> None:
    files = read_model(folder)
    assert "lm_head.weight" in open_checkpoint(files)
    assert "lm_head.weight" not in open_checkpoint(without_head(files))


def test_the_head_of_a_gguf_file_is_not_loaded(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    files = read_model(tmp_path / "model.gguf")
    assert "lm_head.weight" in open_checkpoint(files)
    assert "lm_head.weight" not in open_checkpoint(without_head(files))


def test_every_family_has_a_name_for_the_model_without_its_head() -> None:
    bare = {name: family for name, family in FAMILIES.items() if name != family.architecture}
    assert len(bare) == len({family.architecture for family in FAMILIES.values()})
    assert all(name.endswith("Model") for name in bare)
    assert bare["Qwen3Model"].architecture == "Qwen3ForCausalLM"


POOLING: list[tuple[dict[str, Any], str]] = [
    ({"pooling_mode_max_tokens": True}, "pooling_mode is .'max', 'lasttoken'.*supported: lasttok"),
    (
        {"pooling_mode_lasttoken": False, "pooling_mode_weightedmean_tokens": True},
        "pooling_mode is .'weightedmean'.",
    ),
    (
        {"pooling_mode_lasttoken": False, "pooling_mode_mean_sqrt_len_tokens": True},
        "mean_sqrt_len_tokens",
    ),
    ({"pooling_mode": "max"}, "pooling_mode is 'max'"),
    ({"pooling_mode": ["mean", "cls"]}, r"pooling_mode is \['mean', 'cls'\]"),
    ({"pooling_mode": 3}, "pooling_mode is 3"),
    ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt is False"),
    ({"word_embedding_dimension": 64}, "word_embedding_dimension is 64; supported: 96"),
]


@pytest.mark.parametrize(("changes", "message"), POOLING, ids=str)
def test_poolings_that_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder / "1_Pooling" / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        find_pooling(read_model(folder))


def module(name: str, path: str = "") -> dict[str, Any]:
    return {"type": f"sentence_transformers.models.{name}", "path": path}


MODULES: list[tuple[Any, str]] = [
    (
        [module("Transformer"), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")],
        "module 'Dense' is not computed by octavo; supported: Transformer, Pooling, Normalize",
    ),
    ([module("Transformer"), {"type": "custom_st.LatentAttention"}], "module 'LatentAttention'"),
    ([module("Transformer"), module("SpladePooling")], "'SpladePooling'"),
    ([module("Transformer")], "the modules are Transformer; supported"),
    ([module("Transformer"), module("Normalize"), module("Pooling")], "in this order"),
    ([module("Transformer", "0_Transformer"), module("Pooling", "1_Pooling")], "0_Transformer"),
    ([module("Transformer"), module("Pooling", "elsewhere")], "elsewhere/config.json cannot be"),
    ([], "the modules are none"),
    ({"a": 1}, "expected a list of objects"),
    ([3], "expected a list of objects"),
]


@pytest.mark.parametrize(("modules", "message"), MODULES, ids=str)
def test_modules_that_are_refused(folder: Path, modules: Any, message: str) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match=f"{message}.* runner='generate'"):
        find_pooling(read_model(folder))
    assert find_pooling(read_model(folder), "generate") is None
    (folder / "modules.json").write_text("[")
    with pytest.raises(UnsupportedModelError, match=r"modules\.json cannot be read"):
        find_pooling(read_model(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True.*causal att"),
        ({"is_causal": False}, "is_causal is False; supported: true: causal attention"),
    ],
)
@pytest.mark.parametrize("runner", ["auto", "generate", "pooling"])
def test_attention_in_both_directions_is_refused(
    folder: Path, changes: dict[str, Any], message: str, runner: Any
) -> None:
    change(folder / "config.json", use_bidirectional_attention=False, is_causal=True)
    assert find_pooling(read_model(folder)) is not None
    change(folder / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        LLM(folder, runner=runner)


def test_embeddinggemma_is_refused_for_its_attention(tmp_path: Path) -> None:
    folder = write_embedding_model(tmp_path / "model")
    change(
        folder / "config.json",
        architectures=["Gemma3TextModel"],
        model_type="gemma3_text",
        use_bidirectional_attention=True,
    )
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        read_model(folder)


def test_code_of_the_models_own_is_refused(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    with pytest.raises(UnsupportedModelError, match=r"auto_map.*modeling_qwen\.Qwen2Model"):
        find_pooling(read_model(folder))
    assert find_pooling(read_model(folder), "generate") is None
    change(folder / "config.json", auto_map={"AutoConfig": "configuration.Own"})
    assert find_pooling(read_model(folder)) == Pooling(96)


def test_texts_in_small_letters_are_refused(folder: Path) -> None:
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    with pytest.raises(UnsupportedModelError, match="do_lower_case is True"):
        find_pooling(read_model(folder))


def test_the_longest_text_is_that_of_the_authors(folder: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "num_kv_blocks": 40}
    assert LLM(folder, **options).max_model_len == 128
    change(folder / "sentence_bert_config.json", max_seq_length=100)
    assert LLM(folder, **options).max_model_len == 100
    assert LLM(folder, **options, max_model_len=120).max_model_len == 120
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    change(folder / "tokenizer_config.json", model_max_length=90)
    assert find_pooling(read_model(folder)) == Pooling(96, max_tokens=90)
    for no_limit in (10**30, 1e30, "x", True, 0):
        change(folder / "tokenizer_config.json", model_max_length=no_limit)
        assert find_pooling(read_model(folder)) == Pooling(96)
    change(folder / "sentence_bert_config.json", max_seq_length=1000)
    assert LLM(folder, **options).max_model_len == 128


def test_what_sentence_transformers_would_add_is_said(tmp_path: Path) -> None:
    folder = write_embedding_model(tmp_path / "model")
    sentencepiece_directory(folder)
    files = read_model(folder)
    assert pooling_notes(files, Tokenizer(folder)) == ()
    change(folder / "tokenizer_config.json", add_eos_token=True)
    change(folder / "config_sentence_transformers.json", default_prompt_name="query")
    prompt, end = pooling_notes(files, Tokenizer(folder))
    assert "default prompt 'query'" in prompt
    assert "add_eos_token" in end and "</s>" in end


@pytest.mark.parametrize("headless", [False, True])
def test_a_quantized_copy_keeps_the_modules(tmp_path: Path, headless: bool) -> None:
    folder = write_embedding_model(tmp_path / "model", "mean", headless=headless)
    quantize_directory(folder, tmp_path / "int8", Scheme("int8"))
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "num_kv_blocks": 40}
    llms = [LLM(tmp_path / "int8", **options), LLM(folder, **options)]
    assert [llm.pooling for llm in llms] == [Pooling(96, "mean")] * 2
    one, other = (llm.embed([5, 6, 7], progress=False)[0].embedding for llm in llms)
    assert 0.99 < one @ other < 1


def test_a_causal_model_without_a_head_is_one_of_embeddings(tmp_path: Path) -> None:
    """The architecture has a head, the weights have none: as sentence-transformers may save it."""
    folder = write_embedding_model(tmp_path / "model", headless=True)
    change(folder / "config.json", architectures=["LlamaForCausalLM"])
    assert "lm_head.weight" not in open_headless(read_model(folder))  # as `octavo pull` opens it
    quantize_directory(folder, tmp_path / "int8", Scheme("int8"))
    llm = LLM(tmp_path / "int8", device="cpu", num_threads=1, num_kv_blocks=40)
    assert llm.embed([5, 6, 7], progress=False)[0].embedding.shape == (96,)
    (folder / "modules.json").unlink()
    with pytest.raises(WeightsError, match=r"lm_head\.weight is missing"):
        open_headless(read_model(folder))


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_a_head_that_is_stored_beside_a_bare_model_makes_texts(
    tmp_path: Path, scheme: str | None
) -> None:
    folder = write_embedding_model(tmp_path / "model", modules=False)
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "num_kv_blocks": 40}
    params = SamplingParams(max_tokens=5)
    change(folder / "config.json", architectures=["LlamaModel"])
    if scheme is not None:
        folder, source = tmp_path / "quantized", folder
        quantize_directory(source, folder, Scheme(scheme))
    assert find_pooling(read_model(folder)) == Pooling(96)
    found = LLM(folder, **options, runner="generate").generate([5, 6], params, progress=False)
    change(folder / "config.json", architectures=["LlamaForCausalLM"])
    expected = LLM(folder, **options).generate([5, 6], params, progress=False)
    assert found[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


def test_what_makes_no_embedding_needs_a_head(tmp_path: Path) -> None:
    bare = read_model(write_embedding_model(tmp_path / "bare", headless=True))
    assert len(open_headless(bare)) == len(open_checkpoint(without_head(bare)))
    whole = read_model(write_embedding_model(tmp_path / "whole"))
    assert "lm_head.weight" in open_headless(whole)


def test_the_configurations_of_modules_are_fetched() -> None:
    assert _is_small_file("1_Pooling/config.json") and _is_small_file("modules.json")
    assert not _is_small_file("2_Dense/model.safetensors")
    assert not _is_small_file("onnx/config.json") and not _is_small_file("1_Pooling/a/config.json")


@pytest.mark.parametrize(
    ("number", "kind"), [(None, None), (0, None), (1, "mean"), (2, "first"), (3, "last")]
)
def test_the_metadata_of_a_gguf_file(tmp_path: Path, number: int | None, kind: Any) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata={"llama.pooling_type": number, "llama.attention.causal": True})
    found = find_pooling(read_model(path))
    assert found == (None if kind is None else Pooling(read_model(path).spec.hidden_size, kind))
    assert find_pooling(read_model(path), "pooling") is not None


@pytest.mark.parametrize(("number", "kind"), [(1, "mean"), (2, "first"), (3, "last")])
def test_what_is_made_of_a_gguf_file_gives_the_same_embeddings(
    tmp_path: Path, number: int, kind: Any
) -> None:
    """Pulled, and quantized."""
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata={"llama.pooling_type": number})
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    convert_gguf(path, pulled, "f32")
    quantize_directory(path, tmp_path / "int8", Scheme("int8"))
    options: dict[str, Any] = {"device": "cpu", "num_threads": 1, "num_kv_blocks": 40}
    llms = [LLM(each, **options) for each in (path, pulled, tmp_path / "int8")]
    assert {llm.pooling.kind for llm in llms if llm.pooling is not None} == {kind}
    first, second, third = (llm.embed([5, 6, 7], progress=False)[0].embedding for llm in llms)
    assert first.tobytes() == second.tobytes() and first @ third > 0.98


def test_gguf_files_that_are_refused(tmp_path: Path) -> None:
    write_family_gguf(tmp_path / "a.gguf", "qwen3", pooling_type=4)
    with pytest.raises(UnsupportedModelError, match=r"qwen3\.pooling_type is 4; supported: 1 \(m"):
        find_pooling(read_model(tmp_path / "a.gguf"))
    (tmp_path / "pulled").mkdir()
    with pytest.raises(UnsupportedModelError, match="pooling_type is 4"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "pulled")
    assert not any((tmp_path / "pulled").iterdir())
    write_family_gguf(tmp_path / "b.gguf", "qwen3", attention__causal=False)
    with pytest.raises(UnsupportedModelError, match=r"attention\.causal is False"):
        find_pooling(read_model(tmp_path / "b.gguf"))


def test_octavo_info_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Embeddings the state of the last token, 96 numbers, of length 1" in text
    bare = write_embedding_model(tmp_path / "bare", headless=True, modules=False)
    assert describe(read_model(bare))["embeddings"] == str(Pooling(96))
    plain = write_embedding_model(tmp_path / "plain", modules=False)
    assert describe(read_model(plain))["embeddings"] is None


@pytest.mark.parametrize("command", ["generate", "chat", "batch"])
def test_commands_that_make_texts_refuse_an_embedding_model(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Before its weights are read, unless they are told that it makes texts."""
    folder = write_embedding_model(tmp_path / "model", tokenizer=True)
    change(folder / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    (tmp_path / "in").write_text("a ship")
    files = [str(tmp_path / "in"), str(tmp_path / "out")]
    own = {"generate": ["a ship", "--raw"], "chat": [], "batch": [*files, "--raw"]}[command]
    words = [command, *own, "-m", str(folder), "--device", "cpu", "--max-tokens", "3"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a ship\n")))
    with monkeypatch.context() as patch:
        patch.setattr("octavo.llm.LLM.__init__", None)
        assert main(words) == 2
    said = capsys.readouterr().err
    assert "model gives embeddings and makes no texts" in said and "--runner generate" in said
    assert main([*words, "--runner", "generate"]) == 0
