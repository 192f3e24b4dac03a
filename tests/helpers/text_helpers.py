"""Small tokenizers in the three styles that Llama-family models use, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The capital of France is Paris. The quick brown fox jumps over the lazy dog, twice.",
    "def add(left, right):\n    return left + right  # 1 + 2 = 3\n",
    "Äpfel, Öl und Übermut: naïve café, 12.345,67 €",
    "人工智能是计算机科学的一个分支。人人生而自由,在尊严和权利上一律平等。",
    "Once upon a time there was a little ship; the ship was called the Paris of the seas.",
] * 3

# Strings that are hard in one way or another; every text test runs over all of them.
HARD_STRINGS = [
    "",
    " ",
    "   three spaces before and two after  ",
    "Hello, world!",
    "1234567890 3.14159 -1e-5 0x1F",
    'for i in range(10):\n\tprint(f"{i:03d}")\r\n',
    "人工智能是计算机科学的一个分支",
    "🎉🎊 party 👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇫🇷",
    "naïve café e\u0301 (combining) ﬁ ½",
    "\x00\x01\x1b[0m\x7f control",
    "<|im_start|>user\nhi<|im_end|>",
    "<s> </s> <unk> <0x41> <0xE4>",
    "\u2581 lower one eighth block \u2581\u2581",
    "\ufffd replacement \ufeff bom \u200b zero width",
    "مرحبا بالعالم שלום עולם",
    "a" * 300,
    "\n\n\n\n  \n\t\t ",
    "\U0010ffff\U0001f9ff",
]


def write_config(directory: Path, **config: Any) -> None:
    """tokenizer_config.json with these fields."""
    text = json.dumps(config, ensure_ascii=False, indent=1)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def byte_level_directory(directory: Path, **config: Any) -> Path:
    """Digits one by one, then byte-level BPE, as SmolLM2; ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # One added token that is no special token, with a space and an emoji in it.
    tokenizer.add_tokens([AddedToken("<tool call 🎉>", normalized=False)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write_config(directory, **{**fields, **config})
    return directory


def sentencepiece_directory(directory: Path, **config: Any) -> Path:
    """Llama 2's style: U+2581 for spaces, byte fallback, a leading space that decoding drops."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=160, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [word for word, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "normalized": False, "special": True}
    fields = {"bos_token": "<s>", "eos_token": eos}
    write_config(directory, **{**fields, **config})
    return directory


def metaspace_directory(directory: Path, **config: Any) -> Path:
    """Unigram with a Metaspace decoder, T5's style, seen in some small Llamas."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0)]
    words = sorted({word for text in CORPUS for word in text.split()})
    pieces += [("\u2581" + word, -4.0 - index / 100) for index, word in enumerate(words)]
    known = {piece for piece, _ in pieces}
    letters = sorted({letter for text in CORPUS for letter in text} - known)
    pieces += [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_config(directory, **{"eos_token": "</s>", **config})
    return directory


STYLES = {
    "byte_level": byte_level_directory,
    "sentencepiece": sentencepiece_directory,
    "metaspace": metaspace_directory,
}

# A Llama-3-like and a ChatML-like template, written for these tests.
LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nYear: ' + date_string + '\n' + system }}
{{- '<|eot_id|>' }}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- endfor %}
{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

CHATML_TEMPLATE = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
Answer briefly; today's words: {{ ["ä", "<b>", 1] | tojson }}.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""


def tiny_model(
    directory: Path, chat_template: str | None = CHATML_TEMPLATE, context: int = 256
) -> Path:
    """A Llama of 47 thousand parameters for `--load-format dummy`: config.json and a tokenizer."""
    fields = {} if chat_template is None else {"chat_template": chat_template}
    byte_level_directory(directory, **fields)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512},
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        **{"max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32"},
        **{"bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False},
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
