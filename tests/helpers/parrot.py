"""A model that answers as it is told: its next token follows from the last token alone.

One layer whose attention and MLP are zero, the identity as embedding and a head that is the chain
itself. Its logits, and so its log-probabilities, are known numbers. Its tokenizer has the 256 bytes
and the added tokens that a chain names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GO, END = "<go>", "<end>"  # where an answer begins in TEMPLATE, and the model's end of text
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}" + GO
LOGIT = 20.0  # of a token that is sure to come; of all others it is 0
_EPSILON = 1e-5

Chain = Mapping[str, str | Mapping[str, float]]


def write_parrot(
    folder: Path,
    chain: Chain,
    *,
    special: Sequence[str] = (),
    template: str | None = TEMPLATE,
    eos: Sequence[str] = (END,),
    context: int = 2048,
    **tokenizer_config: Any,
) -> Path:
    """Write the model's files into `folder`, which is made, and return it.

    chain: token -> the next one, or -> {next token: logit} where several may come. A token is a
    byte as `byte_tokens` spells it, or any other string, which becomes an added token; after a
    token that the chain does not name all logits are 0. special: which added tokens are special,
    besides GO, END and `eos`. template: the chat template, None for none. context: the most
    positions. tokenizer_config: more fields of tokenizer_config.json.
    """
    nexts = {now: {then: LOGIT} if isinstance(then, str) else then for now, then in chain.items()}
    tokenizer = _tokenizer([GO, END, *eos, *special], [*nexts, *_flat(nexts.values())])
    ids = tokenizer.get_vocab()
    width = -(-len(ids) // 64) * 64
    scale = 1 / math.sqrt(1 / width + _EPSILON)  # what the norm makes of a row of the identity
    head = np.zeros((width, width), np.float32)
    for now, thens in nexts.items():
        for then, logit in thens.items():
            head[ids[then], ids[now]] = logit / scale
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_weights(head), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": width},
        **{"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
        **{"max_position_embeddings": context, "rms_norm_eps": _EPSILON, "rope_theta": 10000.0},
        **{"tie_word_embeddings": False, "eos_token_id": [ids[token] for token in eos]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    fields = {"eos_token": eos[0], **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, **tokenizer_config}))
    return folder


def say(*tokens: str, after: str = GO, end: str = END) -> dict[str, str]:
    """A chain that says these tokens after `after`, each of which may come once, and ends."""
    steps = [after, *tokens, end]
    if len(set(steps)) != len(steps):
        raise ValueError(f"{steps} has a token twice, so what follows it is not known")
    return dict(pairwise(steps))


def byte_tokens(content: bytes) -> list[str]:
    """How the vocabulary spells each of these bytes (GPT-2's letters for bytes)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte if byte in plain else 256 + others.index(byte)) for byte in content]


def _tokenizer(special: Sequence[str], named: Sequence[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for text in dict.fromkeys(special):
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    for text in dict.fromkeys(named):
        if text not in alphabet and text not in special:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    return tokenizer


def _flat(nexts: Any) -> list[str]:
    return [token for thens in nexts for token in thens]


def _weights(head: np.ndarray) -> dict[str, np.ndarray]:
    width = head.shape[0]
    shapes = {
        **{"self_attn.q_proj": (64, width), "self_attn.k_proj": (64, width)},
        **{"self_attn.v_proj": (64, width), "self_attn.o_proj": (width, 64)},
        **{"mlp.gate_proj": (32, width), "mlp.up_proj": (32, width), "mlp.down_proj": (width, 32)},
    }
    weights = {f"layers.0.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        weights[name] = np.ones(width, np.float32)
    weights["embed_tokens"] = np.eye(width, dtype=np.float32)
    named = {f"model.{name}.weight": weight for name, weight in weights.items()}
    return {**named, "lm_head.weight": head}
