"""Replicas of a model behind one address, by Ray Serve (docs/replicas.md).

    serve run octavo.server.ray_serve:replicas model=smollm2-135m num_replicas=2

Ray starts the replicas on the machines of its cluster, sends each request to one of them, starts
more or fewer of them by the load, and starts one anew that has failed.
"""

# (No annotations of the future: Ray reads the class of `replicas`' argument from them.)
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter
from ray import serve
from ray.util.metrics import Gauge

from octavo.config import EngineConfig
from octavo.errors import EngineStepError, InvalidArgumentError
from octavo.server.application import Application
from octavo.server.metrics import Metrics

_log = logging.getLogger("octavo.server")


class Replicas(BaseModel):
    """What `serve run` and `serve deploy` take; all other names are fields of `EngineConfig`.

    model: a pulled model, ORG/NAME, a folder or a GGUF file, the same on every machine.
    num_replicas: how many; "auto": by the load, as `deployment` says.
    adapters: LoRA adapters, name: folder. server: fields of `ServerOptions`.
    deployment: more arguments of Ray's `serve.deployment`, which win over those of this module.
    """

    model_config = ConfigDict(extra="allow")
    model: str
    num_replicas: int | Literal["auto"] = 1
    adapters: dict[str, str] = {}
    server: dict[str, Any] = {}
    deployment: dict[str, Any] = {}


def replicas(arguments: Replicas) -> serve.Application:
    """The application of Ray Serve.

    With device=cuda a replica has a GPU for each of its ranks, else `num_threads` CPUs for each
    (left out: one). It is sent as many requests at a time as its steps can carry (max_num_seqs);
    the others wait where Ray counts them.
    """
    options = arguments.model_extra or {}
    if unknown := options.keys() - EngineConfig.__dataclass_fields__:
        raise InvalidArgumentError(
            f"there is no argument {', '.join(sorted(unknown))}; expected fields of EngineConfig, "
            f"or {', '.join(Replicas.model_fields)}"
        )
    # From a command line all values are texts.
    config = TypeAdapter(EngineConfig).validate_python({"max_waiting_requests": 512, **options})
    ranks = config.tensor_parallel_size
    if config.device == "cuda":
        takes = {"num_gpus": ranks}
    else:
        config = replace(config, device="cpu", num_threads=config.num_threads or 1)
        takes = {"num_cpus": ranks * config.num_threads}
    asked = {
        "name": "octavo",
        "num_replicas": arguments.num_replicas,
        "max_ongoing_requests": config.max_num_seqs,
        **arguments.deployment,
    }
    asked["ray_actor_options"] = {**takes, **asked.get("ray_actor_options", {})}
    model, adapters, server = arguments.model, arguments.adapters, arguments.server
    make = partial(Application, model, config=config, adapters=adapters, server=server)
    return serve.deployment(_replica(make), **asked).bind()


def _replica(make: Callable[[], Application]) -> type:
    """A class of Ray Serve whose instances have an application each, made where they run."""
    made: list[Application] = []
    gauges: dict[str, Gauge] = {}

    def build() -> Application:
        made.append(make())
        return made[0]

    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Ray starts a replica anew where this fails; it asks every few seconds."""
            try:
                _show_metrics(made[0].service.metrics, gauges)
            except Exception:
                _log.exception("the metrics could not be put among Ray's")
            health = made[0].service.engine.health()
            if not health.ok:
                raise EngineStepError(health.reason)

    return Replica


def _show_metrics(metrics: Metrics | None, gauges: dict[str, Gauge]) -> None:
    """Put what /metrics says of this replica among Ray's metrics, as vLLM's are there.

    metrics: None before the model is loaded. gauges: those made so far. All are gauges, since Ray's
    counters take no values, but differences; what Prometheus computes of both is the same.
    """
    replica = serve.get_replica_context().replica_id.unique_id
    for name, labels, value in () if metrics is None else metrics.samples():
        tags = {**labels, "ReplicaId": replica}
        if name not in gauges:
            gauges[name] = Gauge(name.replace(":", "_"), tag_keys=tuple(tags))
        gauges[name].set(value, tags)
