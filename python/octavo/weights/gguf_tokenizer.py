"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

A GGUF file holds vocabulary, merges and the *name* of a way to split text (`gguf_pre_tokenizers`).
A tokenizer that splits in another way gives other token ids, and the model answers a little worse
without any error; so unknown names are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import TokenizerError
from octavo.models.fields import describe
from octavo.weights.gguf_pre_tokenizers import SPLITTINGS, find_splitting

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# llama.cpp's numbers for the kinds of tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
# Texts of the tokens that end a text, a turn or a message, by which llama.cpp finds them.
_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "< EOT >", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
    )
)


class Vocabulary:
    """The entries tokenizer.ggml.* of a file, checked.

    metadata: of the file. tokens: by id. kinds: llama.cpp's number for the kind of each; what ends
    an answer is a control token, whatever the file says. added: by id, the tokens that are matched
    whole in a text, as the tokenizers library describes them.
    """

    def __init__(self, metadata: Mapping[str, Any], vocab_size: int) -> None:
        """vocab_size: how many rows the embedding has; tokens may be fewer, but not more.

        Raises TokenizerError with the entry that cannot be used.
        """
        self.metadata = metadata
        self.tokens = tokens = _string_list(metadata, "tokenizer.ggml.tokens")
        self.ids = {token: index for index, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            raise TokenizerError("tokenizer.ggml.tokens holds a token twice; expected each once")
        if len(tokens) > vocab_size:
            raise TokenizerError(
                f"tokenizer.ggml.tokens holds {len(tokens)} tokens; expected at most {vocab_size}, "
                "the rows of token_embd.weight"
            )
        kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise TokenizerError(
                f"tokenizer.ggml.token_type is {describe(kinds)}; expected one number for each of "
                f"the {len(tokens)} tokens"
            )
        ends = find_ends(metadata)
        self.kinds = kinds = [_CONTROL if i in ends else kind for i, kind in enumerate(kinds)]
        self.added = {
            index: self._describe(index)
            for index, kind in enumerate(kinds)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        }

    def _describe(self, index: int) -> dict[str, Any]:
        """A token that is matched whole: control tokens are special, user-defined ones are not.

        A file does not say which blanks a token takes with it. In Phi-3's vocabulary all take
        those behind them, but for three (llama.cpp knows it by its name too).
        """
        token, metadata = self.tokens[index], self.metadata
        names = f"{metadata.get('general.architecture')} {metadata.get('general.name')}".lower()
        is_phi3 = metadata.get("tokenizer.ggml.model") == "llama" and re.search("phi[- ]?3", names)
        return {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": bool(is_phi3) and token not in ("<unk>", "<s>", "<|endoftext|>"),
            "single_word": False,
            "special": self.kinds[index] != _USER_DEFINED,
        }

    def special_token(self, kind: str) -> str | None:
        """The token for "bos", "eos", ...; None where the file names none."""
        index = self.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or isinstance(index, bool) or index not in range(self.size):
            raise TokenizerError(
                f"tokenizer.ggml.{kind}_token_id is {describe(index)}; expected a token id below "
                f"{self.size}"
            )
        return self.tokens[index]

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def flag(self, name: str, default: bool) -> bool:
        """A true or false of the metadata."""
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise TokenizerError(
                f"tokenizer.ggml.{name} is {describe(value)}; expected true or false"
            )
        return value


def find_ends(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end an answer, found by their texts as llama.cpp finds them.

    Few files name them: tokenizer.ggml.eos_token_id is often the end of a text, not of a turn.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    texts = enumerate(tokens if isinstance(tokens, list) else ())
    found = {token: i for i, token in texts if isinstance(token, str) and token in _ENDS}
    eos, kinds = (metadata.get(f"tokenizer.ggml.{n}") for n in ("eos_token_id", "token_type"))
    index = found.get("</s>")
    if index not in (None, eos) and isinstance(kinds, list) and _USER_DEFINED in kinds[index:][:1]:
        del found["</s>"]  # Gemma's: a tag of HTML
    if {"<|return|>", "<|call|>"} <= found.keys():
        found.pop("<|end|>", None)  # gpt-oss: a message ends, and the answer goes on
    return list(found.values())


def make_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer; TokenizerError with the metadata entry that cannot be converted exactly."""
    model = vocabulary.metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level_bpe(vocabulary)
    elif model == "llama":
        tokenizer = _sentencepiece_bpe(vocabulary)
    else:
        raise TokenizerError(
            f"tokenizer.ggml.model is {describe(model)}; supported: gpt2 (byte-level BPE), llama "
            "(sentencepiece BPE)"
        )
    _add_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary)
    return tokenizer


def make_config(vocabulary: Vocabulary, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json."""
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(index): token for index, token in vocabulary.added.items() if token["special"]
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        # The class that uses tokenizer.json unchanged; other classes of transformers rebuild the
        # splitting by their own rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = vocabulary.special_token(ours)
        if token is not None:
            config[f"{theirs}_token"] = token
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        others = _named_templates(vocabulary.metadata)
        default = {"name": "default", "template": template}
        config["chat_template"] = [default, *others] if others else template
    return config


def _named_templates(metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """Those beside the default, as tokenizer_config.json lists them."""
    prefix = "tokenizer.chat_template."
    return [
        {"name": key.removeprefix(prefix), "template": source}
        for key, source in metadata.items()
        if key.startswith(prefix) and isinstance(source, str)
    ]


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    splitting = find_splitting(vocabulary.metadata)
    merges = _read_merges(vocabulary.metadata)
    try:
        model = models.BPE(vocabulary.ids, merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(vocabulary: Vocabulary) -> Tokenizer:
    """Sentencepiece's BPE, as Hugging Face writes it for Llama 2: merges by descending score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    kinds = vocabulary.kinds
    if _UNKNOWN not in kinds or kinds.count(_BYTE) != 256:
        raise TokenizerError(
            "tokenizer.ggml.token_type of a sentencepiece vocabulary needs an unknown token and "
            f"256 byte tokens; it has {kinds.count(_UNKNOWN)} and {kinds.count(_BYTE)}"
        )
    try:
        model = models.BPE(
            vocabulary.ids,
            _merges_of_scores(vocabulary),
            unk_token=vocabulary.tokens[kinds.index(_UNKNOWN)],
            fuse_unk=True,
            byte_fallback=True,
        )
    except TokenizerError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"tokenizer.ggml.tokens make no BPE: {error}") from error
    tokenizer = Tokenizer(model)
    space = "\u2581"  # sentencepiece's sign for a space
    prefixed = vocabulary.flag("add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(space)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", space)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Sentencepiece joins the pair whose result scores best: every split of a token is a merge.

    Tokens that are unused (padding to the size of the embedding) are no results and no parts.
    """
    scores = vocabulary.metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != vocabulary.size
        or set(map(type, scores)) - {float}
        or not all(map(math.isfinite, scores))
    ):
        raise TokenizerError(
            f"tokenizer.ggml.scores is {describe(scores)}; expected one number for each token"
        )
    kinds = vocabulary.kinds
    ids = {token: i for token, i in vocabulary.ids.items() if kinds[i] not in (_BYTE, _UNUSED)}
    id_of = ids.get  # up to a million times: hence plain steps
    ranked: list[tuple[float, tuple[str, str]]] = []
    for token, index in ids.items():
        if kinds[index] in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            continue
        splits = []
        for cut in range(1, len(token)):
            left = id_of(token[:cut])
            if left is not None:
                right = id_of(token[cut:])
                if right is not None:
                    splits.append((left, right, (token[:cut], token[cut:])))
        splits.sort()
        ranked += [(scores[index], pair) for _, _, pair in splits]
    _check_scores(ranked)
    ranked.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in ranked]


def _check_scores(ranked: list[tuple[float, tuple[str, str]]]) -> None:
    """Refuse a score that two tokens share: the order of their merges would be unknown.

    Runs of one character may share a score, as runs of spaces do in Llama 2's vocabulary:
    sentencepiece then merges from the left, which gives the same runs in any order.
    """
    by_score: dict[float, str] = {}
    for score, (left, right) in ranked:
        token = left + right
        other = by_score.setdefault(score, token)
        if other != token and len({*other, *token}) > 1:
            raise TokenizerError(
                f"tokenizer.ggml.scores gives {other!r} and {token!r} the same score {score:g}, "
                "so the order of their merges is not known; supported: a score of its own for "
                "each token that is not a run of one character"
            )


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken

    # In one call: each one builds the search for all of them anew.
    tokenizer.add_tokens([AddedToken(**token) for token in vocabulary.added.values()])


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Put begin and end tokens around a text, where the model was trained with them."""
    from tokenizers import processors

    metadata = vocabulary.metadata
    # As in llama.cpp where the file does not say: Llama 2 and 3 get a begin token.
    splitting = SPLITTINGS.get(str(metadata.get("tokenizer.ggml.pre")))
    by_name = splitting is not None and splitting.begins
    usual = by_name or metadata.get("tokenizer.ggml.model") == "llama"
    ends = {"bos": vocabulary.flag("add_bos_token", usual)}
    ends["eos"] = vocabulary.flag("add_eos_token", False)
    names = {end: vocabulary.special_token(end) for end, wanted in ends.items() if wanted}
    for end, token in names.items():
        if token is None:
            raise TokenizerError(
                f"tokenizer.ggml.add_{end}_token is on, but tokenizer.ggml.{end}_token_id is "
                "missing"
            )
    if names:
        head = [str(names["bos"])] if "bos" in names else []
        tail = [str(names["eos"])] if "eos" in names else []
        second = [f"{part}:1" for part in (*head, "$B", *tail)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*head, "$A", *tail],
            pair=[*head, "$A", *tail, *second],
            special_tokens=[(token, vocabulary.ids[token]) for token in dict.fromkeys(head + tail)],
        )


def _string_list(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(name)
    if not isinstance(values, list) or set(map(type, values)) - {str}:
        raise TokenizerError(f"{name} is {describe(values)}; expected a list of texts")
    if not values:
        raise TokenizerError(f"{name} is empty; expected a vocabulary")
    return values


def _read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    texts = _string_list(metadata, "tokenizer.ggml.merges")
    for merge in texts:
        if merge.count(" ") != 1 or merge[0] == " " or merge[-1] == " ":
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {describe(merge)}; expected two parts and a space"
            )
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in texts)]
