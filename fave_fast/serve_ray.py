"""The HTTP server as a Ray Serve deployment: the same interface, one engine and one micro-batcher in each replica.

    serve run fave_fast.serve_ray:app ckpt=/models/model.pt replicas=4

or `serve.run(deployment(RayOptions("/models/model.pt", replicas=4)))`. A replica takes a GPU where the device is one,
else `cpus` CPUs, which are also its threads. The checkpoint and other files must be there under the same names on every
machine that has a replica.

Ray's proxy hands a request to one replica, which queues, batches and refuses as the server alone does. A replica that
dies takes what it was answering with it (status 500), and Ray starts another. No replica reads the checkpoint anew by
itself, for its neighbours would still serve the old one: there is no `/v1/reload`; a new checkpoint is deployed as the
first was, and Ray replaces the replicas. `/metrics` is that of the replica which the proxy asks, and says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fave_fast import cli
from fave_fast.errors import InputError
from fave_fast.serve import Options, limits_of, open_app

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import Message, Receive, Scope, Send

    from fave_fast.serving.gateway import Gateway
    from fave_fast.serving.service import Service

NAME = "fave_fast"  # of the deployment
_HEALTH_SECONDS = 1.0  # Ray's 10 are also how long it may take to notice that a replica is dead


@dataclass(frozen=True)
class RayOptions(Options):
    """`serve.Options`, and how many replicas of what size."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    replicas: int = 1
    cpus: float = 1.0  # of a replica without a GPU


@dataclass(frozen=True)
class _App:
    """The app of a replica, with what is behind it."""

    gateway: Gateway
    service: Service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def once_named(message: Message) -> None:
            """Ray's proxy, too, puts the request's id (its own, where the request brought none) into the answer."""
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        await self.gateway(scope, receive, once_named)


def deployment(options: RayOptions) -> Application:
    """What `ray.serve.run` takes.

    Raises:
        InputError: Ray Serve is not installed, or options that do not fit.
    """
    limits_of(options)
    if options.replicas < 1 or options.cpus <= 0:
        raise InputError(
            f"replicas and cpus are {options.replicas} and {options.cpus:g}; expected at least 1, and above 0"
        )
    try:
        from ray import serve
    except ImportError as error:  # without its extra, Ray raises one of its own
        raise InputError(f"Ray Serve cannot be imported ({error}); expected pip install 'fave-fast[ray]'") from None
    on_gpu = cli.resolve_device(options.device).type == "cuda"

    def build() -> _App:
        replica = serve.get_replica_context().replica_id.unique_id
        return _App(*open_app(options, reloadable=False, log_requests=False, labels={"replica": replica}))

    class Replica:
        app: _App  # from `serve.ingress`

        async def check_health(self) -> None:
            """Ray asks from time to time, and replaces a replica that raises."""
            if not self.app.service.healthy:
                raise RuntimeError("the micro-batcher's worker ended by an error")

    return serve.deployment(
        serve.ingress(build)(Replica),
        name=NAME,
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": options.cpus},
        max_ongoing_requests=options.max_queue + options.max_batch,  # more than a replica takes: it is who refuses
        max_queued_requests=options.max_queue,
        health_check_period_s=_HEALTH_SECONDS,
    ).bind()


def app(arguments: dict[str, Any]) -> Application:
    """For `serve run`, and for the `args` of a Serve config file: `RayOptions` by their names.

    Raises:
        InputError: an argument that is none or has another type, and as `deployment`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        options = TypeAdapter(RayOptions).validate_python(arguments)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InputError(f"arguments of fave_fast.serve_ray:app: {'; '.join(problems)}") from None
    return deployment(options)
