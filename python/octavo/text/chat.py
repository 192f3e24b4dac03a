"""Chat templates: messages to the prompt that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, NoReturn

from octavo.errors import InvalidArgumentError, TokenizerError
from octavo.folder import Folder, FolderFile, as_folder
from octavo.text.tokenizer import read_json, read_tokenizer_config, token_content

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
NAMED_TEMPLATES = "additional_chat_templates"  # a folder: NAME.jinja
# How messages with calls of tools are given: whether their content is none, and the arguments text.
_CALL_FORMS = tuple(product((False, True), (False, True)))


@dataclass(eq=False, repr=False)
class ChatTemplate:
    """A Jinja template in the dialect of Hugging Face, rendered in a sandbox.

    Templates come with the model, so they are foreign code: they run in Jinja's immutable
    sandbox, see plain data only, and reach neither files nor Python's internals.

    source: the template. special_tokens: bos_token, eos_token … as the template sees them. origin:
    what error messages call the template: the file it came from. with_tools: the template for
    messages with tools, where the model has another one for them.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    origin: str = field(default="the chat template", kw_only=True)
    with_tools: ChatTemplate | None = field(default=None, kw_only=True)

    @classmethod
    def load(cls, path: Folder | str, name: str = "default") -> ChatTemplate | None:
        """The template of a model's directory; None where there is none (a base model).

        Looked for as transformers does: chat_template.jinja (with more of them, by name, in
        additional_chat_templates/), then tokenizer_config.json (one string, or a list of named
        ones), then the older chat_template.json. Beside the default, the one named tool_use is for
        messages with tools.
        """
        directory = as_folder(path)
        config = read_tokenizer_config(directory)
        templates, origin = _find_templates(directory, config)
        if not templates:
            return None
        if name not in templates:
            raise TokenizerError(
                f"{origin} has no chat template named {name!r}; it has "
                f"{', '.join(sorted(templates))}"
            )
        tokens = special_tokens(config)
        with_tools = None
        if name == "default" and "tool_use" in templates:
            with_tools = cls(templates["tool_use"], special_tokens=tokens, origin=origin)
        return cls(templates[name], special_tokens=tokens, origin=origin, with_tools=with_tools)

    @property
    def source_with_tools(self) -> str:
        """The template for messages with tools."""
        return (self.with_tools or self).source

    def render(
        self, messages: Sequence[Message], /, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt for `messages`; encode it with add_special_tokens=False.

        messages: dicts with a "role" and a "content": a string, or a list of text parts as in
        OpenAI's API, which are joined by newlines. add_generation_prompt: end where the
        assistant's answer begins. extra: more variables for the template (tools, a date).
        Raises InvalidArgumentError for messages that are malformed, TokenizerError where the
        template fails or refuses them.
        """
        if self.with_tools is not None and extra.get("tools") is not None:
            return self.with_tools._render(messages, add_generation_prompt, extra)
        return self._render(messages, add_generation_prompt, extra)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, extra: Mapping[str, Any]
    ) -> str:
        import jinja2

        variables = {
            **self.special_tokens,
            "tools": None,
            "documents": None,
            **extra,
            "messages": check_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            variables["messages"] = self._fit_calls(variables)
            return self._template.render(variables)
        except TokenizerError:
            raise
        except _Refusal as error:
            raise TokenizerError(
                f"the chat template refuses these messages: {error} ({self.origin})"
            ) from error
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{self.origin} fails: {error}") from error
        except Exception as error:  # whatever a filter or an operator raised
            raise TokenizerError(
                f"{self.origin} fails on these messages: {type(error).__name__}: {error}"
            ) from error

    def _fit_calls(self, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages in the first form in which this template writes every call of tools.

        Some write a call only where the content is none, and add its arguments to a text, as
        DeepSeek-R1's. The calls are marked for a trial. A template that knows no calls gets the
        first form. One that does may leave out those of earlier turns; if it writes a call of the
        last turn in no form, that is a TokenizerError.
        """
        messages: list[dict[str, Any]] = variables["messages"]
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        calls, num_old = [], 0
        for index, message in enumerate(messages):
            calls += message.get("tool_calls", ())
            num_old = len(calls) if index < max(turns, default=0) else num_old
        if not calls or "tool_calls" not in self.source:
            return messages
        marks = [f"octavo_call_{number}_" for number in range(len(calls))]
        best, most = None, -1
        for form in _CALL_FORMS:
            with suppress(Exception):
                trial = _in_form(messages, *form, marks)
                prompt = self._template.render({**variables, "messages": trial})
                written = [mark in prompt for mark in marks]
                if all(written[num_old:]) and sum(written) > most:
                    best, most = form, sum(written)
            if most == len(calls):
                break
        if best is not None:
            return _in_form(messages, *best)
        self._template.render(variables)  # raises what keeps it from writing anything
        names = ", ".join(call["function"]["name"] for call in calls)
        raise TokenizerError(
            f"{self.origin} leaves out a call of tools in these messages (they call {names}); "
            "expected a template that writes all: leave the calls out, or give another template"
        )

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"{self.origin} is malformed at line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, jinja2.TemplateError) as error:
            raise TokenizerError(f"{self.origin} cannot be compiled: {error}") from error


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token … of a tokenizer_config.json, by the names that templates use."""
    return {
        key: content
        for key, value in config.items()
        if key.endswith("_token") and (content := token_content(value)) is not None
    }


class _Refusal(Exception):
    """What a template says with raise_exception."""


def _refuse(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's answer for training; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages of OpenAI's API as a chat template takes them.

    The content becomes a string. The arguments of calls become objects. A field that is null, and
    "tool_calls" without a call, are left out, since templates ask only whether a field is there.
    Raises an InvalidArgumentError that names what is wrong.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgumentError(
            f"messages is {type(messages).__name__}; expected a list of "
            '{"role": ..., "content": ...} objects'
        )
    if not messages:
        raise InvalidArgumentError("messages is empty; expected at least one message")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _kind(value: object) -> str:
    """A value in an error: its type, and itself only where it is empty; it may be what was said."""
    is_empty = value is None or (isinstance(value, (str, list, tuple, dict)) and not value)
    return repr(value) if is_empty else type(value).__name__


def _check_message(where: str, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidArgumentError(
            f'{where} is {type(message).__name__}; expected {{"role": ..., "content": ...}}'
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidArgumentError(
            f"{where} has the role {_kind(role)}; expected system, user, assistant or another "
            "string"
        )
    plain = {name: value for name, value in message.items() if value is not None}
    if plain.get("function_call"):
        raise InvalidArgumentError(
            f"{where} has a function_call, OpenAI's old form of a call; expected tool_calls"
        )
    calls = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = _check_calls(f"{where}.tool_calls", calls)
    content = plain.get("content")
    if not content and role not in ("system", "developer", "user"):  # a call, or nothing to say
        content = ""
    return {**plain, "content": _check_content(f"{where}.content", content)}


def _check_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidArgumentError(f"{where} is {_kind(calls)}; expected a list of objects")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidArgumentError(
                f"{where}[{index}] has no name of a function; expected "
                '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            )
        arguments = _read_arguments(f"{where}[{index}]", function.get("arguments"))
        plain = {name: value for name, value in call.items() if value is not None}
        checked.append({**plain, "function": {**function, "arguments": arguments}})
        checked[-1].setdefault("type", "function")  # some templates write it
    return checked


def _read_arguments(where: str, arguments: Any) -> Any:
    """The arguments of a call, which OpenAI's API writes as the text of a JSON object."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} has arguments that are no JSON: {error}") from error


def _in_form(
    messages: Sequence[Message], no_content: bool, as_text: bool, marks: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Messages as `check_messages` returns them, those with calls in one of _CALL_FORMS.

    marks: names of the calls for a trial, one each; also their only argument.
    """
    names, formed = iter(marks), []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function, mark = dict(call["function"]), next(names, None)
            if mark is not None:
                function |= {"name": mark, "arguments": {mark: mark}}
            if as_text and not isinstance(function["arguments"], str):
                function["arguments"] = _to_json(function["arguments"])
            calls.append({**call, "function": function})
        changes = {"tool_calls": calls, **({"content": None} if no_content else {})}
        formed.append({**message, **(changes if calls else {})})
    return formed


_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def _check_content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise InvalidArgumentError(f"{where} is {_kind(content)}; expected a string")
    texts: list[str] = []
    for index, part in enumerate(content):
        text, kind = part, type(part).__name__
        if isinstance(part, Mapping):
            given = part.get("type")
            kind = given if isinstance(given, str) else _kind(given)
            text = part.get(_TEXT_PARTS.get(kind))
        if not isinstance(text, str):
            raise InvalidArgumentError(
                f"{where}[{index}] is of type {kind!r}; octavo's models read text parts only: "
                '{"type": "text", "text": ...}'
            )
        texts.append(text)
    return "\n".join(texts)


def _find_templates(directory: Folder, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Name -> source, and the file they came from (its name for messages)."""
    file = directory / "chat_template.jinja"
    named: list[FolderFile] = [*(directory / NAMED_TEMPLATES).glob("*.jinja")]
    if file.is_file() or named:
        templates: dict[Any, Any] = {p.stem: _read_text(p) for p in sorted(named, key=str)}
        if file.is_file():
            templates["default"] = _read_text(file)
        return templates, str(file)
    file = directory / "tokenizer_config.json"
    found = config.get("chat_template")
    if found is None and (directory / "chat_template.json").is_file():
        file = directory / "chat_template.json"
        found = read_json(file).get("chat_template")
    origin = f"{file} (chat_template)"
    if found is None:
        return {}, origin
    if isinstance(found, str):
        return {"default": found}, origin
    templates = dict(found) if isinstance(found, Mapping) else {}
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, Mapping):
            name = entry.get("name")
            templates[name if isinstance(name, str) else None] = entry.get("template")
    if not templates or not all(isinstance(t, str) for pair in templates.items() for t in pair):
        raise TokenizerError(
            f"{origin} is {type(found).__name__}; expected a string, or a list of "
            '{"name": ..., "template": ...}'
        )
    return templates, origin


def _read_text(path: FolderFile) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
