"""From config.json to a ModelSpec: what is read, and what is refused by name."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_helpers import DELETED, tiny_config

from octavo.errors import ModelNotFoundError, UnsupportedModelError
from octavo.models.fields import describe
from octavo.models.layer import weight_shapes
from octavo.models.llama import FAMILY, read_spec
from octavo.models.rope import default_rope, linear_rope, llama3_rope
from octavo.models.spec import ModelSpec, RopeSpec
from octavo.weights.model_files import read_model

LLAMA3 = {
    **{"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


def write(directory: Path, config: Any, generation: Any = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_every_field_lands_in_the_spec() -> None:
    config = tiny_config(
        attention_bias=True, mlp_bias=True, rms_norm_eps=3e-6, rope_theta=7e4, hidden_act="gelu"
    )
    spec = read_spec(config)
    layer = spec.layers[1]
    assert (spec.vocab_size, spec.hidden_size, len(spec.layers)) == (37, 24, 2)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (6, 2, 8)
    assert (layer.intermediate_size, layer.activation, layer.gated) == (20, "gelu", True)
    assert (layer.qkv_bias, layer.o_bias, layer.mlp_bias) == (True, True, True)
    assert layer.norm.kind == "rms"
    assert layer.norm.eps == spec.final_norm.eps == 3e-6
    assert layer.rope == default_rope(7e4, 8)
    assert spec.max_position_embeddings == 128
    assert not spec.tie_word_embeddings


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("vocab_size", 4194304),
        ("hidden_size", 262144),
        ("intermediate_size", 1048576),
        ("num_hidden_layers", 1024),
        ("num_attention_heads", 4096),
        ("head_dim", 1024),
        ("max_position_embeddings", 16777216),
    ],
)
def test_the_largest_sizes(field: str, limit: int) -> None:
    read_spec(tiny_config(**{field: limit}))
    with pytest.raises(UnsupportedModelError, match=f"{field} is {limit + 2}"):
        read_spec(tiny_config(**{field: limit + 2}))


def test_fields_that_need_not_be_given() -> None:
    config = tiny_config(tie_word_embeddings=DELETED, hidden_act=DELETED, rope_theta=DELETED)
    assert read_spec(config) == read_spec(tiny_config())


def test_llama_3_2_1b_has_its_published_size() -> None:
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    config = tiny_config(**sizes, **heads, num_hidden_layers=16, tie_word_embeddings=True)
    spec = read_spec(config)
    assert sum(math.prod(shape) for shape in weight_shapes(spec).values()) == 1_235_814_400
    assert 2 * spec.kv_elements(1) == 32 * 1024


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "expected"),
    [(DELETED, 2, (4, 2)), (16, DELETED, (16, 6)), (16, 1, (16, 1)), (16, 6, (16, 6))],
)
def test_heads_given_or_implied(head_dim: Any, kv_heads: Any, expected: tuple[int, int]) -> None:
    layer = read_spec(tiny_config(head_dim=head_dim, num_key_value_heads=kv_heads)).layers[0]
    assert (layer.head_dim, layer.num_kv_heads) == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_map_names_exactly_what_the_spec_needs(bias: bool, tied: bool) -> None:
    spec = read_spec(tiny_config(attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied))
    sources = FAMILY.tensors.weight_map(spec)
    names = {ours: source.tensor for ours, source in sources.items()}
    assert {ours: source.shape for ours, source in sources.items()} == weight_shapes(spec)
    assert len(set(names.values())) == len(names)
    assert names["layers.1.down.weight"] == "model.layers.1.mlp.down_proj.weight"
    assert ("layers.0.o.bias" in names) == bias
    assert ("lm_head.weight" in names) == (not tied)


ROPE_CASES: list[tuple[dict[str, Any], RopeSpec]] = [
    ({"rope_theta": 5e4}, default_rope(5e4, 8)),
    ({"rope_theta": 5e4, "rope_scaling": None}, default_rope(5e4, 8)),
    ({"rope_theta": DELETED}, default_rope(10000.0, 8)),
    (
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2}},
        linear_rope(5e4, 8, 2.0),
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        llama3_rope(5e5, 8, 32.0, 1.0, 4.0, 8192),
    ),
    # Both spellings of the kind, as transformers 4.43 and later write it.
    (
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}},
        linear_rope(10000.0, 8, 4.0),
    ),
    ({"rope_theta": DELETED, "rope_parameters": {"rope_theta": 7e4}}, default_rope(7e4, 8)),
    (
        {
            "rope_theta": DELETED,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        },
        llama3_rope(5e5, 8, 32.0, 1.0, 4.0, 8192),
    ),
    # Precedence, as in transformers: the inner theta; rope_scaling before rope_parameters.
    ({"rope_theta": 1e3, "rope_parameters": {"rope_theta": 7e4}}, default_rope(7e4, 8)),
    (
        {
            "rope_theta": 1e3,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        },
        linear_rope(1e3, 8, 2.0),
    ),
    # The original length: at top level, inside, or the model's own.
    (
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        },
        llama3_rope(10000.0, 8, 32.0, 1.0, 4.0, 64),
    ),
    (
        {
            "rope_scaling": {
                name: value
                for name, value in {"rope_type": "llama3", **LLAMA3}.items()
                if name != "original_max_position_embeddings"
            }
        },
        llama3_rope(10000.0, 8, 32.0, 1.0, 4.0, 128),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), ROPE_CASES)
def test_rope_in_every_spelling(fields: dict[str, Any], expected: RopeSpec) -> None:
    assert read_spec(tiny_config(**fields)).layers[0].rope == expected


# (changed fields, the name and the value that the message must show, what it offers instead)
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"hidden_act": "xielu"}, "hidden_act", "'xielu'", "silu"),
    ({"hidden_act": 3}, "hidden_act", "3", "silu"),
    ({"hidden_act": ["silu"]}, "hidden_act", "['silu']", "silu"),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "type", "'ntk'", "llama3"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor", "None", "4 numbers"),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.0, True, 1.0]}},
        *("short_factor", "True", "4 numbers"),
    ),
    ({"rope_scaling": {"type": "yarn", "factor": -1}}, "factor", "-1", "above 0"),
    ({"rope_scaling": {"type": "dynamic", "factor": 1e300}}, "factor", "1e+300", "above 0 to"),
    ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn"}}, "rope_theta", "1.0", "above 1"),
    ({"rope_parameters": {"rope_type": "su"}}, "rope_type", "'su'", "default"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type", "['yarn']", "default"),
    ({"rope_scaling": "linear"}, "rope_scaling", "'linear'", "object"),
    ({"rope_scaling": {"type": "linear"}}, "factor", "missing", "above 0"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor", "0", "above 0"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor", "'2'", "number"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor", "1000", "finite"),
    (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
        *("high_freq_factor", "0.5", "low_freq_factor"),
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        *("full_attention", "rope_type", "plain numbers"),
    ),
    ({"rope_parameters": {"mrope_section": [8, 8]}}, "mrope_section", "[8, 8]", "plain numbers"),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        *("partial_rotary_factor", "0.5", "1"),
    ),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor", "0.25", "1"),
    ({"rope_theta": -1.0}, "rope_theta", "-1.0", "above 0"),
    ({"rope_theta": float("nan")}, "rope_theta", "nan", "finite"),
    ({"compression_config": {}}, "compression_config", "{}", "unquantized"),
    ({"sliding_window": 4096}, "sliding_window", "4096", "null"),
    ({"pretraining_tp": 2}, "pretraining_tp", "2", "1"),
    ({"pretraining_tp": True}, "pretraining_tp", "True", "1"),
    ({"layer_types": ["sliding_attention"]}, "layer_types", "sliding", "full_attention"),
    ({"num_local_experts": 8}, "num_local_experts", "8", "null"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping", "30.0", "null"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder", "True", "false"),
    ({"vocab_size": DELETED}, "vocab_size", "missing", "an integer from 1"),
    ({"hidden_size": 0}, "hidden_size", "0", "an integer from 1"),
    ({"hidden_size": "24"}, "hidden_size", "'24'", "an integer"),
    ({"hidden_size": 24.0}, "hidden_size", "24.0", "an integer"),
    ({"num_attention_heads": 0}, "num_attention_heads", "0", "from 1"),
    ({"num_attention_heads": True}, "num_attention_heads", "True", "an integer"),
    ({"num_attention_heads": -6}, "num_attention_heads", "-6", "from 1"),
    ({"num_key_value_heads": 4}, "num_key_value_heads", "4", "divisor"),
    ({"num_key_value_heads": 0}, "num_key_value_heads", "0", "from 1"),
    ({"head_dim": DELETED, "hidden_size": 25}, "hidden_size", "25", "multiple"),
    ({"head_dim": 7}, "head_dim", "7", "even"),
    ({"head_dim": DELETED, "hidden_size": 6}, "head_dim", "1", "even"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers", "1000000000", "to 1024"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "0", "from 1"),
    ({"intermediate_size": -3}, "intermediate_size", "-3", "from 1"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings", str(2**40), "to"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps", "-1e-05", "from 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps", "'1e-5'", "number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "'yes'", "true or false"),
    ({"attention_bias": 1}, "attention_bias", "1", "true or false"),
    ({"mlp_bias": None}, "mlp_bias", "None", "true or false"),
]


@pytest.mark.parametrize(("fields", "name", "value", "supported"), REFUSED)
def test_refused_by_name(fields: dict[str, Any], name: str, value: str, supported: str) -> None:
    config = tiny_config()
    config.update(fields)
    config = {key: entry for key, entry in config.items() if entry is not DELETED}
    with pytest.raises(UnsupportedModelError) as caught:
        read_spec(config)
    message = str(caught.value)
    assert message.startswith("config.json")
    for part in (name, value, supported):
        assert part in message


def test_a_rope_field_of_another_type_is_named_in_a_warning() -> None:
    scaling = {"type": "linear", "factor": 2.0, "finetuned": True}
    with pytest.warns(UserWarning, match="finetuned"):
        spec = read_spec(tiny_config(rope_scaling=scaling))
    assert spec.layers[0].rope == linear_rope(10000.0, 8, 2.0)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ("MambaForCausalLM", "LlamaForCausalLM")),
        ({"architectures": []}, ("architectures", "LlamaForCausalLM")),
        ({"architectures": "LlamaForCausalLM"}, ("architectures", "a list")),
        ({"architectures": [["LlamaForCausalLM"]]}, ("architectures", "LlamaForCausalLM")),
        ({"model_type": "mistral"}, ("model_type", "mistral", "llama")),
        ({"architectures": DELETED, "model_type": "gptj"}, ("model_type", "gptj", "llama")),
        ({"architectures": DELETED, "model_type": DELETED}, ("architectures", "missing")),
    ],
)
def test_other_architectures_are_refused(
    fields: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path, tiny_config(**fields))
    with pytest.raises(UnsupportedModelError) as caught:
        read_model(tmp_path)
    assert all(part in str(caught.value) for part in parts)


def test_the_model_type_alone_is_enough(tmp_path: Path) -> None:
    files = read_model(write(tmp_path, tiny_config(architectures=DELETED)))
    assert files.spec.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("ours", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (None, None, ()),
        (DELETED, None, (2,)),  # the default of transformers' LlamaConfig
        (2, {"eos_token_id": [3, 4, 3]}, (3, 4)),
        (2, {"eos_token_id": 7}, (7,)),
        ([2, 5], {"temperature": 0.6}, (2, 5)),
        (2, {"eos_token_id": None}, (2,)),
        (None, {"eos_token_id": [1]}, (1,)),
    ],
)
def test_end_of_text_ids(
    ours: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    config = tiny_config()
    config["eos_token_id"] = ours
    config = {name: value for name, value in config.items() if value is not DELETED}
    assert read_model(write(tmp_path, config, generation)).eos_token_ids == expected


def test_end_of_text_ids_outside_the_vocabulary_are_dropped_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="37"):
        files = read_model(write(tmp_path, tiny_config(eos_token_id=[3, 37, 9])))
    assert files.eos_token_ids == (3, 9)


@pytest.mark.parametrize("value", [-1, "2", 2.0, [2, "3"], True, {"a": 1}])
def test_end_of_text_ids_of_another_type_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="eos_token_id"):
        read_model(write(tmp_path, tiny_config(eos_token_id=value)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe{}", b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_malformed_json_is_named(content: bytes, name: str, tmp_path: Path) -> None:
    write(tmp_path, tiny_config())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=name):
        read_model(tmp_path)


def test_a_long_value_is_cut_in_messages() -> None:
    assert describe("x" * 78) == repr("x" * 78)
    assert describe("x" * 79) == "'" + "x" * 76 + "..."


def test_missing_directory_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere is not a directory"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        read_model(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = [*tiny_config(), "rope_scaling", "rope_parameters", "attention_bias", "layer_types"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_json_value_gives_a_spec_or_the_typed_error(fields: dict[str, Any]) -> None:
    config = {**tiny_config(), **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            spec = read_spec(config)
        except UnsupportedModelError as error:
            assert "config.json" in str(error)
        else:
            assert isinstance(spec, ModelSpec)
            assert all(min(shape) > 0 for shape in weight_shapes(spec).values())


def test_mutated_configurations_give_a_model_or_the_typed_error(tmp_path: Path) -> None:
    """1,000 files with a few bytes changed each."""
    generator = random.Random(41)
    original = json.dumps(tiny_config(rope_scaling={"rope_type": "llama3", **LLAMA3})).encode()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        content = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        (tmp_path / "config.json").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_model(tmp_path)
                outcomes["read"] += 1
            except UnsupportedModelError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50, outcomes
