"""Measure how far float32 and bfloat16 are from each other and from transformers on SmolLM2.

    python tests/hf/measure_numbers.py short
    python tests/hf/measure_numbers.py long

Prints the tables of docs/numbers.md: of all prompts of tests/helpers/prompts.py but the long one,
or of the prompts named.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import torch
from prompts import PROMPTS
from reference_helpers import SMOLLM2_MISSING, NativeModel, smollm2_path
from transformers import LlamaForCausalLM

from hf.hf_models import hf_logits
from hf.hf_smollm2 import SmolLM2
from octavo.reference.llama import ReferenceModel

# What is compared with what; the sides are the keys of `all_logits`.
PAIRS = {
    "float32": [
        ("HF f32", "judge"),
        ("HF f32 sdpa", "judge"),
        ("reference f32", "judge"),
        ("native f32", "judge"),
        ("HF f32 sdpa", "HF f32"),
        ("reference f32", "HF f32"),
        ("native f32", "HF f32"),
        ("native f32", "reference f32"),
    ],
    "bfloat16": [
        ("HF bf16", "HF f32"),
        ("reference bf16", "reference f32"),
        ("native bf16", "reference f32"),
        ("reference bf16", "HF bf16"),
        ("native bf16", "HF bf16"),
        ("native bf16", "reference bf16"),
        ("reference bf16, kv f32", "reference f32"),
    ],
}


class Sides:
    """The same weights, run in every way."""

    def __init__(self, smollm2: SmolLM2) -> None:
        spec, weights = smollm2.files.spec, smollm2.weights
        self.hf: dict[str, LlamaForCausalLM] = {
            "HF f32": smollm2.hf_model,
            "HF f32 sdpa": smollm2.load_hf(torch.float32, attention="sdpa"),
            "HF bf16": smollm2.load_hf(torch.bfloat16),
        }
        rounded = {"dtype": "bf16", "kv_dtype": "bf16"}
        self.reference = {
            "judge": ReferenceModel(spec, weights, compute=np.float64),
            "reference f32": ReferenceModel(spec, weights),
            "reference bf16": ReferenceModel(spec, weights, **rounded),
            "reference bf16, kv f32": ReferenceModel(spec, weights, dtype="bf16"),
        }
        self.native = {
            "native f32": NativeModel(spec, weights, max_tokens=2048),
            "native bf16": NativeModel(spec, weights, max_tokens=2048, **rounded),
        }

    def all_logits(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Side -> (rows, vocab_size)."""
        logits = {name: hf_logits(model, tokens) for name, model in self.hf.items()}
        logits |= {name: model.forward(tokens) for name, model in self.reference.items()}
        for name, native in self.native.items():
            native.restart()
            logits[name] = native.forward(tokens)
        return logits


def measure(names: list[str]) -> None:
    path = smollm2_path()
    if path is None:
        raise SystemExit(SMOLLM2_MISSING)
    smollm2 = SmolLM2(path)
    sides = Sides(smollm2)
    rows, scale = 0, 0.0
    sums = {pair: np.zeros(3) for pairs in PAIRS.values() for pair in pairs}
    for name in names:
        tokens = smollm2.tokens(PROMPTS[name])
        logits = sides.all_logits(tokens)
        rows, scale = rows + len(tokens), scale + float(np.square(logits["judge"]).mean(1).sum())
        for (a, b), total in sums.items():
            difference = logits[a] - logits[b]
            total[0] = max(total[0], np.abs(difference).max())
            total[1] += np.square(difference).mean(axis=1).sum()
            total[2] += (logits[a].argmax(axis=1) != logits[b].argmax(axis=1)).sum()
        print(f"{name}: {len(tokens)} tokens", file=sys.stderr, flush=True)
    size = np.sqrt(scale / rows)
    print(f"{len(names)} prompts, {rows} positions; root mean square of the logits {size:.2f}")
    for title, pairs in PAIRS.items():
        print(f"\n{title}:\n\n| | against | largest | root mean square | other first choice |")
        print("|---|---|---:|---:|---:|")
        for a, b in pairs:
            most, square, flips = sums[a, b]
            print(f"| {a} | {b} | {most:.1e} | {np.sqrt(square / rows):.1e} | {int(flips)} |")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["short"]
    measure([name for name in PROMPTS if name != "long"] if chosen == ["short"] else chosen)
