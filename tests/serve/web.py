"""A real HTTP server in a thread, in front of the tiny model."""

import contextlib
import socket
import threading
import time

import openai
import uvicorn

from ttt.serve.http.app import create_app
from ttt.serve.http.limits import RateLimits
from ttt.serve.http.metrics import Metrics
from ttt.serve.http.state import Server
from ttt.serve.keys import NoKeys

NAME = "tiny"
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "My dog is called Biscuit."}]
FIXED = {"model": NAME, "temperature": 0, "extra_body": {"ignore_eos": True}}


@contextlib.contextmanager
def served(service, keys=None, limits=None, seconds=60.0, metrics=None, **options):
    """The URL of a server of ``service``, which is drained at the end."""
    server = Server(service, keys or NoKeys(), NAME, metrics or Metrics(), limits or RateLimits(), seconds)
    try:
        with listening(create_app(server, **options)) as url:
            yield url
    finally:
        if service.alive:
            service.drain()


@contextlib.contextmanager
def listening(app):
    """The URL of a real HTTP server of ``app``."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not web.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join(30)


def client_of(url, key="none", **headers):
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60,
        default_headers={f"x-ttt-{name}": value for name, value in headers.items()},
    )  # fmt: skip
