"""Strings that are hard to tokenize, as many as wanted, the same in every run."""

from __future__ import annotations

import random

from text_helpers import HARD_STRINGS

CODE = [
    "def f(x: int) -> str:\n    return f'{x:>10}'  # Zahl\n",
    "#include <vector>\nint main() { return v[0]->x << 2; }",
    "SELECT * FROM t WHERE a >= 10.5 AND b != 'it''s';",
    '{"key": [1, 2.50, null, true], "πλ": "\\u00e9"}',
    "\tif [ -z \"$X\" ]; then\r\n\t\techo 'no'\r\n\tfi",
    "\\frac{\\partial^2 u}{\\partial x^2} = 0",
]
WORDS = [
    *("the", "The", "THE", "don't", "we'll", "naïve", "straße", "Ёлка", "привет", "こんにちは"),
    *("안녕하세요", "สวัสดี", "नमस्ते", "مرحبا", "人工智能", "计算机", "１２３", "42", "007", "3.14"),
    *("1,000,000", "x²", "½", "€", "https://a.b/c?d=e#f", "user@example.org", "🎉", "👩‍👩‍👧‍👦"),
    *("🏳️‍🌈", "e\u0301", "ﬁ", "\ufffd", "\u200b", "\u2581", "<|im_start|>", "<|im_end|>"),
    *("<|endoftext|>", "<repo_name>", "<|im_start", "<s>", "</s>", "<0x0A>", "[INST]", "\x00"),
    *("\x1b[31m", "\x7f", "<|eot_id|>", "<|begin_of_text|>", "<|end|>", "<|user|>", "<bos>"),
    *("<start_of_turn>", "<end_of_turn>", "[/INST]", "[TOOL_CALLS]", "<think>", "</tool_call>"),
]
BLANKS = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "    ", "", "\u3000", "\u00a0", " \n "]


def varied_strings(count: int, seed: int = 20_240) -> list[str]:
    """Code, digits, scripts, emoji, control characters, runs of white space, special tokens.

    Also marks that combine with the letter before them, and text that was decoded wrongly.
    """
    generator = random.Random(seed)
    strings = [*HARD_STRINGS, *CODE]
    while len(strings) < count:
        kind = generator.randrange(6)
        if kind == 0:  # words with any blanks between
            parts = [
                generator.choice(WORDS) + generator.choice(BLANKS)
                for _ in range(generator.randrange(1, 30))
            ]
        elif kind == 1:  # any characters, weighted towards the planes that occur
            planes = [(0, 0x80), (0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x1F300, 0x1FAFF)]
            ranges = [generator.choice(planes) for _ in range(generator.randrange(1, 40))]
            parts = [chr(generator.randrange(*bounds)) for bounds in ranges]
        elif kind == 2:  # numbers
            parts = [
                str(generator.randrange(10 ** generator.randrange(1, 15)))
                + generator.choice([".", ",", " ", "-", "e", "%\n"])
                for _ in range(generator.randrange(1, 12))
            ]
        elif kind == 3:  # letters under several marks, in an order that NFC changes
            marks = [chr(generator.randrange(0x300, 0x370)) for _ in range(12)]
            parts = [
                generator.choice("aeoAEÅ각かव\u1100\u1161 ")
                + "".join(generator.sample(marks, generator.randrange(4)))
                for _ in range(generator.randrange(1, 20))
            ]
        elif kind == 4:  # bytes of a text with some lost, and UTF-8 read as Latin-1
            data = bytearray("".join(generator.choices(WORDS, k=6)).encode())
            del data[generator.randrange(len(data))]
            lost = bytes(data).decode(errors="replace")
            parts = [lost, generator.choice(BLANKS), bytes(data[:20]).decode("latin-1")]
        else:  # pieces of code with the indentation shifted
            lines = generator.choice(CODE).splitlines(keepends=True)
            parts = [generator.choice(BLANKS) + line for line in lines]
        strings.append("".join(parts))
        if len(strings) == count:
            strings = list(dict.fromkeys(strings))
    return strings
