"""What it costs to run the types of GGUF files in octavo's codes: KL divergences of SmolLM2.

    python tests/helpers/measure_gguf.py [TYPE ...]

Every matrix is encoded in a type (K types by `gguf_blocks_helpers`, which are simpler than ggml's).
Its numbers, those of octavo's codes, and those rounded to bfloat16 are put into a float32 model.
Printed: the type, mean KL of the type's numbers from the unquantized model, mean KL of octavo's
codes and of bfloat16 from the type's numbers, over the first four windows of `octavo eval`'s text.
Rows of 576 are no whole blocks of 256, so blocks go on from row to row; groups of 32 do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import gguf
import numpy as np
from gguf_blocks_helpers import encode_blocks

from octavo.config import EngineConfig, read_environment
from octavo.eval.evaluation import EvalRequest, read_tokens, score
from octavo.eval.scorer import Scorer
from octavo.eval.windows import make_windows
from octavo.reference.ops import round_to_bf16
from octavo.reference.quantization import dequantize, unpack_int4
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf_blocks import convert_blocks
from octavo.weights.gguf_codes import BLOCK_FORMATS
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

MODEL = "smollm2-135m"
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q3_K", "Q2_K")
Numbers = Callable[[np.ndarray], np.ndarray]


def as_type(kind: str) -> tuple[Numbers, Numbers]:
    """Of a matrix: the numbers of the type, and those of octavo's codes."""
    source = BLOCK_FORMATS[kind]

    def blocks(values: np.ndarray) -> np.ndarray:
        return encode_blocks(values.reshape(-1, 256), kind, seed=0)

    def theirs(values: np.ndarray) -> np.ndarray:
        decoded = gguf.dequantize(blocks(values), gguf.GGMLQuantizationType[kind])
        return decoded.reshape(values.shape)

    def ours(values: np.ndarray) -> np.ndarray:
        codes, scales, zeros = convert_blocks(blocks(values), source)
        codes = unpack_int4(codes) if source.format.dtype == "int4" else codes
        wide = scales.astype(np.float32)
        return dequantize(codes, wide, source.format, zeros).reshape(values.shape)

    return theirs, ours


def main(kinds: list[str]) -> None:
    """Print a line for each type."""
    environment = read_environment()
    files = read_model(resolve_model(MODEL, environment))
    config = EngineConfig(dtype="f32")
    checkpoint = open_checkpoint(files)
    model, other = (
        Scorer(files, checkpoint, config, 512, environment=environment) for _ in range(2)
    )
    tokens = read_tokens(EvalRequest(None, config), files, None).tokens
    windows = make_windows(len(tokens), 512, 256, 4)
    matrices = [name for name, info in checkpoint.infos.items() if len(info.shape) == 2]

    def put(scorer: Scorer, change: Numbers) -> None:
        for name in matrices:
            scorer.load_weight(name, change(checkpoint[name].to_float32()))

    def mean_kl() -> float:
        return float(score(model, other, tokens, windows).kl.mean())

    for kind in kinds or TYPES:
        theirs, ours = as_type(kind)
        put(model, theirs)
        put(other, lambda values: values)
        found = [mean_kl()]
        put(other, theirs)
        for change in (ours, lambda values, theirs=theirs: round_to_bf16(theirs(values))):
            put(model, change)
            found.append(mean_kl())
        print(kind, *(f"{kl:.2e}" for kl in found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
