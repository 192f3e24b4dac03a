"""Loading: options resolved, the cache sized, and what does not fit refused with advice."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import run_to_end
from weights_helpers import random_weights, tiny_config, write_model

from octavo.config import EngineConfig, Environment, RuntimeOptions
from octavo.errors import InsufficientMemoryError, InvalidArgumentError, TokenizerError
from octavo.llm import LLM
from octavo.models import llama
from octavo.models.spec import ModelSpec
from octavo.quantization.plan import weight_bytes
from octavo.reference.llama import ReferenceModel
from octavo.runtime import loader
from octavo.runtime.loader import LoadedRuntime, load_runtime, resolve_options
from octavo.runtime.remedies import Needs, plan_kv_blocks
from octavo.sampling_params import SamplingParams
from octavo.weights.checkpoint import NonFiniteWeightsWarning, open_checkpoint
from octavo.weights.model_files import read_model

ENVIRONMENT = Environment(home=Path("/nowhere"), num_threads=1, isa="auto")
SPEC = llama.read_spec(tiny_config())


def load(path: Path, progress: Any = None, **options: Any) -> LoadedRuntime:
    options = {"max_model_len": 64, "max_num_seqs": 4, **options}
    config = EngineConfig(**options)
    files = read_model(path)
    checkpoint = open_checkpoint(files, config.load_format, config.seed)
    return load_runtime(files, checkpoint, config, progress, ENVIRONMENT)


def plan(available: int, **given: Any) -> int:
    """For 3 sequences of 100 tokens, in blocks of 16 that take 1,000 bytes."""
    options = RuntimeOptions("f32", "f32", 16, 100, 3, 64)
    room = available + weight_bytes(SPEC, {}, "f32")
    return plan_kv_blocks(Needs(SPEC, EngineConfig(**given), options, {}, room, 1000), available)


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        ("bf16", {}, ("bf16", "bf16")),
        ("f16", {}, ("f32", "f32")),
        ("f32", {}, ("f32", "f32")),
        ("f32", {"dtype": "bf16"}, ("bf16", "bf16")),
        ("bf16", {"dtype": "f32", "kv_dtype": "bf16"}, ("f32", "bf16")),
        ("bf16", {"kv_dtype": "f32"}, ("bf16", "f32")),
    ],
)
def test_dtypes(stored: Any, given: Any, expected: tuple[str, str]) -> None:
    options = resolve_options(SPEC, stored, EngineConfig(**given), ENVIRONMENT)
    assert (options.dtype, options.kv_dtype) == expected
    assert options.max_model_len == SPEC.max_position_embeddings


def test_environment_fills_in_what_the_options_leave_open() -> None:
    environment = Environment(home=Path("/nowhere"), num_threads=3, isa="scalar")
    options = resolve_options(SPEC, "f32", EngineConfig(), environment)
    assert (options.num_threads, options.isa) == (3, "scalar")
    given = EngineConfig(num_threads=2, isa="avx2")
    options = resolve_options(SPEC, "f32", given, environment)
    assert (options.num_threads, options.isa) == (2, "avx2")


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="max_model_len is 129; expected at most 128"):
        resolve_options(SPEC, "f32", EngineConfig(max_model_len=129), ENVIRONMENT)


def test_cache_size() -> None:
    assert plan(40_000) == 20  # half of it; three sequences are 21 blocks
    assert plan(10**9) == 21
    assert plan(40_000, kv_memory_fraction=0.175) == 7
    assert plan(7000, num_kv_blocks=7) == 7
    assert plan(40_000, num_kv_blocks=30) == 30


@pytest.mark.parametrize(
    ("given", "available", "error", "message"),
    [
        ({}, 13_000, InsufficientMemoryError, r"6.8 KiB as f32; it may take 6.3 KiB "),
        ({}, 13_000, InsufficientMemoryError, "use max_model_len=96, or kv_memory_fraction=0.55"),
        ({}, 13_000, InsufficientMemoryError, "0.55, or kv_dtype='bf16', or kv_dtype='int8', or "),
        ({}, 100, InsufficientMemoryError, "may take 50 B .*: use dtype='bf16', or quantize="),
        ({"num_kv_blocks": 50}, 40_000, InsufficientMemoryError, "48.8 KiB.*use num_kv_blocks=39"),
        ({"num_kv_blocks": 6}, 40_000, InvalidArgumentError, "at least 7.*raise it, or lower"),
        ({"num_kv_blocks": 6}, 6_500, InvalidArgumentError, "holds 96 tokens.*: lower .* to 96"),
    ],
)
def test_a_cache_that_cannot_be(given: Any, available: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        plan(available, **given)


@pytest.mark.parametrize(("stored", "num_shards"), [("F32", 1), ("BF16", 3)])
def test_a_loaded_model_computes_what_the_reference_does(
    tmp_path: Path, stored: str, num_shards: int
) -> None:
    weights = write_model(tmp_path, dtype=stored, num_shards=num_shards)
    calls: list[tuple[int, int]] = []
    loaded = load(tmp_path, lambda done, total: calls.append((done, total)))
    assert loaded.device == "cpu"
    assert loaded.options.dtype == ("bf16" if stored == "BF16" else "f32")
    total = sum(array.size for array in weights.values()) * (2 if stored == "BF16" else 4)
    assert calls[-1] == (total, total) and len(calls) == len(weights)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})

    files = read_model(tmp_path)
    ours = {name: weights[theirs.tensor] for name, theirs in files.weight_map.items()}
    reference = ReferenceModel(
        files.spec, ours, dtype=loaded.options.dtype, kv_dtype=loaded.options.kv_dtype
    )
    prompt = [3, 30, 7, 7, 21]
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(reference.forward(np.array(expected, np.int32))[-1].argmax()))
    llm = LLM(tmp_path, max_model_len=64, num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    output = llm.generate(prompt, params, progress=False)[0]
    assert list(output.outputs[0].token_ids) == expected[5:]
    assert llm.max_model_len == 64 and llm.tokenizer is None
    with pytest.raises(TokenizerError, match=r"has no tokenizer"):
        llm.generate("text", progress=False)


def test_eos_of_the_configuration_ends_an_answer(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(eos_token_id=list(range(1, 37))))
    llm = LLM(tmp_path, max_model_len=64, num_threads=1)
    output = llm.generate([3, 4], SamplingParams(seed=1, max_tokens=40), progress=False)[0]
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].token_ids[-1] != 0


def test_dummy_weights_need_a_configuration_only(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)

    def logprobs(seed: int) -> Any:
        llm = LLM(tmp_path, load_format="dummy", seed=seed, max_model_len=64, num_threads=1)
        return llm.generate([1, 2, 3], params, progress=False)[0].outputs[0].logprobs

    assert logprobs(1) == logprobs(1) != logprobs(2)


def test_nan_weights_are_warned_of_and_end_requests_with_an_error(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_model(tmp_path, weights=weights)
    with pytest.warns(NonFiniteWeightsWarning, match=r"layers\.1\.mlp\.up_proj"):
        llm = LLM(tmp_path, max_model_len=64, num_threads=1)
    output = llm.generate([1, 2, 3], SamplingParams(), progress=False)[0]
    assert output.outputs[0].finish_reason == "error"
    assert output.error is not None and "NaN or an infinity at token 3" in output.error
    assert llm.engine.blocks.num_free_blocks == llm.engine.blocks.num_blocks


def test_no_memory_for_weights_or_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    monkeypatch.setattr(loader, "available_memory", lambda **_: 1000)
    with pytest.raises(InsufficientMemoryError, match=r"take 42\.7 KiB as f32.*use a smaller"):
        load(tmp_path)
    with pytest.raises(InsufficientMemoryError, match="as bf16.*use a smaller model"):
        load(tmp_path, dtype="bf16")
    monkeypatch.setattr(loader, "available_memory", lambda **_: 40_000)
    with pytest.raises(InsufficientMemoryError, match="one sequence of max_model_len = 128 tokens"):
        load(tmp_path, max_model_len=128, dtype="bf16", kv_dtype="f32")
    assert load(tmp_path, dtype="bf16", max_num_seqs=1).num_kv_blocks == 4


@needs_cuda
def test_memory_for_steps_that_does_not_suffice(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(
        InsufficientMemoryError, match=r"max_num_seqs = 1000000000 .* MiB free"
    ) as e:
        load(tmp_path, device=DEVICE, max_num_seqs=10**9)
    (remedy,) = e.value.remedies
    assert load(tmp_path, device=DEVICE, **remedy).options.max_num_seqs == remedy["max_num_seqs"]


# What Linux calls the features of a processor that each instruction set needs.
ISA_FLAGS = {
    "avx2": "avx2 fma",
    "avx2_vnni": "avx2 fma avx_vnni",
    "avx512": "avx512f avx512bw avx512dq avx512vl",
    "avx512_vnni": "avx512f avx512bw avx512dq avx512vl avx512_vnni",
    "avx512_bf16": "avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16",
    "amx": "avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8",
}


def test_every_instruction_set_of_the_processor_is_found() -> None:
    from octavo import _native

    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("the processor's features are read from Linux on x86-64")
    flags = set(re.findall(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    for isa in set(_native.build_info()["isas"]) & ISA_FLAGS.keys():
        has_flags = flags >= set(ISA_FLAGS[isa].split())
        assert (isa in _native.available_isas()) == has_flags, isa


@pytest.mark.parametrize(
    ("largest", "remedy"),
    [
        ((64, 600), {"max_num_seqs": 64}),
        ((63, 600), {"max_num_seqs": 8}),
        ((8, 600), {"max_num_seqs": 8}),
        ((7, 600), {"max_num_seqs": 1}),
        ((100, 512), {"max_num_batched_tokens": 512}),
        ((100, 511), {"max_num_batched_tokens": 64}),
        ((100, 63), {"max_num_batched_tokens": 16}),
        ((1, 16), {"max_num_seqs": 1, "max_num_batched_tokens": 16}),
    ],
)
def test_less_memory_for_steps_is_advised_in_steps(
    largest: tuple[int, int],
    remedy: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The core has memory for steps up to a size alone."""
    from octavo import _native

    def runtime(device: str, spec: ModelSpec, options: Any, make: Any = _native.Runtime) -> Any:
        seqs, tokens = options.max_num_seqs, options.max_num_batched_tokens
        if seqs > largest[0] or tokens > largest[1]:
            raise MemoryError("none left")
        return make(device, spec, options)

    monkeypatch.setattr(_native, "Runtime", runtime)
    write_model(tmp_path)
    with pytest.raises(InsufficientMemoryError, match=r"max_num_seqs = 100 .*none left") as caught:
        load(tmp_path, max_num_seqs=100, max_num_batched_tokens=600)
    assert caught.value.remedies == [remedy]


def test_a_device_or_instruction_set_that_is_not_there(tmp_path: Path) -> None:
    write_model(tmp_path)
    from octavo import _native

    if "cuda" not in _native.available_devices():
        with pytest.raises(InvalidArgumentError, match="cuda"):
            load(tmp_path, device="cuda")
    missing = {"avx2", "avx512", "neon"} - set(_native.available_isas())
    for isa in missing:
        with pytest.raises(InvalidArgumentError, match=isa):
            load(tmp_path, isa=isa)


def test_preemption_with_the_smallest_cache_there_can_be(tmp_path: Path) -> None:
    """One sequence's worth of blocks, many sequences: they take turns and all end right."""
    write_model(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = [[i, 2 * i % 37, 5] * (1 + i % 5) for i in range(12)]
    wide = LLM(tmp_path, max_model_len=64, num_threads=1)
    tight = LLM(tmp_path, max_model_len=64, num_threads=1, num_kv_blocks=4)
    expected = wide.generate(prompts, params, progress=False)
    outputs = tight.generate(prompts, params, progress=False)
    assert [o.outputs for o in outputs] == [o.outputs for o in expected]
    assert any(output.metrics.num_preemptions for output in outputs)
    assert not run_to_end(tight.engine)
