"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

A GGUF file holds vocabulary, merges and the *name* of a way to split text (`gguf_pre_tokenizers`).
A tokenizer that splits in another way gives other token ids, and the model answers a little worse
without any error; so unknown names are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from octavo.errors import TokenizerError
from octavo.models.fields import describe
from octavo.weights.gguf_pre_tokenizers import SPLITTINGS, find_splitting

# llama.cpp's numbers for the kinds of tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


def convert_tokenizer(
    metadata: Mapping[str, Any], vocab_size: int, context_length: int
) -> dict[str, str]:
    """File name -> text of tokenizer.json and tokenizer_config.json.

    vocab_size: how many rows the embedding has; tokens may be fewer, but not more.

    Raises TokenizerError with the metadata entry that cannot be converted exactly.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = _string_list(metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise TokenizerError("tokenizer.ggml.tokens holds a token twice; expected each once")
    if len(tokens) > vocab_size:
        raise TokenizerError(
            f"tokenizer.ggml.tokens holds {len(tokens)} tokens; expected at most {vocab_size}, "
            "the rows of token_embd.weight"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise TokenizerError(
            f"tokenizer.ggml.token_type is {describe(kinds)}; expected one number for each of the "
            f"{len(tokens)} tokens"
        )
    if model == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens, kinds)
    else:
        raise TokenizerError(
            f"tokenizer.ggml.model is {describe(model)}; supported: gpt2 (byte-level BPE), llama "
            "(sentencepiece BPE)"
        )
    specials = _add_tokens(tokenizer, tokens, kinds)
    _add_bos_and_eos(tokenizer, metadata, tokens)
    # Compact, one object: the same file always gives the same text.
    config = _tokenizer_config(metadata, tokens, specials, context_length)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models

    splitting = find_splitting(metadata)
    merges = _read_merges(metadata)
    try:
        model = models.BPE(_vocabulary(tokens), merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], kinds: list[Any]) -> Any:
    """Sentencepiece's BPE, as Hugging Face writes it for Llama 2: merges by descending score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if _UNKNOWN not in kinds or kinds.count(_BYTE) != 256:
        raise TokenizerError(
            "tokenizer.ggml.token_type of a sentencepiece vocabulary needs an unknown token and "
            f"256 byte tokens; it has {kinds.count(_UNKNOWN)} and {kinds.count(_BYTE)}"
        )
    try:
        model = models.BPE(
            _vocabulary(tokens),
            _merges_of_scores(metadata, tokens, kinds),
            unk_token=tokens[kinds.index(_UNKNOWN)],
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"tokenizer.ggml.tokens make no BPE: {error}") from error
    tokenizer = Tokenizer(model)
    space = "\u2581"  # sentencepiece's sign for a space
    prefixed = _flag(metadata, "add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(space)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", space)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_of_scores(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[Any]
) -> list[tuple[str, str]]:
    """Sentencepiece joins the pair whose result scores best: every split of a token is a merge."""
    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, float) and math.isfinite(score) for score in scores)
    ):
        raise TokenizerError(
            f"tokenizer.ggml.scores is {describe(scores)}; expected one number for each token"
        )
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] != _BYTE}
    ranked = []
    for token, index in ids.items():
        if kinds[index] in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            continue
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        local = [(a, b) for a, b in splits if a in ids and b in ids]
        local.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked += [(scores[index], pair) for pair in local]
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


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[Any]) -> list[int]:
    """Tokens matched whole in the text: control tokens (special), and user-defined ones.

    Returns the ids of the special ones.
    """
    from tokenizers import AddedToken

    special = []
    # In the order of the ids: tokenizer.json lists added tokens by id.
    for index, kind in enumerate(kinds):
        if kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(tokens[index], special=False, normalized=False)])
        elif kind in (_UNKNOWN, _CONTROL):
            special.append(index)
            added = AddedToken(tokens[index], special=True, normalized=False)
            tokenizer.add_special_tokens([added])
    return special


def _add_bos_and_eos(tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Put begin and end tokens around a text, where the model was trained with them."""
    from tokenizers import processors

    # As in llama.cpp where the file does not say: Llama 2 and 3 get a begin token.
    splitting = SPLITTINGS.get(str(metadata.get("tokenizer.ggml.pre")))
    by_name = splitting is not None and splitting.begins
    usual = by_name or metadata.get("tokenizer.ggml.model") == "llama"
    ends = {"bos": _flag(metadata, "add_bos_token", usual)}
    ends["eos"] = _flag(metadata, "add_eos_token", False)
    names = {end: _special_token(metadata, end, tokens) for end, wanted in ends.items() if wanted}
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
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(head + tail)],
        )


def _tokenizer_config(
    metadata: Mapping[str, Any], tokens: list[str], special: list[int], context_length: int
) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(index): {"content": tokens[index], **plain, "special": True} for index in special
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        # The class that uses tokenizer.json unchanged; other classes of transformers rebuild the
        # splitting by their own rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = _special_token(metadata, ours, tokens)
        if token is not None:
            config[f"{theirs}_token"] = token
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        config["chat_template"] = template
    return config


def _special_token(metadata: Mapping[str, Any], kind: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(tokens):
        raise TokenizerError(
            f"tokenizer.ggml.{kind}_token_id is {describe(index)}; expected a token id below "
            f"{len(tokens)}"
        )
    return tokens[index]


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} is {describe(value)}; expected true or false")
    return value


def _string_list(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{name} is {describe(values)}; expected a list of texts")
    if not values:
        raise TokenizerError(f"{name} is empty; expected a vocabulary")
    return values


def _read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in _string_list(metadata, "tokenizer.ggml.merges"):
        parts = merge.split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {describe(merge)}; expected two parts and a space"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}
