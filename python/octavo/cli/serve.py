"""`octavo serve`: a model behind OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from octavo.cli.common import named_adapters
from octavo.cli.options import (
    SAMPLING,
    AdaptersOption,
    EventLogOption,
    ModelArgument,
    engine_options,
    grouped,
    option,
)
from octavo.config import EngineConfig, check_choice, read_environment

_listen = partial(option, panel="Listen")
_limits = partial(option, panel="Limits")
_formats = partial(option, panel="Formats")


@dataclass(frozen=True)
class Listening:
    """Where the server is, for whom, and under which names."""

    host: Annotated[
        str,
        option(
            "Address to listen on. 0.0.0.0 lets other machines in: set a key then.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on. 0: any free one.", metavar="N")] = 8000
    api_key: Annotated[
        list[str] | None,
        option(
            "Clients must present this key. May be given several times. Left out: OCTAVO_API_KEY, "
            "which other users of this machine cannot see, or no key.",
            metavar="KEY",
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        option(
            "What clients call the model. May be given several times. Left out: its name.",
            metavar="NAME",
        ),
    ] = None
    allowed_origin: Annotated[
        list[str] | None,
        _listen("Let web pages from there use the API, as in https://example.org, or * for all."),
    ] = None
    trust_request_chat_template: Annotated[
        bool | None,
        _listen(
            "Take chat templates from requests; they are programs, run in a sandbox without a "
            "limit of time. Left out: only on 127.0.0.1 or with --api-key."
        ),
    ] = None


@dataclass(frozen=True)
class Limits:
    """How much a request may ask for, and how long things may take."""

    request_timeout: Annotated[
        float | None,
        _limits(
            "Seconds after which any request ends with status 504. Left out: never, but for "
            "requests that ask for it."
        ),
    ] = None
    max_body_bytes: Annotated[int, _limits("Largest request; status 413 beyond.")] = 4 << 20
    shutdown_timeout: Annotated[
        float,
        _limits(
            "Seconds that running answers get to end after SIGTERM or Ctrl-C; a second signal "
            "stops at once."
        ),
    ] = 30.0
    stall_timeout: Annotated[
        float,
        _limits("Seconds without a step, while there is work, until /health says so."),
    ] = 60.0


@dataclass(frozen=True)
class Formats:
    """What requests leave out, calls of tools, and the server's log."""

    generation_config: Annotated[
        str,
        option(
            "auto: what requests leave out is as the model's generation_config.json recommends "
            "(temperature, top_p …). none: as OpenAI's API has it.",
            panel=SAMPLING,
            metavar="auto|none",
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        str,
        _formats(
            "How the model writes calls of tools. auto: as its chat template says. none: calls are "
            "not looked for. NAME: hermes, llama3_json, mistral, pythonic, olmo3, qwen3_coder, "
            "granite, phi4_mini_json, deepseek_v3, deepseek_v31, or another of vLLM's names for "
            "one of these.",
            metavar="auto|none|NAME",
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        _formats(
            "How the model writes what it thinks before it answers. auto: as its chat template "
            "says. none: it is left in the answer.",
            metavar="auto|qwen3|deepseek_r1|mistral|none",
        ),
    ] = "auto"
    log_format: Annotated[
        str,
        _formats(
            "Of the log: text, json (a line an event), or auto: text on a terminal.",
            metavar="auto|json|text",
        ),
    ] = "auto"


@engine_options(
    "runner",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_kv_blocks",
    "kv_memory_fraction",
    "enable_prefix_caching",
    "max_adapters",
    "max_waiting_requests",
    "max_waiting_tokens",
    "seed",
    max_waiting_requests=512,
)
@grouped
def serve(
    *,
    model: ModelArgument = None,
    listening: Listening,
    adapter: AdaptersOption = None,
    config: EngineConfig,
    formats: Formats,
    limits: Limits,
    event_log: EventLogOption = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, and a page for your browser.

    Then open http://127.0.0.1:8000 to chat and to watch the engine, or from Python:

    openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

    [bold]octavo serve smollm2-135m --port 8000[/bold]
    """
    from octavo.server.options import ServerOptions, read_defaults
    from octavo.weights.hub import resolve_model

    environment = read_environment()
    keys = tuple(listening.api_key or ([environment.api_key] if environment.api_key else ()))
    names = tuple(listening.served_model_name or ())
    options = ServerOptions(
        host=listening.host,
        port=listening.port,
        api_keys=keys,
        served_names=names or ("model",),
        trust_request_chat_template=listening.trust_request_chat_template,
        allowed_origins=tuple(listening.allowed_origin or ()),
        tool_parser=formats.tool_call_parser,
        reasoning_parser=formats.reasoning_parser,
        log_format=formats.log_format,
        event_log=event_log,
        **vars(limits),
    )
    check_choice("--generation-config", formats.generation_config, ("auto", "none"))
    path = resolve_model(model, environment)
    options = replace(
        options,
        served_names=names or (model if model else path.name,),
        defaults=read_defaults(path) if formats.generation_config == "auto" else {},
    )
    from octavo.server.application import load_logged
    from octavo.server.serving import serve as run_server

    adapters = named_adapters(adapter, options.served_names)
    run_server(options, partial(load_logged, path, config, adapters))
