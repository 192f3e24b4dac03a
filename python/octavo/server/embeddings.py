"""POST /v1/embeddings, as OpenAI and vLLM have it: the body, its prompts, and the answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from octavo.engine.outputs import RequestOutput
from octavo.engine.pooling import EMBED, Float32, embedding_of
from octavo.errors import InvalidArgumentError, OctavoError
from octavo.models.pooling import Pooling
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server.errors import bad_request, to_api_error
from octavo.server.fields import check_extra_fields
from octavo.server.formats import WholeFormat, to_json
from octavo.server.protocol import PromptBody, Prompts

if TYPE_CHECKING:
    from octavo.model import LoadedModel

_BEFORE = "write it before each text, as the model's description says"
# Fields of other servers that would change the vectors, and that are not offered.
_ELSEWHERE = {
    "prompt": "its name here is input",
    "messages": "use input",
    **dict.fromkeys(("input_type", "prompt_name", "task_type", "instruction"), _BEFORE),
    "output_dimension": "its name here is dimensions",
    "embedding_types": "use encoding_format",
}


class EmbeddingBody(PromptBody):
    """POST /v1/embeddings."""

    prompt_field: ClassVar[str] = "input"

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    normalize: bool | None = None
    add_special_tokens: bool = True
    stream: Literal[False] | None = None


def read_input(
    model: LoadedModel, body: EmbeddingBody
) -> list[tuple[EncodedPrompt, SamplingParams]]:
    """The prompts, one or many, each of which could be embedded; an ApiError names the bad one."""
    check_extra_fields(body.model_extra or {}, _ELSEWHERE)
    given: Any = body.input
    is_one = isinstance(given, str) or isinstance(given[0], int)
    try:
        model.need_pooling(body.dimensions)
    except InvalidArgumentError as error:
        raise to_api_error(error, "dimensions") from error
    work = []
    for index, each in enumerate([given] if is_one else given):
        place = "input" if is_one else f"input[{index}]"
        if not each:
            raise bad_request(f"{place} is empty; expected a text, or token ids", place)
        try:
            prompt = model.encode_prompt(each, body.add_special_tokens)
            model.engine.check_request(prompt.token_ids, EMBED)  # reads only what never changes
        except OctavoError as error:
            raise to_api_error(error, place) from error
        work.append((prompt, EMBED))
    return work


class EmbeddingFormat(WholeFormat):
    """The list of vectors. name: what the model is called."""

    def __init__(self, body: EmbeddingBody, name: str, pooling: Pooling) -> None:
        self._body, self._name, self._pooling = body, name, pooling

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """One object a prompt, in the prompts' order; usage: of the prompts alone."""
        wanted = (self._pooling, self._body.dimensions, self._body.normalize)
        vectors = [embedding_of(each, *wanted) for each in results]
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        counts = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
        return {"object": "list", "data": data, "model": self._name, "usage": counts}

    async def text(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> str:
        """Beside the event loop, since a million numbers take a second; others get their turns."""

        def write() -> str:
            body = self.whole(results, usage)
            entries = ",".join(map(to_json, body["data"]))  # one by one: each keeps Python's lock
            return to_json({**body, "data": []}).replace("[]", f"[{entries}]", 1)

        return await asyncio.to_thread(write)

    def _encoded(self, vector: Float32) -> list[float] | str:
        """base64: of the numbers as float32, the lowest byte first."""
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode("ascii")
        return list(map(float, vector))
