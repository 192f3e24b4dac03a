"""The tokenizer of a Hugging Face directory, over the `tokenizers` library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from octavo.errors import InvalidArgumentError, OctavoError, TokenizerError
from octavo.files import check_is_no_pointer
from octavo.folder import Folder, FolderFile, MemoryFolder, as_folder
from octavo.text.decoders import PipelineFactory

_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# Files of tokenizers in other forms: sentencepiece's or tiktoken's, Mistral's, GPT-2's.
_OTHER_FORMS = ("tokenizer.model", "tekken.json", "vocab.json")


class Tokenizer:
    """Text to token ids and back, with the ids that transformers gives for the same directory.

    Reads tokenizer.json, tokenizer_config.json and, in older directories,
    special_tokens_map.json. Whether `encode` puts a BOS token first is what the post-processor of
    tokenizer.json says; `add_bos_token` and `add_eos_token` of tokenizer_config.json are ignored
    beside a tokenizer.json, as in transformers 5.
    """

    def __init__(self, path: Folder | str) -> None:
        """path: the model's directory. Raises TokenizerError naming the file and the cause."""
        directory = as_folder(path)
        self.path = directory / "tokenizer.json"
        if not self.path.is_file():
            others = [name for name in _OTHER_FORMS if (directory / name).is_file()]
            raise TokenizerError(
                f"{directory} holds no tokenizer.json"
                + (f", but {' and '.join(others)}, which octavo does not read" if others else "")
                + "; expected the tokenizer in Hugging Face's form. transformers writes it, from "
                "other forms too (for some it asks for sentencepiece and protobuf, or "
                "mistral-common):\n    from transformers import AutoTokenizer\n"
                f"    AutoTokenizer.from_pretrained({str(directory)!r})"
                f".save_pretrained({str(directory)!r})"
            )
        self.config = read_tokenizer_config(directory)
        with self._errors_named():
            self._tokenizer, decoder = self._open(directory)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            named = self._add_special_tokens()
            added = self._tokenizer.get_added_tokens_decoder()
            self._warn_of_wrong_splitting(directory)
        # Makes fresh decoders for one stream of tokens.
        self.pipeline = PipelineFactory(decoder, str(self.path)).create
        self._token_bytes: dict[tuple[int, bool], bytes] = {}  # of those that were asked for
        self.bos_token, self.eos_token = named["bos_token"], named["eos_token"]
        self.bos_token_id, eos = self.token_id(self.bos_token), self.token_id(self.eos_token)
        # The tokenizer's own end of text; a model's generation_config.json may name more.
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        # Those that `skip_special_tokens` leaves out.
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; the model's embedding may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token as it is spelled, added ones included, and its id; made anew."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: apply the post-processor (BOS, where the model has one). Leave it off
        for text that came out of a chat template, which writes its own. The names of special
        tokens within `text` are special tokens, as in transformers.
        """
        _check_text(text)
        with self._errors_named():
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside of the vocabulary are left out.

        Exactly what a `StreamDecoder` gives for the same ids one by one. Bytes that are no valid
        UTF-8 become U+FFFD.
        """
        pipeline = self.pipeline()
        skipped = self.special_ids if skip_special_tokens else ()
        tokens = (self.token(token_id) for token_id in token_ids if token_id not in skipped)
        pieces = [pipeline.push(token) for token in tokens if token is not None]
        return "".join(pieces) + pipeline.finish()

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        """The bytes that a token brings to a text: whole characters, or parts of one.

        at_start: it is the first of the text, so that sentencepiece drops a leading space. b"" for
        an id that the vocabulary does not have.
        """
        found = self._token_bytes.get((token_id, at_start))
        if found is None:
            found = self.bytes_of(token_id, at_start=at_start)
            self._token_bytes[token_id, at_start] = found
        return found

    def bytes_of(self, token_id: int, *, at_start: bool = False) -> bytes:
        """As `token_bytes`, and not kept: for one pass over all tokens."""
        pipeline = self.pipeline(at_start=at_start, errors="surrogateescape")
        token = self.token(token_id)
        text = "" if token is None else pipeline.push(token) + pipeline.finish()
        return text.encode("utf-8", errors="surrogateescape")

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None for an id that it does not have."""
        if token_id < 0:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def token_id(self, token: str | None) -> int | None:
        """The id of a token as the vocabulary spells it; None where there is none."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def _open(self, directory: Folder) -> tuple[Any, Any]:
        """The library's tokenizer, and the "decoder" field of its tokenizer.json."""
        import tokenizers

        if isinstance(directory, MemoryFolder) and directory.make_tokenizer is not None:
            made = directory.make_tokenizer()
            decoder = made.decoder
            return made, None if decoder is None else json.loads(decoder.__getstate__())
        content = read_json(self.path)
        if "model" not in content:
            raise TokenizerError(f'{self.path}: no "model" field; this is not a tokenizer.json')
        return tokenizers.Tokenizer.from_buffer(self.path.read_bytes()), content.get("decoder")

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn what the library raises about a damaged file into a TokenizerError."""
        try:
            yield
        except OctavoError:
            raise
        except BaseException as error:
            # A panic of the Rust library derives from BaseException; no other kind may be caught.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"{self.path} is not a tokenizer that the tokenizers library reads: {error}; fetch "
                "the file again"
            ) from error

    def _add_special_tokens(self) -> dict[str, str | None]:
        """Add the tokens that tokenizer_config.json declares; returns name -> content.

        As in transformers, the flags of a token are those of added_tokens_decoder, else those of
        tokenizer.json, else those that are written beside its name. What has a name is special.
        """
        import tokenizers

        added = self._tokenizer.get_added_tokens_decoder().values()
        known = {token.content: {flag: getattr(token, flag) for flag in _FLAGS} for token in added}
        declared = self.config.get("added_tokens_decoder")
        entries = declared.items() if isinstance(declared, Mapping) else ()
        numbered = {int(i): value for i, value in entries if i.isdecimal()}
        of_decoder = {
            content: _flags(value)
            for _, value in sorted(numbered.items())
            if (content := token_content(value)) is not None
        }
        found = dict(of_decoder)
        for value in map(self.config.get, _NAMED_TOKENS):
            content = token_content(value)
            if content is not None:
                flags = of_decoder.get(content, known.get(content, _flags(value)))
                found[content] = {**flags, "special": True}
        for key in _EXTRA_TOKENS:
            values = self.config.get(key)
            values = list(values.values()) if isinstance(values, Mapping) else values
            for value in values if isinstance(values, list) else ():
                content = token_content(value)
                if content is not None and content not in known:
                    found.setdefault(content, {**_flags(value), "special": True})
        self._tokenizer.add_tokens(
            [
                tokenizers.AddedToken(content, **flags)
                for content, flags in found.items()
                if flags != known.get(content)
            ]
        )
        return {name: token_content(self.config.get(name)) for name in _NAMED_TOKENS}

    def _warn_of_wrong_splitting(self, directory: Folder) -> None:
        """Some Mistral models were published with Llama 3's way of splitting a text."""
        config, splitting = directory / "config.json", self._tokenizer.pre_tokenizer
        if self.vocab_size <= 100_000 or splitting is None or not config.is_file():
            return
        is_mistral = read_json(config).get("model_type") in ("mistral", "ministral")
        if is_mistral and rb"\p{N}{1,3}" in splitting.__getstate__():
            warnings.warn(
                f"{self.path} splits digits in threes, as Llama 3's tokenizer; expected Mistral's "
                "way of splitting, with which the model was trained. Its tokens are those of the "
                "file, as in transformers, and answers may be worse: take a newer revision of the "
                "model, or save the tokenizer with "
                "AutoTokenizer.from_pretrained(..., fix_mistral_regex=True)",
                stacklevel=4,
            )


def holds_tokenizer(directory: Folder) -> bool:
    """Whether a model's directory has a tokenizer, be it in a form that `Tokenizer` refuses."""
    return any((directory / name).is_file() for name in ("tokenizer.json", *_OTHER_FORMS))


def read_tokenizer_config(directory: Folder) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json; {} where neither is there.

    The older file counts, and then wins, only where the newer one lists no added tokens: as in
    transformers 5.
    """
    file, older = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    config = read_json(file) if file.is_file() else {}
    if "added_tokens_decoder" not in config and older.is_file():
        config |= read_json(older)
    return config


def read_json(path: FolderFile) -> dict[str, Any]:
    """A JSON object from a file; a TokenizerError names the file and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        check_is_no_pointer(path, text[:8].encode(), TokenizerError)
        content = json.loads(text)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def token_content(value: Any) -> str | None:
    """A token is written as a string or as an object with a "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _flags(value: Any) -> dict[str, bool]:
    """The flags that are written beside a token's content."""
    is_object = isinstance(value, Mapping)
    return {flag: bool(value[flag]) for flag in _FLAGS if is_object and flag in value}


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InvalidArgumentError(f"a text is {type(text).__name__}; expected str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"the text holds a lone surrogate at character {error.start}, which is no valid "
            "Unicode; decode the input with errors='replace'"
        ) from error
