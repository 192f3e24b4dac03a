"""`octavo embed`: texts in, the vectors of an embedding model out."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from octavo.cli import common
from octavo.cli.answer_json import print_json
from octavo.cli.batch_input import text_of
from octavo.cli.options import AdapterOption, ModelOption, argument, engine_options, option, tried
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError, TokenizerError
from octavo.files import reading, write_bytes, write_text

if TYPE_CHECKING:
    from octavo.engine.pooling import EmbeddingRequestOutput
    from octavo.llm import LLM

_ENDINGS = (".jsonl", ".npy")


class Text(NamedTuple):
    """A text, and what error messages call it."""

    place: str
    text: str


@engine_options("runner", "max_num_seqs", without=("speculative_config",))
def embed(
    texts: Annotated[
        list[str] | None,
        argument("What to embed; left out: the lines of --input or stdin.", "TEXT…"),
    ] = None,
    *,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    input_file: Annotated[
        Path | None,
        option(
            "A file with a text on each line. One of several lines is a JSON string.",
            *("--input", "-i"),
            metavar="FILE",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "Write to NAME.jsonl or NAME.npy. The latter is an array of float32 for NumPy, a row "
            "for each text. Left out: JSON lines on stdout.",
            *("--output", "-o"),
            **tried("the vectors"),
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        option(
            "The first N numbers of each vector only. For models that were trained for it "
            "(Matryoshka).",
            metavar="N",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        option(
            "Divide vectors by their lengths, or do not. Left out: as the model's files say.",
            "--normalize/--no-normalize",
        ),
    ] = None,
    config: EngineConfig,
    quiet: Annotated[bool, option("No bar and no messages, only errors.", "--quiet", "-q")] = False,
) -> int:
    """Make vectors of texts, with an embedding model.

    Each text gets a line of JSON: its index from 0, the text, how many tokens it has, and its
    "embedding". If one is empty, or longer than the model takes, that is an error and nothing is
    computed. Nothing is put before a text: write the instruction there that the model wants.

    [bold]octavo embed -m ORG/NAME "What is an octavo?"[/bold]

    [bold]octavo embed -m ORG/NAME -i texts.txt -o vectors.npy[/bold]
    """
    if output is not None and output.suffix not in _ENDINGS:
        raise InvalidArgumentError(
            f"--output is {str(output)!r}; expected a name that ends with {' or '.join(_ENDINGS)}"
        )
    if model is None and config.runner != "pooling":
        raise InvalidArgumentError(
            "no embedding model is named; expected -m MODEL, or --runner pooling, which takes a "
            "model of texts, such as smollm2-135m, as one of embeddings"
        )
    given = _read(texts or [], input_file)
    adapters = {adapter: adapter} if adapter else None
    llm = common.load_llm(model, config, adapters, quiet=quiet, needs="vectors")
    prompts = _encode(llm, given)
    outputs = llm.embed(
        prompts, dimensions=dimensions, normalize=normalize, adapter=adapter, progress=not quiet
    )
    _write(given, outputs, output)
    if not quiet:
        tokens = common.count(sum(map(len, prompts)), "token")
        numbers = common.count(outputs[0].embedding.size, "number")
        common.note(f"{common.count(len(given), 'text')} · {tokens} · {numbers} each")
    return 0


def _read(words: Sequence[str], path: Path | None) -> list[Text]:
    """The texts; InvalidArgumentError for none, or an empty one, FileError for what is no UTF-8."""
    if words and path is not None:
        raise InvalidArgumentError(
            "texts are given, and --input as well; expected one of the two: leave one out"
        )
    if words:
        found = [
            Text(f"text {number}", common.decoded(word)) for number, word in enumerate(words, 1)
        ]
    else:
        name = "standard input" if path is None else str(path)
        lines = _lines(path, name)
        found = [Text(f"line {number} of {name}", text_of(line)) for number, line in lines]
    if not found:
        raise InvalidArgumentError(
            "there is no text; expected some behind the command, or one on each line of --input or "
            "of standard input"
        )
    for place, text in found:
        if not text.strip():
            raise InvalidArgumentError(f"{place} is empty; expected a text: leave it out")
    return found


def _lines(path: Path | None, name: str) -> list[tuple[int, str]]:
    """The lines with their numbers from 1."""
    if path is None and sys.stdin.isatty():
        common.note("Type a text a line, then Ctrl-D:")
    with reading(name, "texts in UTF-8, one a line"):
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        content = data.decode("utf-8").removeprefix("\ufeff")
    lines = content.removesuffix("\n").split("\n") if content else []
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1)]


def _encode(llm: LLM, texts: Sequence[Text]) -> list[Sequence[int]]:
    """The token ids of each; an error names the one that cannot be embedded."""
    from octavo.engine.pooling import EMBED

    found = []
    for place, text in texts:
        try:
            found.append(llm.encode_prompt(text).token_ids)
            llm.engine.check_request(found[-1], EMBED)
        except (InvalidArgumentError, TokenizerError) as error:
            raise type(error)(f"{place}: {error}") from error
    return found


def _write(
    texts: Sequence[Text], outputs: Sequence[EmbeddingRequestOutput], path: Path | None
) -> None:
    if path is not None and path.suffix == ".npy":
        import numpy as np

        content = io.BytesIO()
        np.save(content, np.stack([each.embedding for each in outputs]))
        write_bytes(path, "the vectors", content.getvalue())
        return
    records: list[dict[str, Any]] = [
        {
            "index": index,
            "text": text,
            "tokens": len(output.prompt_token_ids),
            "embedding": output.embedding.tolist(),
        }
        for index, ((_, text), output) in enumerate(zip(texts, outputs, strict=True))
    ]
    if path is None:
        for record in records:
            print_json(record)
        return
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, "the vectors", "".join(lines))
