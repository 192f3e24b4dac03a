"""Conversations with tools, as chat templates take them that want something special."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.server.errors import bad_request
from octavo.server.tool_calls import to_json
from octavo.server.tools import ToolFormat, Tools, writing_of

Messages = Sequence[Mapping[str, Any]]

# Phi-4-mini reads the tools from the system message, as JSON text; its authors' example has this.
_IN_MESSAGE = re.compile(r"message\[['\"]tools['\"]\]|['\"]tools['\"] in message")
_PHI_SYSTEM = {"role": "system", "content": "You are a helpful assistant with some tools."}


def fit_conversation(
    messages: Messages, tools: Tools, template: str, tool_format: ToolFormat
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, and the variables of the template that are the tools.

    A template that does not read `tool_calls` gets calls as text, in the model's format. Mistral's
    get ids of nine letters and digits. What is malformed is left as it is. Raises an ApiError for
    tools that no JSON can say.
    """
    fitted = [dict(message) for message in messages]
    for message in fitted:
        if tool_format in ("mistral", "mistral_args"):
            _shorten_ids(message)
        if message.get("tool_calls") and "tool_calls" not in template:
            _write_calls(message, tool_format)
    variables: dict[str, Any] = {"tools": tools} if tools else {}
    if tools and "xml_tools" in template:  # SmolLM3
        variables["xml_tools"] = tools
    if fitted and tools and _IN_MESSAGE.search(template):
        if fitted[0].get("role") != "system":
            fitted.insert(0, dict(_PHI_SYSTEM))
        try:
            fitted[0]["tools"] = to_json([tool["function"] for tool in tools])
        except ValueError as error:
            raise bad_request(f"tools cannot be written as JSON: {error}", "tools") from error
    return fitted, variables


def _shorten_ids(message: dict[str, Any]) -> None:
    if isinstance(message.get("tool_call_id"), str):
        message["tool_call_id"] = _short(message["tool_call_id"])
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [
            {**call, "id": _short(call["id"])}
            if isinstance(call, Mapping) and isinstance(call.get("id"), str)
            else call
            for call in calls
        ]


def _short(call_id: str) -> str:
    """The same nine letters and digits for the same id."""
    if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _write_calls(message: dict[str, Any], tool_format: ToolFormat) -> None:
    writing = writing_of(tool_format)
    written = []
    try:
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            name = to_json(name) if writing.is_quoted else name
            written.append(
                writing.before + name + writing.between + to_json(arguments) + writing.after
            )
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        return  # malformed; the chat template's checks say what
    text = writing.begins[0] + writing.separator.join(written) + writing.end
    content = message.get("content") or ""
    is_text = isinstance(content, str)
    message["content"] = content + text if is_text else [*content, {"type": "text", "text": text}]
    del message["tool_calls"]
