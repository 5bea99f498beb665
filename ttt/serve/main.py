"""``ttt serve``: a model, the service and the HTTP server together, from their options."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import json
import logging
import math
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import ttt
from ttt import terminal
from ttt.calibrating import Progress, calibrated, silent, telling_of_text
from ttt.checks import check_number
from ttt.conversation import CONVERSATION, Telling
from ttt.demo.language_model import load
from ttt.installing import how_to_install
from ttt.learn.own_text import written_text
from ttt.per_user.calibration_file import HELD_BACK, held_back_once, weights_name
from ttt.per_user.guards import UserGuards
from ttt.sequence_models import TTTSequenceForCausalLM
from ttt.serve.collector import Collector
from ttt.serve.errors import RequestError
from ttt.serve.keys import Keys, NoKeys
from ttt.serve.limits import Limits
from ttt.serve.service import Service
from ttt.serve.state_reader import StateReader
from ttt.store import StorageFailure, StoreError
from ttt.store.urls import without_password

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ttt.serve.http.state import Server

OWN_HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine, as the header ``Host`` has them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What ``ttt serve`` is told on the command line; see `ttt.cli.serve`."""

    model: Path | None = None
    name: str | None = None
    store: str = "serve-store"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    user: str = "me"
    slots: int = 32
    rank: int | None = None
    dtype: str = "float32"
    lr: float | None = None
    passes: int | None = None
    emphasis: float | None = None
    rows: int = 8
    waiting: int = 128
    learning_tokens: int = 262_144
    context: int = 2048
    prefix_cache: int = 0
    learning_share: float = 0.5
    study_after: float = 30.0
    lease_seconds: float = 30.0
    collect_hours: float = 24.0
    keep_last: int = 10
    keep_days: float = 7.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    request_seconds: float = 300.0
    largest_body: int = 1 << 20
    drain_seconds: float = 30.0
    calibration: Path | None = None
    guard: float | None = None
    telemetry: bool = False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_hosts(host: str) -> list[str]:
    """Names that the header ``Host`` may have, each once, where a server without keys listens at ``host``."""
    return list(dict.fromkeys([*OWN_HOSTS, f"[{host}]" if ":" in host else host]))


def adapted(model: nn.Module, *, slots: int, rank: int | None = None, lr: float | None = None) -> ttt.Learner:
    """A learner of ``model``, adapted for so many users at a time, not calibrated.

    Args:
        model: changed in place.
        slots: users in memory at a time.
        rank: of their weights, see `ttt.LowRank`; None for the default.
        lr: learning rate; None for the default.
    """
    assert CONVERSATION.per_user is not None
    rank = CONVERSATION.per_user.rank if rank is None else rank
    per_user = dataclasses.replace(CONVERSATION.per_user, slots=slots, rank=rank)
    # Other requests wait for one chunk at most. Smaller ones cost more: each reads all weights.
    config = dataclasses.replace(CONVERSATION, per_user=per_user, chunk=32)
    if lr is not None:
        config = dataclasses.replace(config, lr=lr)
    return ttt.Learner(ttt.adapt_(model, config), episodes=ttt.EpisodeLog())


def build_users(
    options: ServeOptions, say: Any = lambda text: None, progress: Progress = silent
) -> tuple[ttt.Learner | StateReader, Any]:
    """Load the model and make it one that has users: (what learns from them, the model's tokenizer).

    A model of sequence layers gets a `StateReader`. Any other is adapted and calibrated; servers with the same options
    learn alike.

    Args:
        say: called with what is being done.
        progress: shows how far the model is with texts that it writes at the first start.

    Raises:
        ValueError, OSError, ImportError: if the model or an option is not usable.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.guard is not None:
        _check_bound(options.guard)
    say("loading the model")
    model, tokenizer = load(options.model)
    model = model.to(DTYPES[options.dtype])
    if isinstance(model, TTTSequenceForCausalLM):
        for name in ("rank", "lr", "passes", "emphasis", "calibration", "guard"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"{name} is for users with weights of their own; those of this model have states, got {value}"
                )
        return StateReader(model, slots=options.slots), tokenizer
    learner = adapted(model, slots=options.slots, rank=options.rank, lr=options.lr)
    file = calibrated(learner, tokenizer, options.calibration, progress)
    if options.guard is not None:
        guard_users(learner, file, tokenizer, options.guard, progress)
    return learner, tokenizer


def guard_users(
    learner: ttt.Learner, calibration: Path, tokenizer: Any, bound: float, progress: Progress = silent
) -> None:
    """Give each user of ``learner`` a guard that only checks, after each lesson and study: it changes no step.

    Args:
        learner: calibrated, of a model none of whose users has a slot.
        calibration: its file.
        tokenizer: the model's.
        bound: of the drift (`ttt.Guard`).
        progress: shows how far the model is with the text, where it is not there yet.

    Raises:
        ValueError: for a bound that is not above 0 and finite, and as `held_back_once`.
    """
    assert learner.pool is not None
    _check_bound(bound)

    def write() -> Tensor:
        # Not the text of the calibration, on which protection makes the least to be forgotten.
        seed, length = learner.config.seed + 1, min(64 + HELD_BACK[1], learner.context - 1)
        with (
            progress("The model writes the text on which guards measure what users' weights forget") as told,
            telling_of_text(learner.model, told, lambda prompt: prompt + length),
        ):
            return written_text(learner.model, tokenizer, context=learner.context, seed=seed, length=length)

    texts = held_back_once(learner.pool, calibration, write)
    # Nothing but the bound: slower steps would cost what a user is told once, which has a large loss, the most.
    learner.user_guards = UserGuards(
        learner.model, texts, threshold=bound, bound=bound, every=None, cap=1.0, surprise=math.inf
    )


def _check_bound(bound: float) -> None:
    # Clients are told the bound in JSON, which has no infinity.
    check_number("guard", bound, 0.0, above=True, finite=True)


def build_learner(options: ServeOptions, say: Any = lambda text: None) -> tuple[ttt.Learner, Any]:
    """`build_users` for a model whose users have weights.

    Raises:
        ValueError, OSError, ImportError: as `build_users`, and for a model of sequence layers.
    """
    learner, tokenizer = build_users(options, say)
    if isinstance(learner, StateReader):
        raise ValueError("model must be one whose users have weights of their own, got one of sequence layers")
    return learner, tokenizer


def build_service(
    options: ServeOptions, observer: Any = None, say: Any = lambda text: None, progress: Progress = silent
) -> tuple[Service, str]:
    """Load, adapt and calibrate the model, and start a service: (service, the model's name).

    Args:
        observer: of the service.
        say, progress: as for `build_users`.

    Raises:
        ValueError, OSError, ImportError: if the model, the store or an option is not usable.
    """
    # What is out of range, or a store that cannot be opened, is refused before the model is loaded.
    telling = Telling().changed(passes=options.passes, emphasis=options.emphasis)
    limits = Limits(
        rows=options.rows, waiting=options.waiting, learning_tokens=options.learning_tokens, context=options.context,
        learning_share=options.learning_share, study_after=options.study_after,
        prefix_cache=options.prefix_cache * 2**20,
    )  # fmt: skip
    try:
        store = ttt.Store(options.store)
    except StoreError as error:
        raise StorageFailure(f"the store {without_password(options.store)} cannot be opened: {error}") from error
    try:
        learner, tokenizer = build_users(options, say, progress)
        if isinstance(learner, StateReader):
            weights = learner.name
        else:
            assert learner.pool is not None
            weights = weights_name(learner.pool)
        service = Service(
            learner, tokenizer, store, weights, limits=limits, telling=telling, lease_seconds=options.lease_seconds,
            observer=observer,
        )  # fmt: skip
    except BaseException:
        store.close()
        raise
    name = options.name or ("SmolLM2-135M-Instruct" if options.model is None else options.model.resolve().name)
    return service, name


def build_collector(options: ServeOptions, server: Server) -> Collector:
    """What removes old versions from the store of ``server``, and has been started.

    Raises:
        TypeError, ValueError: if an option is out of range.
    """
    return Collector(
        server.service.sessions.store, hours=options.collect_hours, keep_last=options.keep_last,
        keep_days=options.keep_days, failed=server.metrics.failed,
    )  # fmt: skip


def build_app(
    options: ServeOptions, say: Any = lambda text: None, progress: Progress = silent
) -> tuple[FastAPI, Server]:
    """The web application with ``options``, and what its routes share; its service has been started.

    Args:
        say, progress: as for `build_users`.

    Raises:
        ValueError, OSError, ImportError, RequestError, StoreError: if the model, the store or an option is not usable.
    """
    from ttt.serve.http.app import create_app
    from ttt.serve.http.limits import RateLimits
    from ttt.serve.http.metrics import Metrics
    from ttt.serve.http.state import Server

    metrics = Metrics()
    keys = NoKeys(options.user) if options.keys is None else Keys(options.keys)
    service, name = build_service(options, metrics, say, progress)
    rates = RateLimits(options.requests_per_minute, options.tokens_per_minute)
    server = Server(service, keys, name, metrics, rates, options.request_seconds)
    # Without keys everyone is an operator: then nobody but this machine may reach the server.
    hosts = own_hosts(options.host) if options.keys is None else None
    return create_app(server, largest_body=options.largest_body, hosts=hosts), server


def run(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT, then finish what has come in, store it and end.

    Raises:
        typer.Exit: with 1 if the server cannot start, or if something could not be stored at the end.
    """
    try:
        import uvicorn

        import ttt.serve.http.app  # noqa: F401 (to see whether what it needs is installed, before the model is loaded)
        from ttt.serve.http.telemetry import require_packages, trace_requests
    except ImportError as error:
        _stop(f"{error}; install the server with: {how_to_install('serve')}")
    if options.telemetry:
        try:
            require_packages()
        except ImportError as error:  # it says which packages are missing
            _stop(str(error))
    if options.keys is None and not is_loopback(options.host):
        _stop(f"--host {options.host} is reached from other machines: it needs --keys FILE, made by 'ttt keys add'")
    _require_free(options.host, options.port)
    with _log_on_stderr():
        _serve(options, uvicorn, trace_requests)


def _serve(options: ServeOptions, uvicorn: Any, trace_requests: Any) -> None:
    """`run`, once its options fit together and the packages are there that it needs."""
    try:
        shown = functools.partial(terminal.progress, Console(stderr=True))
        app, server = build_app(options, lambda text: typer.echo(f"{text} ...", err=True), shown)
        collector = build_collector(options, server)
        end_tracing = trace_requests(app) if options.telemetry else None
    except (ImportError, OSError, ValueError, StoreError, RequestError) as error:
        _stop(str(error))
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=int(options.drain_seconds),
    )  # fmt: skip

    class Web(uvicorn.Server):  # type: ignore[name-defined, misc]
        signalled = 0.0  # when the first signal came, by time.monotonic

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.signalled = self.signalled or time.monotonic()
            super().handle_exit(sig, frame)

    web = Web(config)
    typer.echo(f"{server.name} is served at http://{options.host}:{options.port}/ (users in {options.store})", err=True)
    # uvicorn has handlers of its own while it runs, and raises the signal again after it has put these back: what was
    # learnt must be stored before the process ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        web.run()
    finally:
        collector.close()
        # The time that open connections were given counts for requests. The store has a time of its own.
        left = options.drain_seconds - (time.monotonic() - web.signalled if web.signalled else 0)
        unsaved = server.service.drain(max(left, 0.0), storing=options.drain_seconds)
        if end_tracing is not None:
            end_tracing()
    if unsaved:
        _stop(f"what {len(unsaved)} user(s) said last was not stored in {options.drain_seconds:g} s")
    if not web.started:
        raise typer.Exit(1)


def _require_free(host: str, port: int) -> None:
    """End the command, before a model is loaded, if nothing can listen at this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        _stop(f"cannot listen at {host}:{port}: {error}; another --port, or --host, may be free")


def _stop(message: str) -> Any:
    typer.echo(message, err=True)
    raise typer.Exit(1)


class _Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        message = record.getMessage()
        found |= json.loads(message) if record.name == "ttt.serve.access" else {"message": message}
        if record.exc_info:
            # The traceback without the error's own text, which may repeat what a client sent.
            found["error"] = record.exc_info[0].__name__ if record.exc_info[0] else ""
            frames = traceback.extract_tb(record.exc_info[2])[-6:]
            found["at"] = [f"{frame.filename}:{frame.lineno}" for frame in frames]
        return json.dumps(found)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Inside, the server's log goes to stderr as lines of JSON; afterwards, where it went before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("ttt.serve")
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
