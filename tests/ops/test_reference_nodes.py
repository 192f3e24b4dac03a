"""Every tap of the reference's own run, computed once more from the taps that it reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from runtime_helpers import random_weights, tiny_spec

from octavo.models.layer import model_nodes
from octavo.models.spec import MoeSpec, NormSpec
from octavo.reference.llama import ReferenceModel
from octavo.reference.nodes import op_call

SPECS: dict[str, dict[str, Any]] = {
    "gated, grouped queries": {},
    "biases and layer norm": {
        "norm": NormSpec("layer", 1e-5, bias=True),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    },
    "ungated, a window": {"gated": False, "activation": "gelu", "window": 5},
    "experts": {"moe": MoeSpec(4, 2)},
    "no rope, a scale of its own": {"rope": None, "attention_scale": 0.7},
}


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_a_run_op_by_op(fields: dict[str, Any]) -> None:
    spec = tiny_spec(**fields)
    weights, tokens = random_weights(spec), np.arange(23) * 7 % spec.vocab_size
    taps: dict[str, np.ndarray] = {}
    ReferenceModel(spec, weights).forward(tokens, taps=taps)
    for node in model_nodes(spec):
        operands = [taps[name] for name in node.inputs]
        layer = None if node.layer is None else spec.layers[node.layer]
        call = op_call(node, operands, weights, layer, np.arange(23), token_ids=tokens)
        assert np.array_equal(call().reshape(23, -1), taps[node.tap]), node.tap
