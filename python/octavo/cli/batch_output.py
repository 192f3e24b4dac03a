"""The answers of a batch as objects in OpenAI's format."""

from __future__ import annotations

import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from octavo.cli.batch_input import BatchRequest

if TYPE_CHECKING:
    from octavo.engine.outputs import CompletionOutput, RequestOutput
    from octavo.text.tokenizer import Tokenizer


def error_record(custom_id: str, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """The line for a request that was not answered."""
    return {
        "id": f"batch_req_{custom_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def answer_record(
    request: BatchRequest, output: RequestOutput, model: str, tokenizer: Tokenizer, is_chat: bool
) -> dict[str, Any]:
    """The line for an answered request."""
    failed = [answer for answer in output.outputs if answer.finish_reason == "error"]
    if output.error is not None or failed or not output.outputs:
        # A refused prompt has no outputs; with outputs, the model itself failed.
        code = "model_error" if output.outputs else "invalid_request"
        return error_record(request.custom_id, output.error or "the model failed", code)
    metrics = output.metrics
    make_choice = _chat_choice if is_chat else _completion_choice
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.custom_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [make_choice(answer, tokenizer) for answer in output.outputs],
        "usage": {
            "prompt_tokens": metrics.num_prompt_tokens,
            "completion_tokens": metrics.num_output_tokens,
            "total_tokens": metrics.num_prompt_tokens + metrics.num_output_tokens,
        },
    }
    return {
        "id": f"batch_req_{request.custom_id}",
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": output.request_id, "body": body},
        "error": None,
    }


def _chat_choice(answer: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        content = []
        for entry in answer.logprobs:
            alternatives = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            top = [_token_logprob(tokenizer, *pair) for pair in alternatives]
            own = _token_logprob(tokenizer, entry.token_id, entry.logprob)
            content.append({**own, "top_logprobs": top})
        logprobs = {"content": content}
    return {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }


def _completion_choice(answer: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        tokens = [_token_text(tokenizer, entry.token_id) for entry in answer.logprobs]
        offsets = list(accumulate((len(token) for token in tokens[:-1]), initial=0))
        tops = [
            {
                _token_text(tokenizer, token): logprob
                for token, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            }
            for entry in answer.logprobs
        ]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in answer.logprobs],
            "top_logprobs": tops,
            "text_offset": offsets if tokens else [],
        }
    return {
        "index": answer.index,
        "text": answer.text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)


def _token_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = _token_text(tokenizer, token_id)
    # Half a character has bytes, but the text does not tell them any more: null, as in OpenAI's.
    data = None if "\ufffd" in text else list(text.encode("utf-8"))
    return {"token": text, "logprob": logprob, "bytes": data}
