"""The answers of a batch as objects in OpenAI's format."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from octavo.cli.batch_input import BatchRequest

if TYPE_CHECKING:
    from octavo.engine.outputs import RequestOutput
    from octavo.llm import LLM


def error_record(custom_id: str, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """The line for a request that was not answered."""
    return {
        "id": f"batch_req_{custom_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def answer_record(
    request: BatchRequest, output: RequestOutput, model: str, llm: LLM, is_chat: bool
) -> dict[str, Any]:
    """The line for an answered request: the body is what the server would answer."""
    from octavo.server.formats import Head, usage_of

    failed = [answer for answer in output.outputs if answer.finish_reason == "error"]
    if output.error is not None or failed or not output.outputs:
        # A refused prompt has no outputs; with outputs, the model itself failed.
        code = "model_error" if output.outputs else "invalid_request"
        return error_record(request.custom_id, output.error or "the model failed", code)
    head = Head(f"{'chatcmpl' if is_chat else 'cmpl'}-{request.custom_id}", int(time.time()), model)
    answer_format = request.answer_format(llm, head, output, is_chat)
    metrics = output.metrics
    usage = usage_of(metrics.num_prompt_tokens, metrics.num_output_tokens)
    return {
        "id": f"batch_req_{request.custom_id}",
        "custom_id": request.custom_id,
        "response": {
            "status_code": 200,
            "request_id": output.request_id,
            "body": answer_format.whole([output], usage),
        },
        "error": None,
    }
