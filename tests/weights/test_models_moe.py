"""Mixtral and Qwen3-MoE: from config.json to a spec, and where each weight lies."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import UnsupportedModelError
from octavo.models import mixtral, qwen3_moe
from octavo.models.layer import linear_nodes, weight_shapes
from octavo.models.spec import MoeSpec

SIZES = {
    **{"vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
}


def mixtral_config(**changes: Any) -> dict[str, Any]:
    return {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 3, **changes}


def qwen3_moe_config(**changes: Any) -> dict[str, Any]:
    return {
        **SIZES,
        **{"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **changes,
    }


def test_a_mixtral() -> None:
    spec = mixtral.read_spec(mixtral_config(sliding_window=9))
    layer = spec.layers[2]
    assert layer.moe == MoeSpec(5, 3, normalize=True)
    assert (layer.intermediate_size, layer.window, layer.kv_group) == (40, 9, 0)
    assert layer.rope is not None and layer.rope.theta == 1e6
    defaults = mixtral.read_spec(SIZES).layers[0]
    assert defaults.moe == MoeSpec(8, 2) and defaults.window == 0 and defaults.norm.eps == 1e-5


def test_a_qwen3_moe() -> None:
    config = qwen3_moe_config(mlp_only_layers=[3], decoder_sparse_step=2, norm_topk_prob=True)
    layers = qwen3_moe.read_spec(config).layers
    moe = MoeSpec(7, 2, normalize=True)
    assert [layer.moe for layer in layers] == [None, moe, None, None]
    assert [layer.intermediate_size for layer in layers] == [40, 24, 40, 40]
    assert all(layer.qk_norm == "head" and not layer.qkv_bias for layer in layers)
    biased = qwen3_moe.read_spec(qwen3_moe_config(attention_bias=True)).layers[0]
    assert (biased.qkv_bias, biased.o_bias) == (True, True)
    assert biased.moe == MoeSpec(7, 2, normalize=False)
    saved = {**SIZES, "num_local_experts": 9}  # as transformers 5 writes it
    assert qwen3_moe.read_spec(saved).layers[0].moe == MoeSpec(9, 8, normalize=False)


def test_windows_of_qwen3_moe_need_both_fields() -> None:
    for changes, window in (
        ({"sliding_window": 9}, 0),
        ({"sliding_window": 9, "use_sliding_window": True}, 9),
    ):
        layers = qwen3_moe.read_spec(qwen3_moe_config(**changes)).layers
        assert {layer.window for layer in layers} == {window}


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        (mixtral, {"num_local_experts": 0}, "num_local_experts is 0"),
        (mixtral, {"num_experts_per_tok": 6}, "num_experts_per_tok is 6; supported: an integer "),
        (mixtral, {"num_experts": 4}, "num_experts is 4"),
        (mixtral, {"attention_bias": True}, "attention_bias is True"),
        (qwen3_moe, {"num_experts": "7"}, "num_experts is '7'"),
        (qwen3_moe, {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        (qwen3_moe, {"mlp_only_layers": [True]}, "mlp_only_layers is [True]"),
        (qwen3_moe, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (qwen3_moe, {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        (qwen3_moe, {"n_routed_experts": 4}, "n_routed_experts is 4"),
    ],
)
def test_what_is_refused_is_named(family: Any, changes: dict[str, Any], named: str) -> None:
    make = mixtral_config if family is mixtral else qwen3_moe_config
    with pytest.raises(UnsupportedModelError) as caught:
        family.read_spec(make(**changes))
    assert named in str(caught.value)


def test_where_the_weights_of_a_mixtral_lie() -> None:
    spec = mixtral.read_spec(mixtral_config())
    sources = mixtral.FAMILY.tensors.weight_map(spec)
    assert {name: source.shape for name, source in sources.items()} == weight_shapes(spec)
    moe = "model.layers.3.block_sparse_moe"
    for ours, theirs, shape in (
        ("layers.3.router", f"{moe}.gate", (5, 48)),
        ("layers.3.experts.4.gate", f"{moe}.experts.4.w1", (40, 48)),
        ("layers.3.experts.0.up", f"{moe}.experts.0.w3", (40, 48)),
        ("layers.3.experts.2.down", f"{moe}.experts.2.w2", (48, 40)),
    ):
        source = sources[f"{ours}.weight"]
        assert (source.tensor, source.shape) == (f"{theirs}.weight", shape)


def test_where_the_weights_of_a_qwen3_moe_lie() -> None:
    """Experts and the MLP of layers without them have the same parts under other names."""
    spec = qwen3_moe.read_spec(qwen3_moe_config(mlp_only_layers=[1]))
    sources = qwen3_moe.FAMILY.tensors.weight_map(spec)
    assert sources["layers.1.gate.weight"].tensor == "model.layers.1.mlp.gate_proj.weight"
    name = sources["layers.2.experts.6.gate.weight"].tensor
    assert name == "model.layers.2.mlp.experts.6.gate_proj.weight"
    assert sources["layers.0.router.weight"].tensor == "model.layers.0.mlp.gate.weight"
    assert sources["layers.0.k_norm.weight"].tensor == "model.layers.0.self_attn.k_norm.weight"


def test_every_matrix_of_an_expert_may_be_quantized_and_no_router() -> None:
    nodes = linear_nodes(mixtral.read_spec(mixtral_config()))
    assert len(nodes) == 4 * (4 + 3 * 5) and not any("router" in name for name in nodes)
    assert nodes["layers.1.experts.3.down"].matrix.shape == (48, 40)
    assert nodes["layers.1.experts.3.down"].inputs == ()
    assert nodes["layers.1.experts.3.up"].inputs == ("layers.1.mlp_norm",)
