"""The items of a response's input as the messages of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.server.errors import bad_request

_ROLES = ("user", "assistant", "system", "developer")
# Parts that are texts, and the field that has the text.
_PARTS = {
    **dict.fromkeys(
        ("input_text", "output_text", "text", "reasoning_text", "summary_text"), "text"
    ),
    "refusal": "refusal",
}


class Talk:
    """A conversation that grows by items.

    A system message may stand at the beginning only, for many chat templates: those of the
    beginning, the instructions among them, are put together, and a developer's is a system
    message. What a model has thought, said and called in one turn is one message.

    messages: as a chat template has them. places: for each of them, and for each call in them, the
    field that it came from.
    """

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: dict[str, str] = {}
        if instructions:
            self._add({"role": "system", "content": instructions}, "instructions")

    def add(self, item: Mapping[str, Any], place: str) -> None:
        """Go on with an item of the input. place: its field, for errors."""
        takers: dict[Any, Callable[[Mapping[str, Any], str], None]] = {
            "message": self._take_message,
            "reasoning": self._take_thought,
            "function_call": self._take_call,
            "function_call_output": self._take_result,
        }
        kind = item.get("type") or ("message" if "role" in item else None)
        taker = takers.get(kind) if isinstance(kind, str) else None
        if taker is None:
            advice = "leave it out"
            if kind == "item_reference":
                advice = "nothing is stored here, so send the item itself"
            raise bad_request(
                f"{place} is of type {kind!r}; expected one of {', '.join(takers)}: {advice}", place
            )
        taker(item, place)

    def _add(self, message: dict[str, Any], place: str) -> None:
        self.places[f"messages[{len(self.messages)}]"] = place
        self.messages.append(message)

    def _take_message(self, item: Mapping[str, Any], place: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise bad_request(
                f"{place}.role is {role!r}; expected one of {', '.join(_ROLES)}", f"{place}.role"
            )
        text = text_of(item.get("content"), f"{place}.content")
        if role == "assistant":
            turn = self._turn(place, "content")
            turn["content"] = text
            return
        role = "system" if role == "developer" else role
        is_beginning = all(message["role"] == "system" for message in self.messages)
        if role == "system" and self.messages and is_beginning:
            self.messages[0]["content"] += f"\n\n{text}"
            return
        self._add({"role": role, "content": text}, place)

    def _take_thought(self, item: Mapping[str, Any], place: str) -> None:
        name = "content" if item.get("content") else "summary"
        text = text_of(item.get(name) or [], f"{place}.{name}")
        if text:  # what only another server can read says nothing here
            self._turn(place, "reasoning", "content", "tool_calls")["reasoning"] = text

    def _take_call(self, item: Mapping[str, Any], place: str) -> None:
        call_id, name, arguments = (
            _string(item, field, place) for field in ("call_id", "name", "arguments")
        )
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        calls = self._turn(place).setdefault("tool_calls", [])
        self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = place
        calls.append(call)

    def _take_result(self, item: Mapping[str, Any], place: str) -> None:
        call_id = _string(item, "call_id", place)
        text = text_of(item.get("output"), f"{place}.output")
        self._add({"role": "tool", "tool_call_id": call_id, "content": text}, place)

    def _turn(self, place: str, *parts: str) -> dict[str, Any]:
        """The model's turn that goes on; a new one where it has one of these parts already."""
        last = self.messages[-1] if self.messages else {"role": None}
        if last["role"] == "assistant" and all(last.get(part) is None for part in parts):
            return last
        self._add({"role": "assistant", "content": None}, place)
        return self.messages[-1]


def text_of(content: Any, place: str) -> str:
    """A text, or a list of parts that are texts, as one; place: its field, for errors."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found = "null or missing" if content is None else f"of type {type(content).__name__}"
        raise bad_request(f"{place} is {found}; expected a text, or a list of parts", place)
    return "\n".join(_text_of_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _text_of_part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    field = _PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise bad_request(
            f"{place} is of type {kind!r}, but this server reads texts only: leave it out, or send "
            'its text as {"type": "input_text", "text": …}',
            place,
        )
    return _string(part, field, place)


def _string(item: Mapping[str, Any], field: str, place: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        found = "null or missing" if value is None else f"of type {type(value).__name__}"
        raise bad_request(f"{place}.{field} is {found}; expected a text", f"{place}.{field}")
    return value
