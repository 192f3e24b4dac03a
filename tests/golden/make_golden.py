"""Make the golden files with transformers, or check that it still gives the same.

    python tests/golden/make_golden.py            writes the files
    python tests/golden/make_golden.py --check    compares; exit code 1 where they differ

Needs torch and transformers. SmolLM2 has to be in the cache (`octavo pull smollm2-135m`).

Tolerance of --check: 2e-5 on logits and hidden states of the tiny models (they are of the order of
1) and 3e-4 on SmolLM2's logits (of the order of 20), which is what other versions of torch, other
processors and thread counts may change; greedy tokens must be identical.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import torch
from golden_helpers import SMOLLM2, TINY_CONFIGS, TINY_RESULTS, load_smollm2, load_tiny_models
from prompts import PROMPTS
from reference_helpers import SMOLLM2_MISSING, random_weights, smollm2_path
from rope_cases import CASES, LENGTHS
from rope_cases import GOLDEN as ROPE
from transformers import LlamaConfig, LlamaForCausalLM

from hf.hf_models import hf_logits, hf_taps
from hf.hf_smollm2 import SmolLM2
from hf.test_rope_hf import theirs
from octavo.models.llama import FAMILY, read_spec

TINY_TOLERANCE = 2e-5
SMOLLM2_TOLERANCE = 3e-4
SMOLLM2_PROMPTS = ("capital", "python", "arithmetic", "chinese", "emoji")
NUM_TOP = 12

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}

# Written in both spellings of the rope fields, and with what may be left out left out.
TINY: dict[str, dict[str, Any]] = {
    "plain_tied_4x32": {
        **{"num_attention_heads": 4, "hidden_size": 128, "tie_word_embeddings": True},
        **{"rope_theta": 10000.0},
    },
    "gqa3_9_3x64_tied": {
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        **{"hidden_size": 72, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    },
    "mqa_5_1x80": {
        **{"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 80},
        **{"hidden_size": 95, "rms_norm_eps": 1e-2},
    },
    "plain_3x128_gelu": {
        **{"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 128},
        **{"hidden_size": 63, "hidden_act": "gelu"},
    },
    "gqa4_8_2x32_biases": {
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32},
        **{"hidden_size": 80, "attention_bias": True, "mlp_bias": True},
    },
    "gqa8_8_1x64_llama3_old": {
        **{"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64},
        **{"hidden_size": 64, "rope_theta": 10000.0, "rope_scaling": LLAMA3},
    },
    "gqa2_6_3x32_linear": {
        **{"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32},
        **{"hidden_size": 66, "tie_word_embeddings": True, "mlp_bias": True},
        **{"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    },
    "wide_16_4x32_llama3_gelu_tanh": {
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 32},
        **{"hidden_size": 48, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True},
        **{"rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0}},
    },
}


def make_tiny() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every tiny model's entry in the JSON file, and its arrays."""
    entries, results = {}, {}
    for seed, (name, unusual) in enumerate(TINY.items(), start=1):
        config = {
            **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 101},
            **{"intermediate_size": 59, "num_hidden_layers": 3, "max_position_embeddings": 128},
            **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"},
            **unusual,
        }
        rows = 67 if "llama3" in name else 21  # its slow pairs need a longer text
        tokens = [(31 * i * i + 7 * i + seed) % 101 for i in range(rows)]
        taps = hf_taps(tiny_hf_model(config, seed), np.array(tokens))
        hidden = [taps["embed"], *(taps[f"layers.{i}.out"] for i in range(3))]
        entries[name] = {"config": config, "seed": seed, "tokens": tokens}
        results[f"{name}.logits"] = taps["logits"]
        results[f"{name}.hidden"] = np.stack(hidden)
    return entries, results


def tiny_hf_model(config: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """The transformers model with the weights that `random_weights` makes."""
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).float().eval()
    spec = read_spec(config)
    weights, sources = random_weights(spec, seed), FAMILY.tensors.weight_map(spec)
    state = {sources[name].tensor: torch.from_numpy(weight) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if spec.tie_word_embeddings else []
    if unexpected or [name for name in missing if name not in tied]:
        raise SystemExit(f"weights do not fit: missing {missing}, left over {unexpected}")
    return model


def load_model() -> SmolLM2:
    """SmolLM2, which has to be in the cache."""
    path = smollm2_path()
    if path is None:
        raise SystemExit(SMOLLM2_MISSING)
    return SmolLM2(path)


def make_smollm2(model: SmolLM2) -> dict[str, Any]:
    """Every prompt's entry in the JSON file."""
    entries = {}
    for name in SMOLLM2_PROMPTS:
        expected = model.expected(name, PROMPTS[name])
        last = expected.logits[-1]
        top = np.argsort(-last, kind="stable")[:NUM_TOP]
        entries[name] = {
            "tokens": expected.tokens.tolist(),
            "answer": expected.answer,
            "top_tokens": top.tolist(),
            "top_logits": [round(float(logit), 5) for logit in last[top]],
        }
    return entries


def make_rope() -> dict[str, Any]:
    entries = {}
    for name, length in ((name, length) for name in CASES for length in LENGTHS):
        frequencies, factor = theirs(name, length)
        entries[f"{name} {length}"] = {
            "frequencies": frequencies.tolist(),
            "attention_factor": factor,
        }
    return entries


def problems_of_tiny_models() -> list[str]:
    """What differs from their files, in words."""
    problems = []
    entries, results = make_tiny()
    stored = load_tiny_models()
    for name, entry in entries.items():
        golden = stored.get(name)
        if golden is None or golden.config != entry["config"]:
            problems.append(f"{name}: missing, or of another configuration")
            continue
        for part, values in (("logits", golden.logits), ("hidden", golden.hidden)):
            error = float(np.abs(values - results[f"{name}.{part}"]).max())
            print(f"{name:32} {part:8} {error:.2e}")
            if not error <= TINY_TOLERANCE:
                problems.append(f"{name}: {part} differ by {error:.2e}")
    return problems


def problems_of_smollm2(model: SmolLM2) -> list[str]:
    """What differs from its file, in words.

    Where transformers, given the stored answer, chooses its next token at every step, it would give
    that answer by itself.
    """
    problems = []
    stored = load_smollm2()
    for name in SMOLLM2_PROMPTS:
        golden, tokens = stored[name], model.tokens(PROMPTS[name])
        logits = hf_logits(model.hf_model, np.concatenate([tokens, golden.answer[:-1]]))
        logits = logits[len(tokens) - 1 :]
        error = float(np.abs(logits[0, golden.top_tokens] - golden.top_logits).max())
        print(f"smollm2 {name:24} logits   {error:.2e}")
        same = golden.tokens == tokens.tolist() and golden.answer == logits.argmax(axis=1).tolist()
        if not error <= SMOLLM2_TOLERANCE or not same:
            problems.append(f"smollm2 {name}: logits differ by {error:.2e}, or tokens do")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the files")
    if parser.parse_args().check:
        problems = problems_of_tiny_models() + problems_of_smollm2(load_model())
        print("\n".join(problems) or "all golden files are reproduced")
        raise SystemExit(1 if problems else 0)
    entries, results = make_tiny()
    np.savez_compressed(TINY_RESULTS, **results)
    write_json(TINY_CONFIGS, entries)
    write_json(ROPE, make_rope())
    write_json(SMOLLM2, make_smollm2(load_model()))


def write_json(path: Path, entries: dict[str, Any]) -> None:
    """One entry a line, so that a change shows which."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
