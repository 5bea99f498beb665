"""Where the plugin enters vLLM's API server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
from http import HTTPStatus
from typing import Any

from ttt.serve.errors import RequestError
from ttt.serve.vllm import supported
from ttt.serve.vllm.engine import Engine
from ttt.serve.vllm.identity import Middleware, current, error_response
from ttt.serve.vllm.options import STORING, Options
from ttt.serve.vllm.routes import WithoutUsers, add_routes
from ttt.serve.vllm.seats import Seat, Seats
from ttt.serve.vllm.turns import Turns, is_ours

log = logging.getLogger("vllm.ttt")


class State:
    """The seats of one API server. They are made with the first request, when vLLM's engine client is there."""

    def __init__(self, app: Any, options: Options) -> None:
        self.app, self.options = app, options
        self._seats: Seats | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def seats(self) -> Seats:
        """The users' seats."""
        if self._seats is None:
            engine = Engine(self.app.state.engine_client)
            self._seats = Seats(engine, self.options.slots, self.options.patience)
            self._loop = asyncio.get_running_loop()
        return self._seats

    def drain(self) -> None:
        """Wait until what users have said is learnt and stored; in another thread than the server's.

        Only the first call waits: after it the engine may be gone.
        """
        if self._seats is None or self._seats.ending or self._loop is None or not self._loop.is_running():
            return
        ending = asyncio.run_coroutine_threadsafe(self._seats.drain(self.options.drain), self._loop)
        done, _ = concurrent.futures.wait([ending], self.options.drain + STORING)
        if not done or ending.cancelled() or ending.exception() is not None:  # the server's loop may end meanwhile
            log.error("the server stops, and it is not known whether everything that was learnt is stored")


def install(options: Options) -> None:
    """Change vLLM's classes in the process of the API server."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.v1.engine.async_llm import AsyncLLM

    states: list[State] = []
    _arguments(EngineArgs, options)
    _routes(launcher, options, states)
    _adapters(BaseServing, options, states)
    _names(OpenAIServingModels)
    _generation(AsyncLLM, options, states)
    _ending(AsyncLLM, states)


def _arguments(arguments: Any, options: Options) -> None:
    create = arguments.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoConfig

        supported.check_arguments(self)
        config = AutoConfig.from_pretrained(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        blocks = options.blocks(config.num_hidden_layers)
        self.enable_lora, self.max_loras, self.max_cpu_loras = True, options.slots, options.slots
        self.max_lora_rank = options.adapter_rank
        # Naming them keeps vLLM from wrapping the head, which ends the engine where prompt_logprobs are asked for.
        self.lora_target_modules = [f"model.layers.{block}.mlp.down_proj" for block in blocks]
        if not self.enforce_eager:
            log.warning("ttt turns --enforce-eager on: it was not tested with torch.compile and CUDA graphs")
            self.enforce_eager = True
        return create(self, *args, **kwargs)

    arguments.create_engine_config = create_engine_config


def _routes(launcher: Any, options: Options, states: list[State]) -> None:
    # vLLM's own entry point for routes needs VLLM_PLUGINS to be set, which then leaves out all plugins not named there.
    attach = launcher.attach_endpoint_plugins

    @functools.wraps(attach)
    def attach_endpoint_plugins(app: Any, *args: Any, **kwargs: Any) -> None:
        from starlette.responses import JSONResponse

        attach(app, *args, **kwargs)
        state = State(app, options)
        states[:] = [state]
        add_routes(app, state)
        logging.getLogger("uvicorn.access").addFilter(WithoutUsers())
        app.add_middleware(Middleware, options=options, state=state)

        async def answer(request: Any, error: Any) -> Any:
            return error_response(error, JSONResponse)

        app.exception_handler(RequestError)(answer)

    launcher.attach_endpoint_plugins = attach_endpoint_plugins


def _adapters(serving: Any, options: Options, states: list[State]) -> None:
    choose = serving._maybe_get_adapters

    @functools.wraps(choose)
    def _maybe_get_adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        found, turn = choose(self, request, *args, **kwargs), current.get()
        if turn is None:
            return found
        seats = states[0].seats()
        Turns(seats, options).check(turn, request)
        return _request(seats, turn.seat)

    serving._maybe_get_adapters = _maybe_get_adapters


def _names(models: Any) -> None:
    name = models.model_name

    @functools.wraps(name)
    def model_name(self: Any, lora_request: Any = None) -> Any:
        return name(self, None if is_ours(lora_request) else lora_request)

    models.model_name = model_name


def _generation(client: Any, options: Options, states: list[State]) -> None:
    compute = client.generate

    @functools.wraps(compute)
    def generate(self: Any, prompt: Any, params: Any, request_id: Any, *, lora_request: Any = None, **kw: Any) -> Any:
        # Not itself an async generator: it is called while the request is handled, where the turn is known.
        turn = current.get()
        if turn is None or not is_ours(lora_request):
            return compute(self, prompt, params, request_id, lora_request=lora_request, **kw)
        seats = states[0].seats()

        def with_adapter(params: Any, adapter: Any) -> Any:
            return compute(self, prompt, params, request_id, lora_request=adapter, **kw)

        return Turns(seats, options).run(with_adapter, turn, self, params, lambda seat: _request(seats, seat))

    client.generate = generate


def _ending(client: Any, states: list[State]) -> None:
    """Let users' lessons end before the engine does, and all requests with it."""
    shutdown = client.shutdown

    @functools.wraps(shutdown)
    def learn_and_shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            asyncio.get_running_loop()  # the server's own thread, at the very end: there nothing can be waited for
        except RuntimeError:  # after SIGTERM, in a thread of its own, while the server serves
            try:
                for state in states:
                    state.drain()
            except Exception:
                log.exception("what users have said could not be learnt before the engine ends")
        try:
            shutdown(self, *args, **kwargs)
        finally:
            _end_requests(self)

    client.shutdown = learn_and_shutdown


def _end_requests(client: Any) -> None:
    """Tell the requests that wait for the engine of ``client``, which has ended, that the server is stopping.

    vLLM lets them wait for ever, and its server for their connections.
    """
    handler = getattr(client, "output_handler", None)
    if handler is None:  # nobody has asked for anything
        return
    from vllm.exceptions import GracefulHTTPError

    stopping = GracefulHTTPError("the server is stopping", HTTPStatus.SERVICE_UNAVAILABLE)
    with contextlib.suppress(RuntimeError):  # the server's loop has ended, and its requests with it
        handler.get_loop().call_soon_threadsafe(client.output_processor.propagate_error, stopping)


def _request(seats: Seats, seat: Seat) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"ttt-{seat.key}", seat.number, seats.label(seat))
