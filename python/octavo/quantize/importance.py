"""How much the errors of each weight matter, without any text: from a few random tokens.

A matrix's rounding errors reach its outputs through its inputs, so that the error of weight
(output, input) counts by the mean square of that input. Those differ by orders of magnitude among
the inputs of one matrix, and mostly so whatever the text: tokens drawn at random show it. What
comes of them serves `quantize_matrix` as importance. (To count errors by the inputs' mean squares
is an old idea: the diagonal of the Hessian in Optimal Brain Surgeon, Hassibi & Stork 1992.)
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig
from octavo.models.layer import linear_nodes
from octavo.progress import StageProgress
from octavo.runtime.loader import load_runtime
from octavo.runtime.session import Session
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles

Float32 = npt.NDArray[np.float32]

_SEQUENCES, _TOKENS, _SEED = 4, 256, 0
_BLOCK_SIZE = 16
_MAX_TAPPED = 1 << 26  # numbers kept of a step: 256 MiB


def measure_importance(
    files: ModelFiles, checkpoint: Checkpoint, progress: StageProgress = lambda *_: None
) -> dict[str, Float32]:
    """The mean square of every input of the layers' matrices, over 1,024 random tokens.

    checkpoint: float weights. Returns float32 (inputs,) by octavo's name without ".weight"; not of
    the last matrices of experts, whose inputs are no tap.
    Raises what loading the model raises; the model is held in memory meanwhile.
    """
    spec = files.spec
    tokens = min(_TOKENS, spec.max_position_embeddings)
    # The input of every matrix, where it is a tap; several matrices may have the same.
    nodes = {name: node for name, node in linear_nodes(spec).items() if node.inputs}
    widths = {node.inputs[0]: node.matrix.inputs for node in nodes.values()}
    chunk = max(1, min(tokens, _MAX_TAPPED // sum(widths.values())))
    config = EngineConfig(
        max_model_len=tokens,
        max_num_seqs=1,
        max_num_batched_tokens=chunk,
        block_size=_BLOCK_SIZE,
        num_kv_blocks=-(-tokens // _BLOCK_SIZE),
    )
    what = "measuring importance"
    session = Session(load_runtime(files, checkpoint, config, partial(progress, "loading")))
    ids = np.random.default_rng(_SEED).integers(0, spec.vocab_size, (_SEQUENCES, tokens), np.int32)
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for number, sequence in enumerate(ids):
        progress(what, number, _SEQUENCES)
        session.rewind(0)
        for begin in range(0, tokens, chunk):
            step = session.step({0: sequence[begin : begin + chunk]}, (), list(widths))
            for name, values in step.taps.items():
                squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
                sums[name] = sums.get(name, 0.0) + squares
    progress(what, _SEQUENCES, _SEQUENCES)
    means = {name: (total / ids.size).astype(np.float32) for name, total in sums.items()}
    return {name: means[node.inputs[0]] for name, node in nodes.items()}
