"""Whether systems compute the same model: log-probabilities of the token after a prompt.

Measured from transformers in float32. Systems that keep weights in 16 bits or more take part;
weights have to be read (`--load-format auto`), since every system makes dummy ones of its own.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from systems import BITS, output_of

# Letters, which llama.cpp cuts into the tokens of single bytes that write_gguf.py makes up.
LETTERS = "".join(chr(ord("a") + (7 * index * index + 3 * index) % 25) for index in range(32))
_FIRST_BYTE = 3  # the token of byte 0
PROMPT = [ord(letter) + _FIRST_BYTE for letter in LETTERS[:-1]]
FACTOR = 1.5  # octavo may be so many times as far from float32 as the farthest peer
MOST = 0.25  # from float32, in 16 bits: what is above it is another model


def error_of(truth: Mapping[int, float], given: Mapping[int, float]) -> float:
    """The largest error of a likely token's log-probability; ValueError where few are common."""
    best = sorted(truth, key=truth.__getitem__)[-20:]
    common = [token for token in best if token in given]
    if len(common) < 10:
        raise ValueError(f"shares {len(common)} of the 20 likeliest tokens")
    return max(abs(truth[token] - given[token]) for token in common)


def check_agreement(errors: Mapping[str, float], forms: Mapping[str, str]) -> dict[str, str]:
    """System -> what is wrong, of those whose error is too large to be rounding.

    errors: `error_of` by system. forms: system -> the format of its weights.
    """
    wrong = {}
    peers = [error for name, error in errors.items() if not name.startswith("octavo")]
    for name, error in errors.items():
        limit = 1e-3 if forms[name] == "f32" else MOST
        if name.startswith("octavo") and forms[name] != "f32" and peers:
            limit = min(limit, FACTOR * max(peers))
        if not error <= limit:
            wrong[name] = f"is {error:.4f} from float32; expected {limit:.4f} at most"
    return wrong


def is_compared(form: str) -> bool:
    """Whether a format is so near the model that log-probabilities tell who computes another."""
    return BITS[form] >= 16


def llama_logprobs(perplexity: Path, file: Path, threads: int) -> dict[int, float]:
    """llama.cpp's log-probabilities behind PROMPT, from a file that llama-perplexity writes.

    That file (tools/perplexity of llama.cpp): "_logits_", the length of a window, the vocabulary,
    the number of windows, their tokens, and a row for each token scored: a scale and a least value
    as float32, and 16 bits for each token of the vocabulary, padded to an even number.
    """
    length = len(LETTERS)
    with tempfile.TemporaryDirectory() as temporary:
        text, logits = Path(temporary, "text"), Path(temporary, "logits")
        text.write_text(LETTERS * 2, encoding="ascii")  # it asks for two windows
        command = [perplexity, "-m", file, "-t", threads, "-f", text, "-c", length, "-b", length]
        output_of([*map(str, command), "--chunks", "1", "--kl-divergence-base", str(logits)])
        content = logits.read_bytes()
    vocab_size = struct.unpack_from("<i", content, 12)[0]
    tokens = np.frombuffer(content, "<i4", length, 20).tolist()
    if content[:8] != b"_logits_" or tokens[:-1] != PROMPT:
        raise ValueError(f"llama-perplexity scored {tokens[:8]} …; expected {PROMPT[:8]} …")
    row = content[-2 * (2 * ((vocab_size + 1) // 2) + 4) :]  # of the last token but one
    scale, least = struct.unpack_from("<ff", row)
    codes = np.frombuffer(row, "<u2", vocab_size, 8)
    return dict(enumerate((least + scale * codes.astype(np.float64)).tolist()))
