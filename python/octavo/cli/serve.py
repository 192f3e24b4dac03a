"""`octavo serve`: a model behind OpenAI's API."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.common import (
    DeviceOption,
    DTypeOption,
    EventLogOption,
    KeepEmbeddingOption,
    KVDTypeOption,
    LoadFormatOption,
    MaxModelLenOption,
    NumThreadsOption,
    QuantizeOption,
)
from octavo.errors import InvalidArgumentError
from octavo.files import check_writable

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.llm import LLM

_LISTEN, _BATCH, _LIMITS, _LOG = "Listen", "Batching and memory", "Limits", "Log"
_ANSWERS = "Answers"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Name of a pulled model (smollm2-135m), ORG/NAME, a folder with a Hugging "
            "Face model, or a GGUF file. Left out: smollm2-135m, fetched on first use.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 0.0.0.0 lets other machines in: set a key then.",
            rich_help_panel=_LISTEN,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on. 0: any free one.", rich_help_panel=_LISTEN)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Clients must present this key; may be given several times. Left out: "
            "OCTAVO_API_KEY, which other users of this machine cannot see, or no key.",
            show_default=False,
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model; may be given several times. Left out: its name.",
            show_default=False,
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let web pages from there use the API, as in https://example.org, or * for all.",
            show_default=False,
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option(help="Most answers computed at a time.", rich_help_panel=_BATCH),
    ] = 64,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            help="Most tokens in a step. Smaller: long prompts disturb running answers less. "
            "Larger: long prompts are done sooner.",
            rich_help_panel=_BATCH,
        ),
    ] = 512,
    num_kv_blocks: Annotated[
        int | None,
        typer.Option(
            help="Size of the KV cache, in blocks of 16 tokens. Left out: by --kv-memory-fraction.",
            show_default=False,
            rich_help_panel=_BATCH,
        ),
    ] = None,
    kv_memory_fraction: Annotated[
        float,
        typer.Option(
            help="Part of the free memory that the KV cache may take.", rich_help_panel=_BATCH
        ),
    ] = 0.5,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep computed prompts, for later ones that begin alike.",
            rich_help_panel="Prefix cache",
        ),
    ] = True,
    max_model_len: MaxModelLenOption = None,
    dtype: DTypeOption = "auto",
    kv_dtype: KVDTypeOption = "auto",
    quantize: QuantizeOption = None,
    keep_embedding: KeepEmbeddingOption = False,
    device: DeviceOption = "auto",
    num_threads: NumThreadsOption = 0,
    load_format: LoadFormatOption = "auto",
    seed: Annotated[
        int, typer.Option(help="Of requests that name none.", rich_help_panel=_ANSWERS)
    ] = 0,
    generation_config: Annotated[
        str,
        typer.Option(
            help="auto: what requests leave out is as the model's generation_config.json "
            "recommends (temperature, top_p …). none: as OpenAI's API has it.",
            metavar="auto|none",
            rich_help_panel=_ANSWERS,
        ),
    ] = "auto",
    tool_call_parser: Annotated[
        str,
        typer.Option(
            help="How the model writes calls of tools. auto: as its chat template says.",
            metavar="auto|hermes|llama3_json|none",
            rich_help_panel=_ANSWERS,
        ),
    ] = "auto",
    trust_request_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--trust-request-chat-template/--no-trust-request-chat-template",
            help="Take chat templates from requests; they are programs, run in a sandbox without a "
            "limit of time. Left out: only on 127.0.0.1 or with --api-key.",
            show_default=False,
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    max_waiting_requests: Annotated[
        int,
        typer.Option(
            help="Most requests in the queue; one more gets status 429.", rich_help_panel=_LIMITS
        ),
    ] = 512,
    max_waiting_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most prompt tokens in the queue. Left out: any number.",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which any request ends with status 504. Left out: never, but for "
            "requests that ask for it.",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(help="Largest request; status 413 beyond.", rich_help_panel=_LIMITS)
    ] = 4 << 20,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that running answers get to end after SIGTERM or Ctrl-C; a second "
            "signal stops at once.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30.0,
    stall_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without a step, while there is work, until /health says so.",
            rich_help_panel=_LIMITS,
        ),
    ] = 60.0,
    event_log: EventLogOption = None,
    log_format: Annotated[
        str,
        typer.Option(
            help="text, json (a line an event), or auto: text on a terminal.",
            metavar="auto|json|text",
            rich_help_panel=_LOG,
        ),
    ] = "auto",
) -> int:
    """Serve a model over HTTP with OpenAI's API: for its clients, and for your browser.

    Then open http://127.0.0.1:8000 to chat and to watch the engine, or from Python:

    openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    """
    from octavo.config import EngineConfig, read_environment
    from octavo.server.options import ServerOptions, read_defaults
    from octavo.weights.hub import resolve_model

    environment = read_environment()
    config = EngineConfig(
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # EngineConfig checks it
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        quantize=quantize,  # type: ignore[arg-type]
        keep_embedding=keep_embedding,
        load_format=load_format,  # type: ignore[arg-type]
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_kv_blocks=num_kv_blocks,
        kv_memory_fraction=kv_memory_fraction,
        enable_prefix_caching=enable_prefix_caching,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
        num_threads=num_threads,
        seed=seed,
    )
    keys = tuple(api_key or ([environment.api_key] if environment.api_key else ()))
    names = tuple(served_model_name or ())
    options = ServerOptions(
        host=host,
        port=port,
        api_keys=keys,
        served_names=names or ("model",),
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        stall_timeout=stall_timeout,
        tool_parser=tool_call_parser,
        trust_request_chat_template=trust_request_chat_template,
        allowed_origins=tuple(allowed_origin or ()),
        event_log=event_log,
        log_format=log_format,
    )
    if generation_config not in ("auto", "none"):
        raise InvalidArgumentError(
            f"--generation-config is {generation_config!r}; expected auto or none"
        )
    if event_log is not None:
        check_writable(event_log, "the event log")
    path = resolve_model(model, environment)
    options = replace(
        options,
        served_names=names or (model if model else path.name,),
        defaults=read_defaults(path) if generation_config == "auto" else {},
    )
    from octavo.server.serving import serve as run_server

    run_server(options, partial(_load, path, config))
    return 0


def _load(path: Path, config: EngineConfig) -> LLM:
    """The model; long loading says how far it is in the server's log."""
    from octavo.llm import LLM
    from octavo.server.logs import log_event
    from octavo.weights.progress import log_bytes

    write = partial(log_event, logging.getLogger("octavo.server"), logging.INFO)
    return LLM(path, config=config, on_load=log_bytes(write, f"loading {path.name}"))
