"""The tokenizer of a Hugging Face directory, over the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError, OctavoError, TokenizerError
from octavo.folder import Folder, FolderFile, as_folder
from octavo.text.decoders import Pipeline, PipelineFactory

if TYPE_CHECKING:
    import tokenizers

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")


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
            raise TokenizerError(
                f"{directory} holds no tokenizer.json; expected a Hugging Face directory with a "
                "fast tokenizer (transformers writes one with tokenizer.save_pretrained)"
            )
        content = read_json(self.path)
        if "model" not in content:
            raise TokenizerError(f'{self.path}: no "model" field; this is not a tokenizer.json')
        self.config = read_tokenizer_config(directory)
        with self._errors_named():
            self._tokenizer = _load(self.path)
            named = self._add_special_tokens()
            added = self._tokenizer.get_added_tokens_decoder()
        self._pipelines = PipelineFactory(content.get("decoder"), str(self.path))
        self._token_bytes: dict[tuple[int, bool], bytes] = {}  # of those that were asked for
        self.bos_token: str | None = named.get("bos_token")
        self.eos_token: str | None = named.get("eos_token")
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; the model's embedding may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.bos_token)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end of text; a model's generation_config.json may name more."""
        eos = self.token_id(self.eos_token)
        return () if eos is None else (eos,)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `skip_special_tokens` leaves out."""
        return self._special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: apply the post-processor (BOS, where the model has one). Leave it off
        for text that came out of a chat template, which writes its own. The names of special
        tokens within `text` are special tokens, as in transformers.
        """
        _check_text(text)
        with self._errors_named():
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of many texts at once, on several threads."""
        for text in texts:
            _check_text(text)
        with self._errors_named():
            encodings = self._tokenizer.encode_batch(
                list(texts), add_special_tokens=add_special_tokens
            )
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside of the vocabulary are left out.

        Exactly what a `StreamDecoder` gives for the same ids one by one. Bytes that are no valid
        UTF-8 become U+FFFD.
        """
        pipeline = self.pipeline()
        pieces = []
        for token_id in token_ids:
            if skip_special_tokens and token_id in self._special_ids:
                continue
            token = self.token(token_id)
            if token is not None:
                pieces.append(pipeline.push(token))
        pieces.append(pipeline.finish())
        return "".join(pieces)

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        """The bytes that a token brings to a text: whole characters, or parts of one.

        at_start: it is the first of the text, so that sentencepiece drops a leading space. b"" for
        an id that the vocabulary does not have.
        """
        found = self._token_bytes.get((token_id, at_start))
        if found is None:
            pipeline = self._pipelines.create(at_start=at_start, errors="surrogateescape")
            token = self.token(token_id)
            text = "" if token is None else pipeline.push(token) + pipeline.finish()
            found = text.encode("utf-8", errors="surrogateescape")
            self._token_bytes[token_id, at_start] = found
        return found

    def pipeline(self, *, at_start: bool = True) -> Pipeline:
        """Fresh decoders for one stream of tokens."""
        return self._pipelines.create(at_start=at_start)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None for an id that it does not have."""
        if token_id < 0:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def token_id(self, token: str | None) -> int | None:
        """The id of a token as the vocabulary spells it; None where there is none."""
        return None if token is None else self._tokenizer.token_to_id(token)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn what the library raises about a damaged file into a TokenizerError."""
        try:
            yield
        except OctavoError:
            raise
        except BaseException as error:
            # A panic of the Rust library derives from BaseException; nothing else may be caught.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"{self.path} is not a tokenizer that the tokenizers library reads: {error}; fetch "
                "the file again"
            ) from error

    def _add_special_tokens(self) -> dict[str, str]:
        """Make sure of the tokens that tokenizer_config.json declares; name -> content."""
        import tokenizers

        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        declared = self.config.get("added_tokens_decoder")
        if isinstance(declared, Mapping):
            numbered = {int(i): fields for i, fields in declared.items() if i.isdecimal()}
            for _, fields in sorted(numbered.items()):
                token = _added_token(fields)
                if token is not None and token.content not in known:
                    self._tokenizer.add_tokens([token])
        named = {}
        for name in _NAMED_TOKENS:
            content = token_content(self.config.get(name))
            if content is not None:
                named[name] = content
        extra: list[str] = []
        for key in _EXTRA_TOKENS:
            values = self.config.get(key)
            values = list(values.values()) if isinstance(values, Mapping) else values
            values = values if isinstance(values, list) else []
            extra.extend(filter(None, (token_content(value) for value in values)))
        special = [
            tokenizers.AddedToken(content, special=True, normalized=False)
            for content in dict.fromkeys([*named.values(), *extra])
        ]
        if special:
            self._tokenizer.add_special_tokens(special)
        return named


def read_tokenizer_config(directory: Folder) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json; {} where neither is there.

    The older file counts, and then wins, only where the newer one lists no added tokens: as in
    transformers 5.
    """
    config: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        config = read_json(directory / "tokenizer_config.json")
    older = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.is_file():
        config = {**config, **read_json(older)}
    return config


def read_json(path: FolderFile) -> dict[str, Any]:
    """A JSON object from a file; a TokenizerError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def _load(path: FolderFile) -> tokenizers.Tokenizer:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_content(value: Any) -> str | None:
    """A token is written as a string or as an object with a "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_token(fields: Any) -> tokenizers.AddedToken | None:
    import tokenizers

    content = token_content(fields)
    if content is None:
        return None
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    options = {flag: bool(fields[flag]) for flag in flags if flag in fields}
    return tokenizers.AddedToken(content, **options)


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
