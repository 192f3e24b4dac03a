"""Every family beside transformers: logits, taps, greedy tokens, and the promise about bits."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import run_to_end

from hf.family_models import (
    CASES,
    MAX_MODEL_LEN,
    logits_of,
    make_model,
    saved_model,
    tokens_of,
)
from octavo.config import EngineConfig, read_environment
from octavo.diff.comparison import DiffOptions
from octavo.diff.setup import DiffRequest, compare
from octavo.engine.engine import Engine
from octavo.model import load_model
from octavo.models.layer import tap_names
from octavo.models.registry import FAMILIES
from octavo.models.rope import for_length
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.reference.llama import ReferenceModel
from octavo.runtime.loader import load_runtime
from octavo.runtime.session import Session
from octavo.sampling_params import SamplingParams
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore:.*eos_token_id")]
TOLERANCE = 1e-3
PROMPT = 70  # tokens; most windows are shorter, some longer
every_case = pytest.mark.parametrize("case", CASES)


@cache
def files_of(case: str) -> ModelFiles:
    return read_model(saved_model(case)[1])


def reference(case: str, **options: Any) -> ReferenceModel:
    spec = for_length(files_of(case).spec, MAX_MODEL_LEN)
    weights = {name: x.to_float32() for name, x in open_checkpoint(files_of(case)).items()}
    return ReferenceModel(spec, weights, **options)


def session(case: str, **options: Any) -> Session:
    config = EngineConfig(
        **{"dtype": "f32", "max_model_len": MAX_MODEL_LEN, "num_kv_blocks": 16, **options},
        max_num_seqs=2,
        max_num_batched_tokens=128,
        num_threads=1,
    )
    files = files_of(case)
    return Session(load_runtime(files, open_checkpoint(files), config))


@every_case
def test_the_reference_gives_transformers_logits(case: str) -> None:
    tokens = tokens_of(PROMPT, 1)
    expected = logits_of(saved_model(case)[0], tokens)
    assert np.abs(expected).max() > 1, "logits that are all small would show little"
    found = reference(case).forward(tokens)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@every_case
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_octavo_diff_sees_no_difference(case: str, dtype: str) -> None:
    """Every tap, the logits at every position, greedy tokens: the native core against HF."""
    request = DiffRequest(
        model=str(saved_model(case)[1]),
        against="hf",
        dtype=dtype,
        random=PROMPT,
        num_threads=1,
        options=DiffOptions(steps=16, decode_rows=10, chunk_size=30),
    )
    result = compare(request, read_environment(), lambda *_: None)
    if dtype == "bf16" and any(layer.moe for layer in files_of(case).spec.layers):
        # Of logits that are near each other, rounding may choose other experts: the runs differ
        # from there on, and each op is right.
        assert not any(any(tap.broken) for tap in result.taps), result.findings
        return
    assert result.ok, (result.first_bad, result.findings)
    assert [tap.name for tap in result.taps] == tap_names(files_of(case).spec)
    assert not result.missing
    if dtype == "f32":
        assert result.greedy.parted_at is None
        assert result.logits.max_abs < TOLERANCE


LENGTHS = (5, 41, 90)
PARAMS = SamplingParams(temperature=2.5, top_k=50, seed=11, max_tokens=12, logprobs=2)


def make_engine(case: str, **changes: Any) -> Engine:
    options = {
        **{"dtype": "f32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 24, "num_threads": 1},
        **{"num_kv_blocks": 120, "max_num_batched_tokens": 256, **changes},
    }
    return load_model(saved_model(case)[1], **options).engine


def run(engine: Engine, others: int = 0, apart: bool = False, **params: Any) -> dict[str, Any]:
    """The answers to LENGTHS' prompts, among so many others."""
    outputs = {}
    for i in range(others):
        company = SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=3 + i % 9)
        engine.add_request(f"other{i}", tokens_of(1 + (i * i * 7) % 70, 50 + i).tolist(), company)
    for length in LENGTHS:
        engine.add_request(f"{length}", tokens_of(length, length).tolist(), PARAMS, **params)
        if apart:
            outputs.update(run_to_end(engine))
    outputs.update(run_to_end(engine))
    return {name: facts(outputs[name]) for name in map(str, LENGTHS)}


def facts(output: Any) -> Any:
    answer = output.outputs[0]
    return answer.token_ids, answer.logprobs, answer.cumulative_logprob


@cache
def alone(case: str) -> dict[str, Any]:
    return run(make_engine(case, enable_prefix_caching=False), apart=True)


@every_case
def test_neither_company_nor_chunks_change_a_bit(case: str) -> None:
    assert len(set(alone(case)["90"][0])) > 3, "an answer that repeats itself would show little"
    assert run(make_engine(case), others=17) == alone(case)
    for chunk in (1, 7, 64):
        assert run(make_engine(case, max_num_batched_tokens=chunk)) == alone(case), chunk


@every_case
def test_neither_preemption_nor_a_prefix_hit_changes_a_bit(case: str) -> None:
    engine = make_engine(case)
    run(engine)
    before = engine.stats().num_prefix_hits
    assert run(engine) == alone(case)
    assert engine.stats().num_prefix_hits > before
    engine = make_engine(case, max_num_seqs=1, num_kv_blocks=None)  # room for one sequence
    engine.add_request("90", tokens_of(90, 90).tolist(), PARAMS, priority=1)
    for _ in range(4):
        engine.step()
    urgent = SamplingParams(temperature=0.0, max_tokens=2)
    engine.add_request("urgent", tokens_of(150, 3).tolist(), urgent)
    outputs = run_to_end(engine)
    assert outputs["90"].metrics.num_preemptions == 1
    assert facts(outputs["90"]) == alone(case)["90"]


@every_case
@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.05), ("int4", 0.6)])
def test_quantized_it_stays_near(case: str, scheme: Any, most: float) -> None:
    """By the KL divergence of the next token's distribution, in nats, over all positions."""
    tokens = tokens_of(PROMPT, 1)
    exact = log_softmax(logits_of(saved_model(case)[0], tokens))
    step = session(case, quantize=scheme).step({0: tokens}, np.arange(PROMPT))
    found = log_softmax(step.logits)
    divergence = (np.exp(exact) * (exact - found)).sum(axis=-1)
    assert 0 < divergence.mean() < most


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    result: np.ndarray = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


@every_case
def test_octavo_quantize_writes_it(case: str, tmp_path: Path) -> None:
    """Norms too, which Gemma stores as their difference from 1."""
    _, path = saved_model(case)
    quantize_directory(path, tmp_path / "int8", Scheme("int8"))
    written = open_checkpoint(read_model(tmp_path / "int8"))
    expected = open_checkpoint(files_of(case))
    vectors = [name for name, info in expected.infos.items() if len(info.shape) == 1]
    assert vectors
    for name in vectors:
        left, right = (each[name].to_float32() for each in (written, expected))
        np.testing.assert_allclose(left, right, rtol=2e-7, atol=0, err_msg=name)


@needs_cuda
@every_case
def test_cuda_gives_transformers_logits(case: str) -> None:
    """A prompt in two chunks, then a token by itself."""
    tokens = tokens_of(61, 2)
    expected = logits_of(saved_model(case)[0], tokens)
    native = session(case, device=DEVICE)
    rows = [
        native.step({0: tokens[first:last]}, np.arange(last - first)).logits
        for first, last in ((0, 17), (17, 60), (60, 61))
    ]
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=TOLERANCE, rtol=0)


# A field that octavo reads from the configuration, given to it with another value.
WRONG: list[tuple[str, str, Any]] = [
    ("mistral, window", "sliding_window", 24),
    ("mistral, no window", "rms_norm_eps", 1e-2),
    ("ministral, windows in turn", "layer_types", ["full_attention"] * 3),
    ("qwen2, windows", "layer_types", ["full_attention"] + ["sliding_attention"] * 2),
    ("phi3, partial rotary", "partial_rotary_factor", 0.8),
    ("phi3, long factors, window", "original_max_position_embeddings", MAX_MODEL_LEN),
    ("smollm3, layers without rope", "no_rope_layers", [1, 1, 1, 1, 0]),
    ("smollm3, windows and biases", "hidden_act", "gelu"),
    ("starcoder2, window", "norm_epsilon", 1e-2),
    ("starcoder2, no biases", "hidden_act", "gelu"),
    ("gpt2, scores by layer", "scale_attn_by_inverse_layer_idx", False),
    ("gpt2, tied", "activation_function", "gelu"),
    ("qwen3, windows", "layer_types", ["full_attention"] + ["sliding_attention"] * 2),
    ("gemma2, windows", "final_logit_softcapping", 20.0),
    ("gemma2, windows", "attn_logit_softcapping", None),
    ("gemma2, no caps", "query_pre_attn_scalar", 100),
    ("gemma3_text, windows", "sliding_window", 16),
    ("granite, multipliers", "residual_multiplier", 0.5),
    ("granite, multipliers", "logits_scaling", 0.8),
    ("olmo2, norms after", "rms_norm_eps", 1e-2),
    ("mixtral, two of four experts", "num_experts_per_tok", 1),
    ("qwen3_moe, a layer without experts", "norm_topk_prob", True),
    ("qwen3_moe, every second layer", "norm_topk_prob", False),
    ("llama, yarn", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
]


@pytest.mark.parametrize(("case", "name", "value"), WRONG, ids=str)
def test_a_field_read_wrongly_is_seen(case: str, name: str, value: Any) -> None:
    files = files_of(case)
    config = json.loads((files.path / "config.json").read_text())
    if name == "layer_types" and case.startswith("qwen2"):
        value = value[::-1]
    if name == "partial_rotary_factor":
        del config["rope_parameters"]
    if name == "rope_scaling":
        config[name] = value
    assert config.get(name) != value or name == "rope_scaling"
    spec = for_length(files.family.read_spec({**config, name: value}), MAX_MODEL_LEN)
    tokens = tokens_of(PROMPT, 1)
    found = ReferenceModel(spec, reference(case).weights).forward(tokens)
    difference = np.abs(found - logits_of(saved_model(case)[0], tokens)).max()
    assert difference > TOLERANCE


# What no configuration leaves out.
NEEDED = {
    **{"vocab_size": 61, "hidden_size": 64, "intermediate_size": 52, "num_hidden_layers": 7},
    **{"num_attention_heads": 32},
}


@pytest.mark.parametrize("model_type", sorted({case.partition(",")[0] for case in CASES}))
def test_missing_fields_take_the_defaults_of_transformers(model_type: str) -> None:
    family = next(each for each in FAMILIES.values() if each.model_type == model_type)
    needed = {} if model_type == "gpt2" else NEEDED
    full = transformers.AutoConfig.for_model(model_type, **needed).to_dict()
    assert family.read_spec(needed) == family.read_spec(full)


@pytest.mark.parametrize("full", [{"rope_theta": 3e5}, {"rope_type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 8.0}, {"factor": 4.0}])
def test_gemma_3_with_both_spellings_of_its_rope(full: Any, scaling: Any) -> None:
    local = {"rope_type": "default", "rope_theta": 7e3}
    parameters = {"full_attention": full, "sliding_attention": local}
    fields = {**NEEDED, "rope_parameters": parameters, "rope_theta": 5e5, "rope_scaling": scaling}
    theirs = transformers.AutoConfig.for_model("gemma3_text", **deepcopy(fields)).to_dict()
    read = FAMILIES["Gemma3ForCausalLM"].read_spec
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a factor is no field of the default type
        assert read(fields) == read(theirs)


@pytest.mark.parametrize("case", ["llama, dynamic", "gpt2, tied"])
def test_the_bare_model_loads_with_a_tied_head(case: str, tmp_path: Path) -> None:
    """Its tensors lack the prefix that the model with a head gives them."""
    model = make_model(case)
    model.base_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0] in ("LlamaModel", "GPT2Model")
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    files = read_model(tmp_path)
    weights = {name: tensor.to_float32() for name, tensor in open_checkpoint(files).items()}
    hidden = model.base_model(torch.from_numpy(tokens_of(30, 5).astype(np.int64))[None])[0][0]
    table = model.get_input_embeddings().weight
    expected = (hidden @ table.T).detach().numpy()
    found = ReferenceModel(files.spec, weights).forward(tokens_of(30, 5))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["phi3, short factors", "gpt2, tied", "starcoder2, no biases"])
def test_random_weights_reach_transformers_in_its_layout(case: str) -> None:
    """octavo's dummy weights, fused and transposed again for transformers' model."""
    path = str(saved_model(case)[1])
    options = DiffOptions(steps=2)
    request = DiffRequest(path, "hf", load_format="dummy", random=20, options=options)
    result = compare(request, read_environment(), lambda *_: None)
    assert result.ok and not result.missing
