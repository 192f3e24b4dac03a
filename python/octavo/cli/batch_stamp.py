"""What an answer of a batch depends on, as digests: a resumed run compares them with its own."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from octavo.cli.batch_input import BadLine, BatchLine, BatchRequest, Defaults
from octavo.config import EngineConfig, read_environment, resolve_device
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams

_SEED = "seed_of_the_run"  # apart from a line's own "seed"
_DEFAULT_PARAMS: dict[str, Any] = asdict(SamplingParams())


@dataclass(frozen=True)
class Stamp:
    """What stands beside an answer, under "octavo".

    model, prompt: digests, 16 hexadecimal digits. options: everything else that the answer depends
    on, a JSON object with sorted names; sampling options at their default value are left out.
    """

    model: str
    prompt: str
    options: str

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Stamp | None:
        """The stamp of an answer; None where it is missing or malformed."""
        found = record.get("octavo")
        if not isinstance(found, dict):
            return None
        model, prompt, options = (found.get(name) for name in ("model", "prompt", "options"))
        if not (isinstance(model, str) and isinstance(prompt, str) and isinstance(options, dict)):
            return None
        # One copy for all answers that share it, of which there may be a million.
        return cls(sys.intern(model), prompt, sys.intern(_canonical(options)))

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "prompt": self.prompt, "options": json.loads(self.options)}

    def differences(self, now: Stamp) -> str:
        """In words: every option that has another value in `now`, and both values."""
        old, new = ({**_DEFAULT_PARAMS, **json.loads(each.options)} for each in (self, now))
        if _SEED not in old or _SEED not in new:  # one of the two is greedy
            old[_SEED] = new[_SEED] = None
        return "; ".join(
            f"{name} was {_describe(old.get(name))} and is {_describe(new.get(name))}"
            for name in sorted({*old, *new})
            if _canonical(old.get(name)) != _canonical(new.get(name))
        )


@dataclass(frozen=True)
class Run:
    """What all answers of a run have in common.

    directory, name: of the model; the name is what the answers say. digest: `model_digest`.
    options: those of the engine that change answers, "auto" resolved. chat: whether a bare
    prompt is answered rather than continued. system: goes before a bare prompt that is answered.
    seed: for random choices of lines that name none. adapters: the names of LoRA adapters that a
    line may give as its model -> their digests.
    """

    directory: Path
    name: str
    digest: str
    options: Mapping[str, Any]
    chat: bool
    system: str | None
    seed: int
    defaults: Defaults = field(default_factory=Defaults)
    adapters: Mapping[str, str] = field(default_factory=dict)

    def adapter_of(self, request: BatchRequest) -> str | None:
        """The adapter that a line names as its model; None: it has none.

        Without adapters any name stands for the model; with some, InvalidArgumentError for a name
        that is neither one's nor the model's.
        """
        name = request.body.model
        if name in self.adapters:
            return name
        if self.adapters and name and name != self.name:
            known = " or ".join(map(repr, (self.name, *self.adapters)))
            raise InvalidArgumentError(f"model is {name!r}; expected {known}, or none")
        return None

    def is_chat(self, request: BatchRequest) -> bool:
        """Whether the request is answered rather than continued."""
        return self.chat if request.is_chat is None else request.is_chat

    def stamp(self, request: BatchRequest | BadLine, line: BatchLine) -> Stamp:
        """The stamp of the answer to a request; the prompt of a bad line is its text."""
        if isinstance(request, BadLine):
            return Stamp(self.digest, _digest(line.text), _canonical(self.options))
        options = {
            name: float(value) if isinstance(_DEFAULT_PARAMS[name], float) else value
            for name, value in asdict(request.params).items()
            if value != _DEFAULT_PARAMS[name]
        }
        if request.params.temperature == 0:
            options.pop("seed", None)  # no choice is random
        elif request.params.seed is None:
            options[_SEED] = self.seed
        name = request.body.model
        if name is not None and name in self.adapters:
            options["adapter"] = f"{name}, with the digest {self.adapters[name]}"
        options["chat"] = self.is_chat(request)
        if options["chat"] and request.text is not None and self.system is not None:
            options["system"] = f"a text with the digest {_digest(self.system)}"
        return Stamp(self.digest, _digest(request.prompt), _canonical({**options, **self.options}))


def describe_run(
    model: str | None,
    config: EngineConfig,
    chat: bool | None,
    system: str | None,
    defaults: Defaults,
    adapters: Mapping[str, Path],
) -> Run:
    """Everything about a run that its answers depend on; no weights are loaded.

    model: a name or a directory. chat None: whether the model has a chat template. adapters: name
    -> folder. Raises what resolving the name and reading the configuration, the weights' headers
    and the adapters raises.
    """
    from octavo import _native
    from octavo.runtime.loader import resolve_options
    from octavo.text.chat import ChatTemplate
    from octavo.weights.adapter import read_adapter
    from octavo.weights.checkpoint import open_checkpoint
    from octavo.weights.fingerprint import adapter_digest, model_digest
    from octavo.weights.hub import DEFAULT_MODEL, resolve_model
    from octavo.weights.model_files import read_model
    from octavo.weights.pooling import refuse_embeddings

    environment = read_environment()
    directory = resolve_model(model, environment)
    files = read_model(directory)
    refuse_embeddings(files, config.runner)
    checkpoint = open_checkpoint(files, config.load_format, config.seed)
    device = resolve_device(config.device, _native.available_devices())
    resolved = resolve_options(files.spec, checkpoint.dtype, config, environment, device)
    options: dict[str, Any] = {
        "device": device,
        "dtype": resolved.dtype,
        "kv_dtype": resolved.kv_dtype,
        "max_model_len": resolved.max_model_len,
        "quantize": config.quantize,
        "keep_embedding": config.keep_embedding or None,
        # Sums of the ranks' parts are rounded in another order.
        "tensor_parallel_size": None
        if config.tensor_parallel_size == 1
        else config.tensor_parallel_size,
        # On the CPU it changes nothing.
        "deterministic": (config.deterministic and device != "cpu") or None,
    }
    if config.load_format == "dummy":
        options["load_format"] = f"dummy, of seed {config.seed}"
    if chat is None:
        has_tokenizer = (files.folder / "tokenizer.json").is_file()
        chat = has_tokenizer and ChatTemplate.load(files.folder) is not None
    if system is not None and not chat:
        raise InvalidArgumentError(
            f"--system needs a chat template, and {model or DEFAULT_MODEL} has none: leave it out"
        )
    return Run(
        directory=directory,
        name=model or DEFAULT_MODEL,
        digest=model_digest(files.folder, config.load_format),
        options={name: value for name, value in options.items() if value is not None},
        chat=chat,
        system=system,
        seed=config.seed,
        defaults=defaults,
        adapters={
            name: adapter_digest(read_adapter(folder, files, checkpoint))
            for name, folder in adapters.items()
        },
    )


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _digest(value: Any) -> str:
    # A text from a JSON line may hold half a surrogate pair, which UTF-8 does not know.
    text = _canonical(value).encode("utf-8", errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:16]


def _describe(value: Any) -> str:
    if value is None:
        return "left out"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
