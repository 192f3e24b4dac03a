"""Options of the server: frozen and validated."""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.errors import InvalidArgumentError
from octavo.server.answers import Markup
from octavo.server.reasoning import REASONING
from octavo.server.tools import PARSERS, format_of

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOOL_PARSERS = ("auto", "none", *PARSERS)
REASONING_PARSERS = ("auto", "none", *REASONING)
LOG_FORMATS = ("auto", "json", "text")


@dataclass(frozen=True)
class ServerOptions:
    """How to serve a model that `EngineConfig` says how to run.

    host, port: where to listen; port 0 takes a free one.
    api_keys: a client must present one of these; none: no key is asked for.
    served_names: what clients may call the model; the first is the one that answers give.
    max_body_bytes: a larger request is refused with status 413.
    request_timeout: seconds after which every request ends, whatever its own `timeout` says; None
        lets it run.
    shutdown_timeout: seconds that running requests get to end after SIGTERM.
    stall_timeout: seconds without a step, while there is work, after which /health says so.
    tool_parser: how calls of tools are written in answers; "auto" goes by the chat template.
    reasoning_parser: how what the model thinks is told from its answer, in the same way.
    trust_request_chat_template: take a chat template from a request, and run it; None: only if
        every client has a key or is on this machine.
    allowed_origins: web pages from there may use the API (CORS); "*" for any.
    defaults: sampling fields of requests that do not name them, such as the model's own.
    event_log: a file for every decision of the scheduler.
    log_format: "json" (a line of JSON an event), "text", or "auto": text on a terminal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ("model",)
    max_body_bytes: int = 4 << 20
    request_timeout: float | None = None
    shutdown_timeout: float = 30.0
    stall_timeout: float = 60.0
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    trust_request_chat_template: bool | None = None
    allowed_origins: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    event_log: Path | None = None
    log_format: str = "auto"

    def __post_init__(self) -> None:
        def check(name: str, is_right: bool, expected: str) -> None:
            if not is_right:
                raise InvalidArgumentError(
                    f"{name} is {getattr(self, name)!r}; expected {expected}"
                )

        for name in ("api_keys", "served_names", "allowed_origins"):  # a text has items, too
            check(name, not isinstance(getattr(self, name), str), "a list of texts")
        check("port", 0 <= self.port <= 65535, "0 (any) to 65535")
        check("max_body_bytes", self.max_body_bytes >= 1, "1 or more")
        if not all(self.api_keys):
            raise InvalidArgumentError("an API key is empty; expected some text, or no key at all")
        if not all(key.isascii() for key in self.api_keys):
            raise InvalidArgumentError("an API key has a character beyond ASCII: HTTP forbids it")
        names = self.served_names
        check("served_names", bool(names) and all(names), "at least one name, none empty")
        check("shutdown_timeout", 0 <= self.shutdown_timeout < math.inf, "0 seconds or more")
        check("stall_timeout", 1 <= self.stall_timeout < math.inf, "1 seconds or more")
        limit = self.request_timeout
        check("request_timeout", limit is None or 0 < limit < math.inf, "seconds above 0, or None")
        for name, choices in (
            ("tool_parser", TOOL_PARSERS),
            ("reasoning_parser", REASONING_PARSERS),
            ("log_format", LOG_FORMATS),
        ):
            check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach the server, and no key keeps them out."""
        try:
            is_here = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_here = False
        return not self.api_keys and not is_here

    @property
    def takes_templates(self) -> bool:
        """Whether requests may bring a chat template of their own."""
        trusts = self.trust_request_chat_template
        return not self.is_open if trusts is None else trusts

    def markup(self, detected: Markup) -> Markup:
        """How a model writes what is no plain text. detected: what its chat template teaches."""
        if self.tool_parser != "auto":
            parser = self.tool_parser
            tools = None if parser == "none" else format_of(parser, detected.tools)
            detected = replace(detected, tools=tools)
        if self.reasoning_parser != "auto":
            detected = replace(detected, reasoning=REASONING.get(self.reasoning_parser))
        return detected


def read_defaults(model: Path) -> dict[str, float]:
    """The sampling that a model's authors recommend: from its generation_config.json, as vLLM.

    {} for a model that has none, or a damaged file, which is an error when the model is loaded.
    """
    try:
        content = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = content if isinstance(content, dict) else {}
    return {
        name: found[name]
        for name in _RECOMMENDED
        if isinstance(found.get(name), (int, float)) and not isinstance(found[name], bool)
    }
