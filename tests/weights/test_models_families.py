"""Reading the configurations of families other than Llama: windows, ropes, refusals, summaries."""

from __future__ import annotations

import json
import random
import warnings
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights_helpers import (
    DELETED,
    check_fused_rows,
    random_weights,
    tiny_config,
    write_safetensors,
)

from octavo.errors import UnsupportedModelError
from octavo.models.registry import find_family
from octavo.models.rope import at_length, default_rope, for_length, linear_rope
from octavo.models.spec import ModelSpec
from octavo.models.summary import specials
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

TYPES = {
    **{"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"},
    **{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM"},
    **{"smollm3": "SmolLM3ForCausalLM", "starcoder2": "Starcoder2ForCausalLM"},
    **{"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"},
    **{"granite": "GraniteForCausalLM", "olmo2": "Olmo2ForCausalLM", "gpt2": "GPT2LMHeadModel"},
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    if model_type == "gpt2":
        changes = {"n_embd": 24, "n_head": 3, "n_layer": 4, "n_positions": 64, **changes}
    more = {"architectures": [TYPES[model_type]], "model_type": model_type, "num_hidden_layers": 4}
    return tiny_config(**{**more, **changes})


def spec_of(model_type: str, **changes: Any) -> ModelSpec:
    config = config_of(model_type, **changes)
    return find_family(config).read_spec(config)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_row_of_a_fused_tensor_is_a_weights(model_type: str) -> None:
    family, spec = find_family(config_of(model_type)), spec_of(model_type)
    check_fused_rows(family.tensors, spec)
    if family.gguf is not None:
        check_fused_rows(family.gguf.tensors, spec)


TURNS = ["sliding_attention", "full_attention"] * 2
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
WINDOWS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("mistral", {"sliding_window": 32}, [32, 32, 32, 32]),
    ("mistral", {"sliding_window": None}, [0, 0, 0, 0]),
    ("mistral", {}, [0, 0, 0, 0]),  # 4,096, and no sequence is longer than 128
    # A dynamic rope of factor 2 lets sequences be twice as long.
    ("mistral", {"sliding_window": 128, "rope_scaling": DYNAMIC}, [128, 128, 128, 128]),
    ("mistral", {"sliding_window": 256, "rope_scaling": DYNAMIC}, [0, 0, 0, 0]),
    ("ministral", {"sliding_window": 32, "layer_types": TURNS}, [32, 0, 32, 0]),
    ("ministral", {"sliding_window": 32}, [32, 32, 32, 32]),
    ("qwen2", {"sliding_window": 32}, [0, 0, 0, 0]),  # use_sliding_window is missing
    (
        "qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
        [0, 0, 0, 32],
    ),
    ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "layer_types": TURNS}, [9, 0] * 2),
    ("phi3", {"sliding_window": 47}, [47, 47, 47, 47]),
    (
        "smollm3",
        {"sliding_window": 8, "use_sliding_window": True, "no_rope_layer_interval": 2},
        [0, 8, 0, 8],
    ),
    ("starcoder2", {"sliding_window": 16}, [16, 16, 16, 16]),
    ("gemma2", {"sliding_window": 16}, [16, 0, 16, 0]),
    ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 3}, [16, 16, 0, 16]),
]


@pytest.mark.parametrize(("model_type", "fields", "windows"), WINDOWS)
def test_windows(model_type: str, fields: dict[str, Any], windows: list[int]) -> None:
    layers = spec_of(model_type, **fields).layers
    assert [layer.window for layer in layers] == windows


def test_layers_without_rope() -> None:
    for fields in ({}, {"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layer_interval": 4}):
        layers = spec_of("smollm3", **fields).layers
        assert [layer.rope is not None for layer in layers] == [True, True, True, False]


OLD = {"rope_theta": 5e5, "rope_local_base_freq": 7e3}
SCALED = {"rope_type": "linear", "factor": 8.0}
GEMMA3_ROPES: list[tuple[dict[str, Any], Any, Any]] = [
    ({"rope_theta": DELETED}, default_rope(1e6, 8), default_rope(1e4, 8)),
    (OLD, default_rope(5e5, 8), default_rope(7e3, 8)),
    ({**OLD, "rope_scaling": SCALED}, linear_rope(5e5, 8, 8.0), default_rope(7e3, 8)),
    (
        {
            **{"rope_theta": DELETED},
            "rope_parameters": {
                "full_attention": {**SCALED, "rope_theta": 5e5},
                "sliding_attention": {"rope_theta": 9e3},
            },
        },
        *(linear_rope(5e5, 8, 8.0), default_rope(9e3, 8)),
    ),
    (  # both spellings: field by field
        {
            **{"rope_theta": 4e5, "rope_scaling": SCALED},
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "factor": 2.0, "rope_theta": 3e5},
                "sliding_attention": {"rope_theta": 9e3},
            },
        },
        *(linear_rope(3e5, 8, 8.0), default_rope(9e3, 8)),
    ),
]


@pytest.mark.parametrize(("fields", "full", "local"), GEMMA3_ROPES)
def test_gemma_3_has_two_ropes(fields: dict[str, Any], full: Any, local: Any) -> None:
    layers = spec_of("gemma3_text", layer_types=TURNS, **fields).layers
    assert [layer.rope for layer in layers] == [local, full] * 2


def test_longrope_is_chosen_by_the_longest_sequence() -> None:
    rope = {"type": "longrope", "short_factor": [1.0, 2, 3, 4], "long_factor": [5.0, 6, 7, 8]}
    spec = spec_of("phi3", rope_scaling=rope, original_max_position_embeddings=64)
    plain = np.array(default_rope(10000.0, 8).frequencies)
    for length, factors in ((64, (1, 2, 3, 4)), (65, (5, 6, 7, 8)), (128, (5, 6, 7, 8))):
        turned = at_length(spec, length).layers[0].rope
        assert turned is not None and turned.kind == "longrope"
        np.testing.assert_allclose(turned.frequencies, plain / factors, rtol=1e-6)
        assert turned.attention_factor == (1 + np.log(2) / np.log(64)) ** 0.5
    both = for_length(spec, 65)
    assert both.rope_switch == 64 and both.layers[0].rope == spec.layers[0].rope
    assert for_length(spec, 64).rope_switch == 0
    for change in (for_length, at_length):
        assert change(spec_of("qwen2"), 10) == spec_of("qwen2")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("mistral", {"sliding_window": 32, "layer_types": TURNS}, "MinistralForCausalLM"),
    ("mistral", {"attention_bias": True}, "attention_bias is True"),
    ("ministral", {"sliding_window": 32, "layer_types": TURNS[:3]}, "a list of 4"),
    ("ministral", {"sliding_window": None, "layer_types": TURNS}, "'sliding_attention'"),
    ("ministral", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
    ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1"),
    ("qwen2", {"num_experts": 8}, "num_experts is 8"),
    ("qwen3", {"rope_scaling": {"mrope_section": [1, 1, 2]}}, "mrope_section"),
    ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor is 3"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias is True"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is None"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "a list of 4"),
    ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers is [1, 0, 2, 1]"),
    ("starcoder2", {"use_bias": 1}, "use_bias is 1"),
    ("starcoder2", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "each layer type"),
    ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
    ("granite", {"attention_multiplier": "0.5"}, "attention_multiplier is '0.5'"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("gpt2", {"n_head": 5}, "n_embd is 24"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    ("gpt2", {"n_inner": 0}, "n_inner is 0"),
]


@pytest.mark.parametrize(("model_type", "fields", "part"), REFUSED)
def test_refused_by_name(model_type: str, fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(model_type, **fields)
    assert str(caught.value).startswith("config.json") and part in str(caught.value)


UNKNOWN: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"shared_expert_intermediate_size": 64}, ("64: shared experts",), "LlamaForCausalLM"),
    (
        {
            "architectures": ["GemmaX"],
            "attn_logit_softcapping": 50.0,
            "ssm_cfg": {"a": 1},
        },
        ("state-space layers",),
        "Gemma2ForCausalLM",
    ),
    ({"num_local_experts": 8, "num_experts_per_tok": 2}, ("No field says",), "MixtralForCausalLM"),
    (
        {
            **{"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8, "norm_topk_prob": False},
            **{"shared_expert_intermediate_size": 64, "moe_intermediate_size": 16},
            **{"decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts_per_tok": 4},
        },
        ("lacks for it: shared_expert_intermediate_size (64: shared experts).",),
        "Qwen3MoeForCausalLM",
    ),
    ({"use_parallel_residual": True}, ("use_parallel_residual (True)",), "LlamaForCausalLM"),
    ({"architectures": ["Qwen9ForCausalLM"]}, ("No field says",), "Qwen2ForCausalLM"),
]


@pytest.mark.parametrize(("fields", "lacks", "nearest"), UNKNOWN)
def test_an_unknown_family_is_told_what_is_lacking(
    fields: dict[str, Any], lacks: tuple[str, ...], nearest: str
) -> None:
    config = tiny_config(**{"architectures": ["LlamaXForCausalLM"], **fields})
    with pytest.raises(UnsupportedModelError) as caught:
        find_family(config)
    message = str(caught.value)
    assert f"nearest family that octavo has is {nearest}" in message
    assert all(part in message for part in (*lacks, config["architectures"][0]))


SPECIALS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mistral", {"sliding_window": 32}, ["a window of 32 tokens in every layer"]),
    (
        "ministral",
        {"sliding_window": 32, "layer_types": TURNS},
        ["a window of 32 tokens in 2"],
    ),
    ("qwen2", {}, []),
    ("qwen3", {}, ["queries and keys normalized (each head by itself) in every layer"]),
    ("smollm3", {}, ["no rope in 1 of 4 layers"]),
    ("starcoder2", {}, ["LayerNorm in every layer", "no gate in the MLP in every layer"]),
    ("gpt2", {}, ["LayerNorm", "no gate in the MLP", "learned positions"]),
    (
        "gemma2",
        {"sliding_window": 16},
        [
            *("a window of 16 tokens in 2 of 4 layers", "norms after the sublayers"),
            *(
                "scores multiplied by 0.0625",
                "scores capped at 50",
                "embedding multiplied by",
            ),
            "logits capped at 30",
        ],
    ),
    ("gemma3_text", {"layer_types": TURNS, **OLD}, ["ropes of theta 7000 and 500000"]),
    (
        "granite",
        {"residual_multiplier": 0.22, "logits_scaling": 8.0},
        ["sublayers' outputs multiplied by 0.22", "logits multiplied by 0.125"],
    ),
    ("olmo2", {}, ["no norm before the sublayers", "(all heads together)"]),
]


@pytest.mark.parametrize(("model_type", "fields", "phrases"), SPECIALS)
def test_what_is_special(model_type: str, fields: dict[str, Any], phrases: list[str]) -> None:
    found = specials(spec_of(model_type, **fields))
    assert bool(found) == bool(phrases)
    for phrase in phrases:
        assert any(phrase in each for each in found), (phrase, found)


def test_a_checkpoint_without_a_head_lacks_the_prefix(tmp_path: Path) -> None:
    """As transformers saves the bare model; the head is tied then."""
    config = tiny_config(architectures=["LlamaModel"], tie_word_embeddings=True)
    weights = random_weights(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = {name.removeprefix("model."): ("F32", x) for name, x in weights.items()}
    assert "embed_tokens.weight" in stored
    write_safetensors(tmp_path / "model.safetensors", stored)
    checkpoint = open_checkpoint(read_model(tmp_path))
    name = "layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(
        checkpoint["layers.1.down.weight"].to_float32(), weights[f"model.{name}"]
    )


ODD_VALUES = (
    *(None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 10**400, 0.0, 1.5, -2.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "x", "gelu", [], [0], [1.0, 2.0], ["full_attention"], {}),
    *({"a": 1}, {"rope_type": "yarn"}, {"rope_type": "longrope", "short_factor": [0.0] * 4}),
)
ROPES = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
    DYNAMIC,
)


@pytest.mark.parametrize("model_type", TYPES)
def test_mutated_configurations(model_type: str) -> None:
    """Other values and types, in the configuration and in its rope: a spec or an error."""
    generator = random.Random(model_type)
    cases = [fields for kind, fields, _ in (*WINDOWS, *REFUSED) if kind == model_type]
    names = [*config_of(model_type), *chain(*cases), "rope_parameters", "layer_types"]
    outcomes = {"read": 0, "refused": 0}
    for index in range(400):
        config = config_of(model_type, rope_scaling=dict(ROPES[index % 3]))
        if any(kind == model_type for kind, _, _ in WINDOWS):
            config["sliding_window"] = 16
        for _ in range(generator.choice((1, 1, 2, 4))):
            rope = config.get("rope_scaling")
            inside = isinstance(rope, dict) and generator.random() < 0.4
            target = rope if inside and rope else config
            name = generator.choice(list(target) if target is not config else names)
            target[name] = deepcopy(generator.choice(ODD_VALUES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                spec = find_family(config).read_spec(config)
            except UnsupportedModelError as error:
                assert str(error).startswith("config.json")
                outcomes["refused"] += 1
                continue
        outcomes["read"] += 1
        assert specials(for_length(spec, 100)) == specials(spec)
        for layer in spec.layers:
            turns = layer.rope.frequencies if layer.rope else ()
            assert all(0 <= turn < np.inf for turn in turns), config
    assert outcomes["read"] > 20 and outcomes["refused"] > 100
