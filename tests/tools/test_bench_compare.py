"""What benchmarks/run.py stands on: the GGUF it writes, the systems it asks, and their gates."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf_families_helpers import hugging_face
from text_helpers import tiny_model

from octavo.errors import UnsupportedModelError
from octavo.models.llama_gguf import GGUF
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf import GgufFile
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.model_files import read_folder, read_model
from octavo.weights.reader import unpermute_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = [
        "write_gguf",
        "write_model",
        "agreement",
        "systems",
        "octavo_system",
        "peers",
        "common",
    ]
    names += ["llama_quality"]

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load_module
    for name in names:
        sys.modules.pop(name, None)


# Of the families that the scripts write: what is unlike Llama in each.
WRITTEN = ("llama", "qwen2, tied", "qwen3", "qwen3-moe", "mixtral", "gemma3", "gemma3, no windows")


@pytest.mark.parametrize("case", WRITTEN)
def test_a_directory_and_its_gguf_hold_the_same_model(load, case: str, tmp_path: Path) -> None:
    config = hugging_face(case) | {"rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load("write_model").write_model(tmp_path, tmp_path / "model")
    files = read_model(tmp_path / "model")
    checkpoint = open_checkpoint(files)
    dummy = open_checkpoint(read_model(tmp_path), "dummy")
    path = tmp_path / "model.gguf"
    load("write_gguf").write_gguf(path, files, checkpoint, "f32")
    stored = open_checkpoint(read_folder(GgufFolder(path, "f32")))
    assert set(stored.infos) == set(checkpoint.infos) == set(dummy.infos)
    for name, tensor in checkpoint.items():
        values = tensor.to_float32()
        np.testing.assert_array_equal(stored[name].to_float32(), values, err_msg=name)
        assert values.std() > 0, name
        varied = 0.0 if values.ndim == 2 else 0.11  # norms around 1, biases around 0
        np.testing.assert_allclose(
            values, dummy[name].to_float32(), rtol=0, atol=varied, err_msg=name
        )


def test_a_model_that_its_gguf_would_not_describe_is_refused(load, tmp_path: Path) -> None:
    config = hugging_face("gemma3") | {"rope_scaling": None, "query_pre_attn_scalar": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files, write = read_model(tmp_path), load("write_gguf").write_gguf
    with pytest.raises(UnsupportedModelError, match="does not write as GGUF"):
        write(tmp_path / "model.gguf", files, open_checkpoint(files, "dummy"), "bf16")


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_every_format_of_the_gguf_is_near_the_model(load, kind: str, tmp_path: Path) -> None:
    files = read_model(tiny_model(tmp_path / "tiny"))
    checkpoint = open_checkpoint(files, "dummy")
    path = tmp_path / f"{kind}.gguf"
    load("write_gguf").write_gguf(path, files, checkpoint, kind)
    file = GgufFile(path)
    tolerance = {"f32": 0, "bf16": 0, "q8_0": 0.01, "q4_0": 0.15}[kind]
    for name, source in GGUF.tensors.weight_map(files.spec).items():
        found = file.decode(source.tensor).to_float32()
        if source.transform == "unpermute":
            found = unpermute_rows(found, source.head_dim)
        expected = checkpoint[name].to_float32()
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), name


# In llama.cpp's place: report the arguments they were given.
PRETEND_BENCH = """
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert a["-o"] == "json" and a["-t"] == "3" and a["-m"].endswith("m.gguf"), a
test = {"n_prompt": int(a["-p"]), "n_gen": int(a["-n"]), "model_n_params": 77}
test |= {"avg_ts": 1000.5 * int(a["-p"]) + int(a["-n"]), "build_commit": "c", "build_number": 5}
print(json.dumps([test]))
"""
PRETEND_BATCHED = """
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert a["--output-format"] == "jsonl" and a["-t"] == "3" and a["-c"] == "64", a
print("a line that is no JSON")
test = {"pp": int(a["-npp"]), "tg": int(a["-ntg"]), "pl": int(a["-npl"]), "speed": 12.5}
print(json.dumps(test))
"""


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_llama_cpp_is_asked_and_understood(load, tmp_path: Path) -> None:
    """Scripts in its place."""
    llama, systems = load("peers"), load("systems")
    bench = script(tmp_path / "llama-bench", PRETEND_BENCH)
    side = llama.LlamaBinaries(str(bench), str(tmp_path / "m.gguf"), 3)
    assert side.describe() == {"num_parameters": 77, "version": "build 5 (c)"}
    for name, sizes, speed in (("prefill", (2, 1), 2001.0), ("decode", (1, 7), 7.0)):
        row = systems.Row(name, *sizes)
        assert row.speed(side.run(row)) == pytest.approx(speed)
    served = systems.Row("requests", 8, 3, 4)
    with pytest.raises(FileNotFoundError, match="no llama-batched-bench beside"):
        side.run(served)
    script(tmp_path / "llama-batched-bench", PRETEND_BATCHED)
    assert served.speed(side.run(served)) == pytest.approx(12.5)
    answers = systems.Row("batch", 8, 3, 4)  # of 44 tokens 12 are of the answers
    assert answers.speed(side.run(answers)) == pytest.approx(12.5 * 12 / 44)
    assert side.memory()["host"] > 1 << 20
    script(bench, "import sys\nsys.exit('broken')\n")
    with pytest.raises(RuntimeError, match=r"llama-bench failed \(1\): broken"):
        side.run(systems.Row("decode", 1, 7))


def test_llama_cpp_has_to_measure_what_was_asked(load) -> None:
    llama = load("peers")
    with pytest.raises(ValueError, match="reported 2 tests"):
        llama.only_test([{}, {}])
    with pytest.raises(ValueError, match="measured pl 3; expected 4"):
        llama.only_test([{"pp": 2, "pl": 3}], pp=2, pl=4)


# Log-probabilities of an odd vocabulary, as llama-perplexity writes them; every row another scale.
PRETEND_PERPLEXITY = """
import struct, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
text, length = open(a["-f"]).read(), int(a["-c"])
assert a["-b"] == a["-c"] and a["--chunks"] == "1" and len(text) == 2 * length, a
out = b"_logits_" + struct.pack("<iii", length, 7, 1)
out += struct.pack(f"<{length}i", *(ord(letter) + 3 for letter in text[:length]))
for row in range(length - 1 - length // 2):
    out += struct.pack("<ff8H", 0.001 * (row + 1), -5.0, 0, 10, 20, 30, 40, 50, 60, 999)
open(a["--kl-divergence-base"], "wb").write(out)
"""


def test_llama_cpp_tells_what_it_computes(load, tmp_path: Path) -> None:
    llama, agreement = load("peers"), load("agreement")
    bench = script(tmp_path / "llama-bench", PRETEND_BENCH)
    side = llama.LlamaBinaries(str(bench), str(tmp_path / "m.gguf"), 3)
    assert side.logprobs(agreement.PROMPT) is None
    written = PRETEND_PERPLEXITY.replace("ord(letter) + 3", "ord(letter) + 2")
    script(tmp_path / "llama-perplexity", written)
    with pytest.raises(ValueError, match="llama-perplexity scored"):
        side.logprobs(agreement.PROMPT)
    script(tmp_path / "llama-perplexity", PRETEND_PERPLEXITY)
    rows = len(agreement.PROMPT) - len(agreement.LETTERS) // 2
    expected = {token: 0.001 * rows * 10 * token - 5 for token in range(7)}
    assert side.logprobs(agreement.PROMPT) == pytest.approx(expected, abs=1e-6)


def test_whoever_computes_another_model_is_named(load) -> None:
    agreement = load("agreement")
    truth = {token: -0.1 * token for token in range(40)}
    moved = {token: value + 0.02 * (token == 3) for token, value in truth.items()}
    assert agreement.error_of(truth, moved) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="shares 9 of the 20"):
        agreement.error_of(truth, {token: -0.1 for token in range(11, 40)})
    forms = {"octavo bf16": "bf16", "octavo f32": "f32", "vllm bf16": "bf16"}
    errors = {"octavo bf16": 0.02, "octavo f32": 1e-5, "vllm bf16": 0.03}
    assert agreement.check_agreement(errors, forms) == {}
    for name, error in (
        ("octavo bf16", 0.046),  # more than 1.5 times as far as vLLM
        ("octavo bf16", float("nan")),
        ("octavo f32", 0.002),
        ("vllm bf16", 0.26),
    ):
        assert list(agreement.check_agreement({**errors, name: error}, forms)) == [name]


def test_vllm_is_asked_and_its_end_is_told(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real worker, around a vllm that takes a tenth of a second a token."""
    systems = load("systems")
    (tmp_path / "vllm.py").write_text(
        "import time\n"
        "from types import SimpleNamespace as Made\n"
        "__version__ = '0.0'\n"
        "SamplingParams = lambda **options: Made(**options)\n"
        "class LLM:\n"
        "    def __init__(self, path, **options):\n"
        "        print('not an answer')\n"
        "        assert options['max_model_len'] == 27 and options['max_num_seqs'] == 3, options\n"
        "    def generate(self, prompts, params, use_tqdm):\n"
        "        time.sleep(0.1)\n"
        "        assert max(p['prompt_token_ids'][0] for p in prompts) < 500, 'out of range'\n"
        "        count = params.max_tokens - (params.max_tokens == 5)\n"
        "        return [Made(outputs=[Made(token_ids=[0] * count)]) for _ in prompts]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    served = systems.Row("requests", 8, 3, 3)
    settings = (tmp_path, 1, "dummy", [served])
    side = systems.Process("peers.Vllm", *settings, True, python=Path(sys.executable))
    try:
        assert side.describe() == {"version": "0.0"} and side.load_seconds < side.start_seconds
        assert side.run(served)["seconds"] >= 0.1
        assert side.run(systems.Row("prefill", 40, 1))["seconds"] >= 0.1
        with pytest.raises(RuntimeError, match="does not tell when each token comes"):
            side.run(systems.Row("latency", 8, 3))
        with pytest.raises(RuntimeError, match=r"answered \[4\] tokens; expected 5"):
            side.run(systems.Row("decode", 1, 5))
    finally:
        side.close()
    (tmp_path / "vllm.py").write_text("raise ImportError('no kernels')")
    with pytest.raises(RuntimeError, match=r"(?s)peers.Vllm ended \(1\): .*no kernels"):
        systems.Process("peers.Vllm", *settings, False)


def test_openvino_is_asked(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker, around an openvino_genai that takes a tenth of a second a token."""
    systems = load("systems")
    (tmp_path / "openvino.py").write_text("Tensor = lambda array: array\n")
    (tmp_path / "openvino_genai.py").write_text(
        "import time\n"
        "from types import SimpleNamespace as Made\n"
        "__version__ = '0.0'\n"
        "SchedulerConfig = Made\n"
        "Tokenizer = str\n"
        "class GenerationConfig(Made):\n"
        "    def set_eos_token_id(self, token): pass\n"
        "class ContinuousBatchingPipeline:\n"
        "    def __init__(self, path, tokenizer, scheduler, device, **options):\n"
        "        print('not an answer')\n"
        "        assert path.endswith('m-int8') and scheduler.max_num_seqs == 3, path\n"
        "        assert scheduler.max_num_batched_tokens == 4097, scheduler\n"
        "        assert not scheduler.enable_prefix_caching\n"
        "        assert scheduler.num_kv_blocks >= 4097 / 16\n"
        "        assert options['INFERENCE_NUM_THREADS'] == 1, options\n"
        "    def generate(self, inputs, configs):\n"
        "        time.sleep(0.1)\n"
        "        assert all(ids.shape[0] == 1 and ids.max() < 500 for ids in inputs)\n"
        "        assert all(config.ignore_eos for config in configs)\n"
        "        counts = [c.max_new_tokens - (c.max_new_tokens == 5) for c in configs]\n"
        "        return [Made(m_generation_ids=[[0] * count]) for count in counts]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    converted = tmp_path / "kept" / "m-int8"
    converted.mkdir(parents=True)
    (converted / "converted.json").write_text('{"num_parameters": 77}')
    asked = [systems.Row("requests", 8, 3, 3), systems.Row("prefill", 4096, 1)]
    settings = (tmp_path / "m", tmp_path / "kept", "int8", 1, "dummy", asked)
    side = systems.Process("peers.OpenVino", *settings)
    try:
        assert side.describe() == {"version": "0.0", "num_parameters": 77}
        assert all(side.run(row)["seconds"] >= 0.1 for row in asked)
        with pytest.raises(RuntimeError, match=r"answered \[4\] tokens; expected 5"):
            side.run(systems.Row("decode", 1, 5))
    finally:
        side.close()


def test_octavo_has_its_gate(load, tmp_path: Path) -> None:
    octavo, systems = load("octavo_system"), load("systems")
    asked = [
        systems.Row("decode", 1, 3),
        systems.Row("prefill", 24, 1),
        systems.Row("requests", 9, 4, 5),
    ]
    asked += [systems.Row("batch", 9, 4, 3), systems.Row("context", 30, 2)]
    latency, found = systems.Row("latency", 9, 4), {}
    for kind in ("bf16", "w8a8", "int4-g128"):
        rows = [*asked, latency]
        side = octavo.OctavoCore(tiny_model(tmp_path / kind), kind, 1, "dummy", rows)
        for row in rows:
            check = side.check(row)
            assert check["passed"] and check["logits"]
            found[kind, row.name] = check
            side.warm_up(row)
            assert row.speed(side.run(row)) > 0
            assert all(size > 0 for work in side.works(row) for size in work)
        times = side.run(latency)["times"]
        assert len(times) == 4 and times == sorted(times)
        assert side.memory()["host"] > side.describe()["weight_bytes"] > 0
    assert found["bf16", "requests"] != found["w8a8", "requests"]


def test_the_reference_is_a_system_and_a_judge(load, tmp_path: Path) -> None:
    octavo, systems = load("octavo_system"), load("systems")
    path = tiny_model(tmp_path / "tiny")
    judge = octavo.Reference(str(path), "dummy")
    row = systems.Row("latency", 5, 3)
    assert len(judge.run(row)["times"]) == 3 and judge.run(systems.Row("prefill", 5, 1))
    side = octavo.OctavoCore(path, "f32", 1, "dummy", [row])
    prompt = [11, 45, 23, 99]
    error = load("agreement").error_of(judge.logprobs(prompt), side.logprobs(prompt))
    assert error < 1e-4


def test_octavos_gate_sees_a_token_that_depends_on_company(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo, systems = load("octavo_system"), load("systems")
    row = systems.Row("requests", 9, 4, 5)
    side = octavo.OctavoCore(tiny_model(tmp_path / "tiny"), "bf16", 1, "dummy", [row])
    right = side._generate

    def wrong(prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
        found = right(prompts, count)
        return found if len(prompts) == 1 else [*found[:-1], (*found[-1][:-1], -1)]

    monkeypatch.setattr(side, "_generate", wrong)
    assert not side.check(row)["passed"]


def test_what_llama_perplexity_prints(load) -> None:
    quality = load("llama_quality")
    printed = """
Mean PPL(Q)                   :  13.679000 +/-   0.210000
Mean PPL(base)                :  13.604000 +/-   0.200000
Mean PPL(Q)/PPL(base)         :   1.005500 +/-   0.000900
Mean    KLD:   0.001400 +/-   0.000010
Maximum KLD:   0.500000
99.0%   KLD:   0.009000
Same top p: 97.250 +/- 0.100 %
"""
    found = quality.figures(printed)
    assert found == {
        "perplexity": 13.679,
        "perplexity_of_base": 13.604,
        "perplexity_ratio": 1.0055,
        "mean_kl": 0.0014,
        "kl_99": 0.009,
        "max_kl": 0.5,
        "same_first_choice_percent": 97.25,
    }
    with pytest.raises(ValueError, match="printed no mean_kl"):
        quality.figures(printed.replace("Mean    KLD", "KLD"))


def test_the_gguf_can_have_the_models_own_tokens(load, tmp_path: Path) -> None:
    writer = load("write_gguf")
    files = read_model(tiny_model(tmp_path / "tiny"))
    path = tmp_path / "own.gguf"
    writer.write_gguf(path, files, open_checkpoint(files, "dummy"), "bf16", "smollm")
    metadata = GgufFile(path).metadata
    vocabulary = json.loads((files.path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == files.spec.vocab_size
    assert all(tokens[number] == token for token, number in vocabulary["vocab"].items())
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(metadata["tokenizer.ggml.merges"]) == len(vocabulary["merges"])


def test_nobody_always_goes_first_and_ratios_are_of_pairs(load) -> None:
    common = load("common")
    assert common.in_turns("abc", 0) == common.in_turns("abc", 2) == ["a", "b", "c"]
    assert common.in_turns({"a": 1, "b": 2}, 1) == ["b", "a"]
    assert common.median_ratio([6.0, 8.0, 9.0], [3.0, 8.0, 1.0]) == 2.0
    assert common.slug("NVIDIA H200 (80GB)") == "nvidia-h200-80gb"


def test_what_a_row_counts(load) -> None:
    row = load("systems").Row
    assert [row("decode", 1, 7).tokens, row("prefill", 9, 1).tokens] == [7, 9]
    serve = row("requests", 30, 9, 3)
    assert (serve.tokens, serve.longest) == (117, 39)
    assert serve.short == row("requests", 16, 4, 3)
    assert [len(prompt) for prompt in serve.prompts()] == [30] * 3
    assert row("decode", 1, 7).prompts() == [[10]]


def test_what_was_asked_is_noted_without_this_machines_folders(load) -> None:
    arguments = argparse.Namespace(
        model="/home/somebody/models/tiny",
        llama_bench=Path("/opt/llama/llama-bench"),
        gguf=[Path("a/b.gguf"), "q8_0"],
        formats=["bf16", "int8"],
        rounds=3,
        vllm_python=None,
        output=Path("/tmp/result.json"),
    )
    assert load("common").asked(arguments) == {
        "model": "tiny",
        "llama_bench": "llama-bench",
        "gguf": ["b.gguf", "q8_0"],
        "formats": ["bf16", "int8"],
        "rounds": 3,
        "vllm_python": None,
    }
