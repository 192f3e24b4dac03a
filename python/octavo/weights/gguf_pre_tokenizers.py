"""How byte-level BPE splits a text before it merges: llama.cpp's names and their expressions.

A GGUF file names the way of splitting (tokenizer.ggml.pre); the expressions themselves are in
llama.cpp (src/llama-vocab.cpp). They are applied one after the other: each cuts the pieces that
the ones before it left into its matches and the text between. Where llama.cpp writes an expression
in another form for its own matcher, the one of the model's tokenizer.json is used here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from octavo.errors import TokenizerError
from octavo.models.fields import describe

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str, signs: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """Llama 3's expression, with another rule for numbers, or for signs."""
    return rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|{signs}|{_SPACES}"


def _cased_words(numbers: str, suffixes: str = "") -> str:
    """A word begins with capitals or consists of them: Mistral's Nemo, and GPT-4o."""
    capitals, small = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{capitals}*{small}+{suffixes}|{first}{capitals}+{small}*{suffixes}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


# Qwen 3.5: marks belong to words.
_MARKED_WORDS = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)


@dataclass(frozen=True)
class Splitting:
    """One way of splitting.

    expressions: applied one after the other. whole_words: a word that is a token is taken whole,
    even where no merges lead to it. begins: whether a begin token comes first where the file does
    not say.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The same as a part of the tokenizers library."""
        from tokenizers import Regex, pre_tokenizers

        # The library has GPT-2's expression, and that for single digits, built in.
        built_in = self.expressions[-1] == _GPT2
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if expression == _DIGIT
            else pre_tokenizers.Split(Regex(expression), behavior="isolated")
            for expression in (self.expressions[:-1] if built_in else self.expressions)
        ]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=built_in)
        return pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level


def _table() -> Mapping[str, Splitting]:
    numbers_in_threes = _words(r"\p{N}{1,3}")
    groups: dict[Splitting, str] = {
        Splitting((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
        Splitting((_GPT2,)): "gpt-2 gpt2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion "
        "granite-docling exaone4",
        Splitting((_DIGIT, _GPT2)): "smollm starcoder refact command-r codeshell exaone "
        "minerva-7b mellum2",
        Splitting((numbers_in_threes,), whole_words=True, begins=True): "llama-bpe llama3 "
        "llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        Splitting((numbers_in_threes,)): "smaug-bpe dbrx glm4 chatglm-bpe",
        Splitting((_words(_DIGIT),)): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 "
        "hunyuan solar-open grok-2",
        Splitting((_words(_DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+"),)): "seed-coder",
        Splitting((r"\p{N}{1,3}", _words(r"\p{N}+")), whole_words=True): "minicpm5",
        Splitting((_cased_words(_DIGIT),), whole_words=True, begins=True): "tekken",
        Splitting((_cased_words(r"\p{N}{1,3}", _SUFFIXES + "?"),)): "gpt-4o llama4 kanana2",
        Splitting((_MARKED_WORDS,)): "qwen35",
        Splitting(
            (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _DIGIT)
        ): "deepseek-coder",
    }
    return MappingProxyType(
        {name: splitting for splitting, names in groups.items() for name in names.split()}
    )


SPLITTINGS = _table()


def find_splitting(metadata: Mapping[str, Any]) -> Splitting:
    """The splitting that tokenizer.ggml.pre names; TokenizerError for an unknown name.

    Files from before May 2024 do not have it. llama.cpp then takes its "default" and warns, as
    here: the model may have been trained with another, and would answer a little worse.
    """
    name = metadata.get("tokenizer.ggml.pre")
    if name is None or name == "":
        warnings.warn(
            'tokenizer.ggml.pre is missing, so that text is split as llama.cpp\'s "default" does; '
            "the model may be used to another splitting and answer worse. A newer GGUF file names "
            "it",
            stacklevel=2,
        )
        name = "default"
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {describe(name)}; supported: {', '.join(SPLITTINGS)}. Fetch "
            "the model in its Hugging Face form instead (octavo pull ORG/NAME), which brings its "
            "tokenizer"
        )
    return SPLITTINGS[name]
