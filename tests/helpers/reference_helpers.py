"""What tests of the reference, of the native ops and of whole models share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from octavo import _native
from octavo.config import RuntimeOptions, read_environment
from octavo.models.layer import weight_shapes
from octavo.models.spec import ModelSpec
from octavo.runtime.loader import LoadedRuntime
from octavo.runtime.session import Session

Float32 = npt.NDArray[np.float32]


def uniform(seed: int, *shape: int) -> Float32:
    """Uniform in [-1, 1), the same in every version of NumPy.

    NumPy promises the stream of a bit generator for ever, but not what `Generator` makes of it.
    """
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - 1).reshape(shape)


def random_weights(spec: ModelSpec, seed: int) -> dict[str, Float32]:
    """Weights for a spec, of which every one matters: norms are not 1, biases not 0."""
    weights = {}
    for index, (name, shape) in enumerate(weight_shapes(spec).items()):
        values = uniform(1000 * seed + index, *shape)
        if name.endswith(".bias"):
            weights[name] = values * np.float32(0.5)
        elif len(shape) == 1:
            weights[name] = 1 + values * np.float32(0.5)
        elif name in ("embed.weight", "positions.weight"):
            weights[name] = values
        else:  # so that what comes out has the size of what went in
            weights[name] = values * np.float32((3 / shape[1]) ** 0.5)
    return weights


def max_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """The largest absolute difference, relative to the size (root mean square) of `expected`.

    The measure by which an op is right or wrong. Infinite where shapes differ or a NaN appears.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(expected**2)))
    return float(np.abs(actual - expected).max()) / max(scale, 1e-30)


def same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays are equal to the last bit (a NaN equals the same NaN)."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class NativeModel:
    """One sequence through the native runtime, called as the reference is.

    The blocks of its KV cache are in a random order, and none lies where its index says.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Float32],
        *,
        dtype: Any = "f32",
        kv_dtype: Any = "f32",
        max_tokens: int = 256,
        isa: str = "auto",
        num_threads: int = 2,
        device: str = "cpu",
    ) -> None:
        self.options = RuntimeOptions(
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=16,
            max_model_len=max_tokens,
            max_num_seqs=4,
            max_num_batched_tokens=max_tokens,
            num_threads=num_threads,
            isa=isa,
        )
        self.runtime = _native.Runtime(device, spec, self.options)
        for name in weight_shapes(spec):
            self.runtime.load(name, np.ascontiguousarray(weights[name]), "f32")
        num_blocks = -(-max_tokens // 16) + 1
        self.runtime.alloc_kv(num_blocks)
        loaded = LoadedRuntime(self.runtime, self.options, num_blocks, device)
        self.session = Session(loaded)
        order = 1 + np.random.default_rng(num_blocks).permutation(num_blocks - 1)
        self.session.restart(blocks=order.astype(np.int32))

    def forward(
        self,
        token_ids: npt.ArrayLike,
        taps: dict[str, Float32] | None = None,
        logit_rows: npt.ArrayLike | None = None,
    ) -> Float32:
        """Run the sequence's next tokens; logits of all of them, or of the rows asked for."""
        tokens = np.asarray(token_ids, dtype=np.int32)
        rows = np.arange(len(tokens)) if logit_rows is None else np.asarray(logit_rows)
        step = self.session.step({0: tokens}, rows, () if taps is None else ["*"])
        if taps is not None:
            taps.update(step.taps)
        return step.logits

    def greedy(self, prompt: npt.ArrayLike, num_tokens: int) -> list[int]:
        """The prompt in one step, then token by token."""
        tokens = np.asarray(prompt, dtype=np.int32)
        answer: list[int] = []
        for _ in range(num_tokens):
            logits = self.forward(tokens, logit_rows=[len(tokens) - 1])
            answer.append(int(np.argmax(logits[0])))
            tokens = np.array(answer[-1:], dtype=np.int32)
        return answer

    def restart(self) -> None:
        """Forget the sequence; the next tokens are a new one's first."""
        self.session.rewind(0)


def smollm2_path() -> Path | None:
    """The directory of SmolLM2-135M-Instruct where it has been pulled, else None."""
    path = read_environment().models / "smollm2-135m"
    return path if (path / "config.json").is_file() else None


def need_smollm2() -> Path:
    """That directory; the test is skipped where there is none."""
    path = smollm2_path()
    if path is None:
        pytest.skip(SMOLLM2_MISSING)
    return path


SMOLLM2_MISSING = "SmolLM2 is not in the cache; `octavo pull smollm2-135m` puts it there"


def cache_from_sequence(
    keys: Float32, block_table: npt.NDArray[np.int32], num_slots: int, block_size: int
) -> Float32:
    """Lay (context, heads, head_dim) into (num_slots, heads, head_dim) by a block table.

    Slots of no token hold NaN, so that whoever reads one is found out.
    """
    cache = np.full((num_slots, *keys.shape[1:]), np.nan, dtype=np.float32)
    positions = np.arange(len(keys))
    cache[block_table[positions // block_size] * block_size + positions % block_size] = keys
    return cache


def bf16_order(isa: str) -> str:
    """Which of two orders an instruction set sums bfloat16 products in; all else is summed alike.

    "dot": by VDPBF16PS. "pairs": even and odd inputs apart, as fused multiply-adds and AMX do.
    """
    return "dot" if isa == "avx512_bf16" else "pairs"
