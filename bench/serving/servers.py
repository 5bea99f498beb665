"""Server processes over one store, which can be killed and started again, and a tiny model for them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from ttt.serve.main import ServeOptions, run

PRELOADED = ("bench.serving.servers", "ttt.serve.http.app", "transformers.models.llama.modeling_llama", "uvicorn")
TINY = Path(__file__).parents[2] / "tests" / "serve" / "tiny_chat_model.py"


def tiny_folder(path: Path) -> Path:
    """Write the tiny chat model of the tests into the folder ``path``, which is returned."""
    spec = importlib.util.spec_from_file_location("tiny_chat_model", TINY)
    assert spec is not None
    assert spec.loader is not None
    tiny: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.tiny_chat_model().save_pretrained(path)
    tiny.byte_tokenizer().save_pretrained(path)
    return path


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve(options: ServeOptions, log: Path, threads: int | None) -> None:
    """Be ``ttt serve`` in a process of its own."""
    if threads is not None:
        torch.set_num_threads(threads)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(options)


class ServerProcess:
    """A process that does what ``ttt serve`` does, at an address that stays the same when it is started again.

    It is forked from a process that has imported torch and transformers already, so that it starts at once.

    Args:
        options: of the server; the port is chosen here. All servers of a store must share the calibration.
        log: file that the process writes to.
        threads: of torch; None for its default.
    """

    def __init__(self, options: ServeOptions, log: Path, threads: int | None = None) -> None:
        self.options = dataclasses.replace(options, port=free_port())
        self.url, self.log = f"http://127.0.0.1:{self.options.port}", log
        self.threads = threads
        self.process: Any = None

    def start(self) -> None:
        """Start the process; see `wait_until_ready`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.process = context.Process(target=_serve, args=(self.options, self.log, self.threads), daemon=True)
        self.process.start()

    def wait_until_ready(self, seconds: float = 120.0) -> None:
        """Wait until the server answers. Raises RuntimeError if it ends, or takes longer than ``seconds``."""
        until = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if not self.process.is_alive() or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """The server's numbers that have no labels, by name."""
        text = httpx.get(f"{self.url}/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(\w+) ([-\d.e+]+)$", text, re.MULTILINE)}

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """End the process by SIGKILL, as a crash would."""
        self.process.kill()
        self.process.join()

    def stop(self, seconds: float = 60.0) -> int | None:
        """End the process by SIGTERM, so that it stores everything; its exit status, None if it did not end."""
        self.process.terminate()
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> None:
        """Kill the process if it still runs."""
        if self.process is not None and self.process.is_alive():
            self.kill()


@contextlib.contextmanager
def running(options: ServeOptions, log: Path, threads: int | None = None) -> Iterator[ServerProcess]:
    """A `ServerProcess` that answers, and is stopped at the end."""
    process = ServerProcess(options, log, threads)
    try:
        process.start()
        process.wait_until_ready()
        yield process
        process.stop()
    finally:
        process.end()
