"""The real model, as transformers runs it, for whoever compares with that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM

from hf.hf_models import hf_logits
from octavo.diff.hugging_face import cache_argument
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

NUM_GREEDY = 64


@dataclass(frozen=True)
class Expected:
    """What transformers makes of one prompt."""

    name: str
    tokens: np.ndarray  # int64 (rows,)
    logits: np.ndarray  # float32 (rows, vocab_size)
    answer: list[int]  # the next NUM_GREEDY tokens, greedy, whatever they are


class SmolLM2:
    """The pulled directory: read by transformers, and read by octavo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: ModelFiles = read_model(path)
        self.weights = {
            name: tensor.to_float32() for name, tensor in open_checkpoint(self.files).items()
        }
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.hf_model = self.load_hf(torch.float32)

    def load_hf(self, dtype: torch.dtype, attention: str = "eager") -> LlamaForCausalLM:
        model = LlamaForCausalLM.from_pretrained(
            self.path, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        return model.eval()

    def tokens(self, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int64)

    def expected(self, name: str, text: str) -> Expected:
        tokens = self.tokens(text)
        return Expected(name, tokens, hf_logits(self.hf_model, tokens), self.greedy(tokens))

    def greedy(self, tokens: np.ndarray, count: int = NUM_GREEDY) -> list[int]:
        """As `generate` does it: the prompt at once, then token by token over a cache."""
        cache, answer = DynamicCache(config=self.hf_model.config), []
        named = cache_argument(self.hf_model)
        new = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            for _ in range(count):
                logits = self.hf_model(new, **{named: cache}, use_cache=True).logits
                answer.append(int(logits[0, -1].argmax()))
                new = torch.tensor([answer[-1:]])
        return answer
