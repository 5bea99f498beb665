"""Replicas of ``ttt serve`` in a Ray cluster: ``serve run ttt.serve.ray:app``. It needs the extra ``ray``.

Ray starts the replicas, starts them again when they die, and spreads requests over them. A request that reaches a
replica without the user's lease is passed on to the replica that has it (`ttt.serve.http.forwarding`). A client that
sends the user's id in the header ``serve_multiplexed_model_id`` is routed there by Ray at once, most of the time. That
header only routes: who is asking is told by the API key, and by an operator's ``x-ttt-user``.

Options are those of ``ttt serve``, and `RayOptions`: as environment variables for ``app``, such as
``TTT_SERVE_STORE``, or as arguments of the builder:
``serve run ttt.serve.ray:build store=postgresql://... keys=/etc/ttt/keys.json replicas=4``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import socket
import threading
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt.installing import how_to_install
from ttt.serve.http.forwarding import Claims, Forwarding
from ttt.serve.http.middleware import Receive, Scope, Send
from ttt.serve.main import ServeOptions, build_app, build_collector

try:
    import ray
    import uvicorn
    from ray import serve
except ImportError as error:
    raise ImportError(f"{error}; install replicas with: {how_to_install('ray')}") from error

PREFIX = "TTT_SERVE_"
NAMESPACE = "ttt"
_NOT_HERE = ("host", "port", "telemetry")  # Ray listens, and has options of its own for these


@dataclasses.dataclass(frozen=True)
class RayOptions(ServeOptions):
    """The options of ``ttt serve``, and how many replicas there are.

    Attributes:
        replicas: number of replicas; the smallest one, if Ray may add some.
        most_replicas: the largest number of replicas, which Ray chooses by load; 0 for ``replicas`` always.
        cpus, gpus: that each replica needs; Ray limits its threads to ``cpus``.
    """

    replicas: int = 2
    most_replicas: int = 0
    cpus: float = 1.0
    gpus: float = 0.0


def options_from(values: Mapping[str, Any]) -> RayOptions:
    """The options of ``values`` by their names, each a string or of the right type.

    Raises:
        ValueError: if there is no such option, or a value is not of its type.
    """
    kinds = typing.get_type_hints(RayOptions)
    known = [name for name in kinds if name not in _NOT_HERE]
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"options must be among {', '.join(known)}, got {name!r}")
        found[name] = _parsed(name, value, kinds[name])
    options = RayOptions(**found)
    for name in ("replicas", "slots"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if options.most_replicas and options.most_replicas < options.replicas:
        raise ValueError(f"most_replicas must be 0 or at least {options.replicas}, got {options.most_replicas}")
    return options


def options_from_environment(environment: Mapping[str, str] = os.environ) -> RayOptions:
    """The options in variables such as ``TTT_SERVE_STORE``; raises ValueError as `options_from`."""
    return options_from({
        name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)
    })  # fmt: skip


def _parsed(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    try:
        return Path(value).resolve() if kind is Path else kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}") from None


def build(options: Mapping[str, Any] | RayOptions) -> Any:
    """The Ray Serve application of replicas with ``options``, for ``serve run`` and ``serve deploy``.

    Raises:
        ValueError: as `options_from`.
    """
    found = options if isinstance(options, RayOptions) else options_from(options)
    count: dict[str, Any] = {"num_replicas": found.replicas}
    if found.most_replicas:
        count = {"autoscaling_config": {"min_replicas": found.replicas, "max_replicas": found.most_replicas}}
    deployment = serve.deployment(serve.ingress(_application)(Replica)).options(
        name="ttt", **count, max_ongoing_requests=found.rows + found.waiting,
        graceful_shutdown_timeout_s=found.drain_seconds + 60, health_check_period_s=5,
        ray_actor_options={"num_cpus": found.cpus, "num_gpus": found.gpus},
    )  # fmt: skip
    return deployment.bind(found)


def __getattr__(name: str) -> Any:
    if name == "app":  # made when it is asked for: the replicas import this module, too
        return build(options_from_environment())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _application() -> Any:
    """Called by Ray in each replica."""
    return _to_replica


async def _to_replica(scope: Scope, receive: Receive, send: Send) -> None:
    """Pass everything on to the application of this process's `Replica`."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    replica: Any = serve.get_replica_context().servable_object
    await replica.asgi(scope, receive, send)


class RayDirectory:
    """`Claims` in an actor of the cluster, for all replicas. Without an answer from it, requests are served where
    they arrive.

    Args:
        store: URL of the store: each store has a directory of its own.
        seconds: see `Claims`.
    """

    def __init__(self, store: str, seconds: float) -> None:
        name = f"directory-{hashlib.sha256(store.encode()).hexdigest()[:16]}"
        self.actor = ray.remote(Claims).options(
            name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1,
            max_task_retries=0,
        ).remote(seconds)  # fmt: skip

    async def claim(self, user: str, address: str) -> str:
        """See `Claims.claim`."""
        try:
            return await asyncio.wait_for(self.actor.claim.remote(user, address), 1.0)
        except (ray.exceptions.RayError, asyncio.TimeoutError):
            return address

    async def gone(self, address: str) -> None:
        """See `Claims.gone`."""
        self.actor.gone.remote(address)

    def alive(self, address: str, users: list[str]) -> None:
        """See `Claims.alive`."""
        self.actor.alive.remote(address, users)


class Replica:
    """One server: the model, the service, the application, and a listener for the other replicas.

    Args:
        options: the same for all replicas.
    """

    def __init__(self, options: RayOptions) -> None:
        self.options = options
        app, self.server = build_app(options)
        self._collector = build_collector(options, self.server)
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1" if options.keys is None else ray.util.get_node_ip_address(), 0))
        self.address = "http://{}:{}".format(*self._listener.getsockname())
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
        self._web = uvicorn.Server(config)
        self._listening = threading.Thread(target=self._web.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._listening.start()
        self._stopping = threading.Event()
        self.directory = RayDirectory(options.store, options.lease_seconds)
        threading.Thread(target=self._stay_alive, name="ttt-alive", daemon=True).start()
        self.asgi = Forwarding(
            app, self.server, self.directory, self.address, served=serve.multiplexed(
                max_num_models_per_replica=options.slots)(_same), largest=options.largest_body,
        )  # fmt: skip

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if not self._stopping.is_set() and not self.server.service.alive:
            raise RuntimeError("the service has ended")

    def _stay_alive(self) -> None:
        """Tell the directory, a few times in the time of a lease, whose leases are held here."""
        while not self._stopping.is_set():
            sessions = self.server.service.sessions
            with contextlib.suppress(Exception):
                held = [u for u in sessions.users if (found := sessions.get(u)) is not None and found.lease]
                self.directory.alive(self.address, held)
            self._stopping.wait(self.options.lease_seconds / 4)

    async def __del__(self) -> None:
        """Called by Ray when the replica is to end: serve and learn what has come in, store it, release the leases."""
        if not hasattr(self, "asgi") or self._stopping.is_set():
            return
        self._stopping.set()
        self._collector.close()
        with contextlib.suppress(Exception):
            self.directory.actor.gone.remote(self.address)
        unsaved = await asyncio.to_thread(self.server.service.drain, self.options.drain_seconds)
        self._web.should_exit = True
        await asyncio.to_thread(self._listening.join, 10.0)
        if unsaved:
            raise RuntimeError(
                f"what {len(unsaved)} user(s) said last was not stored in {self.options.drain_seconds:g} s"
            )


async def _same(user: str) -> str:
    """What Ray's multiplexing calls a model: the id of a user who is served here."""
    return user
