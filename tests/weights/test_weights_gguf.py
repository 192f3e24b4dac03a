"""GGUF files become Hugging Face directories; what cannot be converted exactly is refused.

The comparison with transformers' own loader is in tests/hf/test_gguf_hf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from weights_helpers import (
    convert,
    gguf_config,
    permute_rows,
    random_weights,
    tiny_vocabulary,
    write_gguf,
)

from octavo.errors import (
    InvalidArgumentError,
    UnsupportedModelError,
    WeightsError,
)
from octavo.models.llama import read_spec
from octavo.models.llama_gguf import GGUF, llama3_divisors
from octavo.models.rope import default_rope, linear_rope, llama3_rope
from octavo.models.spec import RopeSpec
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf import KINDS, GgufFile
from octavo.weights.model_files import read_model
from octavo.weights.reader import unpermute_rows
from octavo.weights.tensor import float32_to_bf16


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 8), (5, 64), (9, 6)])
@pytest.mark.parametrize("width", [(), (7,)])
def test_unpermuting_undoes_permuting(num_heads: int, head_dim: int, width: Any) -> None:
    values = np.random.default_rng(1).standard_normal((num_heads * head_dim, *width))
    permuted = permute_rows(values, num_heads)
    assert (head_dim == 2) == np.array_equal(permuted, values)
    np.testing.assert_array_equal(unpermute_rows(permuted, head_dim), values)
    if num_heads > 1 and head_dim > 2:  # the planted error: k undone with the query heads' number
        assert not np.array_equal(unpermute_rows(permuted, num_heads * head_dim), values)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_plain_weights_come_back_exactly(tied: bool, bias: bool, tmp_path: Path) -> None:
    config = gguf_config(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    config["num_key_value_heads"] = 1
    stored = random_weights(config, seed=9)
    files = read_model(convert(tmp_path, config=config, weights=stored))
    assert files.spec.tie_word_embeddings == tied
    assert files.spec.layers[0].mlp_bias == files.spec.layers[1].o_bias == bias
    checkpoint = open_checkpoint(files)
    assert checkpoint.dtype == "f32"
    for name, tensor in checkpoint.items():
        np.testing.assert_array_equal(
            tensor.data, stored[files.weight_map[name].tensor], err_msg=name
        )


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("F32", "auto", "f32"),
        ("F16", "auto", "f16"),
        ("BF16", "auto", "bf16"),
        ("Q8_0", "auto", "bf16"),
        ("Q4_1", "f32", "f32"),
        ("Q5_0", "bf16", "bf16"),
        ("F32", "bf16", "bf16"),
        ("F16", "f32", "f32"),
    ],
)
def test_the_format_that_is_written(kind: str, dtype: str, expected: str, tmp_path: Path) -> None:
    stored = random_weights(gguf_config(), seed=2)
    directory = convert(tmp_path, dtype, kind=kind, weights=stored)
    files = read_model(directory)
    checkpoint = open_checkpoint(files)
    assert checkpoint.dtype == expected
    # Vectors lie in the file as F32 and stay so, unless one format is asked for.
    assert checkpoint["final_norm.weight"].dtype == ("f32" if dtype == "auto" else dtype)
    torch_names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    assert files.config["torch_dtype"] == torch_names[expected]
    raw = gguf.GGMLQuantizationType[kind]
    for name in ("layers.1.up.weight", "lm_head.weight"):
        values = stored[files.weight_map[name].tensor]
        decoded = gguf.dequantize(gguf.quantize(values, raw), raw).reshape(values.shape)
        tensor = checkpoint[name]
        if expected == "bf16":
            np.testing.assert_array_equal(tensor.data, float32_to_bf16(decoded))
        else:
            np.testing.assert_array_equal(tensor.to_float32(), decoded)


def test_a_table_bigger_than_one_run_is_decoded_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(tmp_path, kind="Q8_0")
    content = (whole / "model.safetensors").read_bytes()
    monkeypatch.setattr("octavo.weights.gguf._ROWS_AT_ONCE", 1000)  # 3 rows, or one head
    assert (convert(tmp_path, kind="Q8_0") / "model.safetensors").read_bytes() == content


def test_the_configuration(tmp_path: Path) -> None:
    config = gguf_config(rope_theta=123456.0, rms_norm_eps=1e-6, num_hidden_layers=1)
    files = read_model(convert(tmp_path, config=config))
    layer = files.spec.layers[0]
    assert layer.rope == default_rope(123456.0, 64)
    assert files.config["rms_norm_eps"] == 1e-6  # not 9.99999997e-07
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 64)
    assert files.spec.max_position_embeddings == 128
    assert files.spec.vocab_size == len(tiny_vocabulary()[0])
    assert files.eos_token_ids == (1, 2)  # end of text, and end of turn
    assert files.generation_config["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, default_rope(10000.0, 64)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            linear_rope(10000.0, 64, 2.5),
        ),
        ({"llama.rope.scaling.factor": 2.5}, linear_rope(10000.0, 64, 2.5)),  # as llama.cpp
        (
            {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.5},
            default_rope(10000.0, 64),
        ),
        ({"llama.rope.scale_linear": 4.0}, linear_rope(10000.0, 64, 4.0)),
        ({"llama.rope.scale_linear": 1.0}, default_rope(10000.0, 64)),
        ({"llama.rope.freq_base": None}, default_rope(10000.0, 64)),
        # Newer converters state the size of a head, older ones let it follow.
        (
            {"llama.attention.key_length": 64, "llama.attention.value_length": 64},
            default_rope(10000.0, 64),
        ),
        ({"llama.rope.dimension_count": None}, default_rope(10000.0, 64)),
        ({"llama.vocab_size": None}, default_rope(10000.0, 64)),
    ],
)
def test_rope_and_sizes_from_metadata(
    metadata: dict[str, Any], expected: RopeSpec, tmp_path: Path
) -> None:
    files = read_model(convert(tmp_path, metadata=metadata))
    assert files.spec.layers[0].rope == expected
    assert files.spec.layers[0].head_dim == 64


def llama3_rope_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them for Llama 3.1: by wavelengths."""
    factors = []
    for i in range(0, head_dim, 2):
        frequency = 1.0 / theta ** (i / head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognized(factor: float, tmp_path: Path) -> None:
    divisors = llama3_rope_factors(500000.0, 64, factor)
    np.testing.assert_allclose(
        divisors, llama3_divisors(500000.0, 64, factor, 1.0, 4.0, 8192), rtol=1e-6
    )
    config = gguf_config(rope_theta=500000.0)
    extra = {"rope_freqs.weight": divisors}
    files = read_model(convert(tmp_path, config=config, extra_tensors=extra))
    assert files.spec.layers[0].rope == llama3_rope(500000.0, 64, factor, 1.0, 4.0, 8192)


def test_rope_divisors_of_one_mean_no_scaling(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(32, np.float32)}
    rope = read_model(convert(tmp_path, extra_tensors=extra)).spec.layers[0].rope
    assert rope == default_rope(10000.0, 64)


@pytest.mark.parametrize(
    "divisors",
    [
        np.full(32, 8.0),
        np.linspace(1, 8, 32),
        np.zeros(32),
        np.full(32, np.nan),
        np.ones(31),
        llama3_rope_factors(500000.0, 64, 8.0),  # for another theta
    ],
)
def test_other_rope_divisors_are_refused(divisors: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        convert(tmp_path, extra_tensors={"rope_freqs.weight": divisors})


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"llama.rope.scaling.type": "ntk"}, ("llama.rope.scaling.type", "'ntk'", "linear")),
        ({"llama.expert_count": 8}, ("llama.expert_used_count", "missing")),
        ({"llama.attention.sliding_window": 4096}, ("sliding_window", "4096")),
        ({"llama.attention.head_count_kv": [2, 2]}, ("head_count_kv", "[2, 2]", "one number")),
        ({"llama.attention.head_count": "4"}, ("head_count", "'4'", "an integer")),
        ({"llama.attention.head_count": 0}, ("head_count", "0", "from 1")),
        ({"llama.attention.head_count_kv": 3}, ("num_key_value_heads", "3", "divisor")),
        ({"llama.rope.dimension_count": 32, "llama.attention.key_length": 64}, ("32", "64")),
        ({"llama.attention.value_length": 32}, ("value_length", "32", "64")),
        ({"llama.embedding_length": None}, ("embedding_length", "missing")),
        ({"llama.block_count": 2**31}, ("block_count", str(2**31))),
        ({"llama.vocab_size": 7}, ("vocab_size", "7", "263")),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, ("layer_norm_rms_epsilon", "-1.0")),
        ({"llama.logit_scale": 0.5}, ("logit_scale", "0.5")),
        ({"tokenizer.ggml.eos_token_id": 10**6}, ("eos_token_id", "1000000")),
    ],
)
def test_metadata_that_octavo_cannot_run_is_refused_by_name(
    metadata: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        convert(tmp_path, metadata=metadata)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not list((tmp_path / "converted").iterdir())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture is 'falcon'.*'llama'"):
        convert(tmp_path, architecture="falcon")


def test_all_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    weights = random_weights(gguf_config())
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.norm.weight"] = np.ones(255, np.float32)
    with pytest.raises(WeightsError) as caught:
        convert(tmp_path, weights=weights)
    assert len(caught.value.problems) == 2
    extra = {"blk.0.attn_q_norm.weight": np.ones(64), "blk.0.ffn_gate_exps.weight": np.ones(3)}
    with pytest.raises(WeightsError, match="is left over") as caught:
        convert(tmp_path, extra_tensors=extra)
    assert len(caught.value.problems) == 2


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="int4"):
        convert(tmp_path, "int4")


def test_names() -> None:
    spec = read_spec(gguf_config(mlp_bias=True, num_hidden_layers=13))
    sources = GGUF.tensors.weight_map(spec)
    assert sources["embed.weight"].tensor == "token_embd.weight"
    assert sources["lm_head.weight"].tensor == "output.weight"
    assert sources["layers.12.down.bias"].tensor == "blk.12.ffn_down.bias"
    q = sources["layers.3.q.weight"]
    assert (q.tensor, q.head_dim) == ("blk.3.attn_q.weight", 64)


@pytest.mark.parametrize(
    "name",
    [
        *("blk.012.ffn_down.weight", "blk.00.ffn_down.weight", "blk.1.ffn_down", "attn_q.weight"),
        *("blk.0.output.weight", "blk.2.ffn_down.weight", "blk.0.attn_q.bias.weight"),
    ],
)
def test_tensors_of_another_name_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        convert(tmp_path, extra_tensors={name: np.ones((3, 32))})
    assert [problem.split()[0] for problem in caught.value.problems] == [name]


def test_every_format_that_is_offered_has_a_decoder() -> None:
    for kind in KINDS:
        raw = gguf.GGMLQuantizationType[kind]
        elements, size = gguf.GGML_QUANT_SIZES[raw]
        block = np.zeros((3, 2 * size), np.uint8)
        assert gguf.dequantize(block, raw).shape == (3, 2 * elements)


def test_damaged_files_are_refused_by_cause(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    absurd = (2**60).to_bytes(8, "little")
    cases = {
        "is empty": b"",
        "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
        "begins with b'PK": b"PK\x03\x04" + whole[4:],
        "version 1": whole[:4] + b"\x01\x00\x00\x00" + whole[8:],
        "big-endian": whole[:4] + b"\x00\x00\x00\x03" + whole[8:],
        "announces 1152921504606846976 tensors": whole[:8] + absurd + whole[16:],
        "metadata entries": whole[:16] + absurd + whole[24:],
        "a name of 1152921504606846976 bytes": whole[:24] + absurd + whole[32:],
        "truncated": whole[: len(whole) // 2],
    }
    for cause, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=cause):
            GgufFile(path)
    key = b"tokenizer.ggml.tokens"
    place = whole.index(key) + len(key) + 4  # behind the type of the value: element type, length
    path.write_bytes(whole[: place + 4] + absurd + whole[place + 12 :])
    with pytest.raises(WeightsError, match="an array of 1152921504606846976 entries"):
        GgufFile(path)
    with pytest.raises(WeightsError, match="cannot be read"):
        GgufFile(tmp_path / "nowhere.gguf")
