"""``ttt serve`` in a process of its own, for benchmarks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class ServerProcess:
    """A running ``ttt serve``.

    Args:
        store: URL of the store.
        options: more options of the command.
        threads: of torch.
        log: file for the server's own lines.
    """

    def __init__(self, store: str, *options: str, threads: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._log = log.open("ab")
        command = [sys.executable, "-m", "ttt", "serve", "--store", store, "--port", str(port), *options]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stderr=self._log, stdout=self._log, env=environment)

    def wait(self, seconds: float = 300) -> None:
        """Wait until it answers."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() - began > seconds:
                raise RuntimeError(f"the server did not start; see {self._log.name}")
            time.sleep(0.2)

    def metrics(self) -> dict[str, float]:
        """The server's numbers that have no labels, by name."""
        text = httpx.get(f"{self.url}/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(\w+) ([-\d.e+]+)$", text, re.MULTILINE)}

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """End it as a power failure would."""
        self.process.kill()
        self.process.wait()
        self._log.close()

    def stop(self) -> int:
        """End it with SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(300)
        self._log.close()
        return status


@contextlib.contextmanager
def server(store: str, *options: str, threads: int, log: Path) -> Iterator[ServerProcess]:
    """A `ServerProcess` that answers, and is stopped at the end."""
    process = ServerProcess(store, *options, threads=threads, log=log)
    try:
        process.wait()
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()
