"""A real vLLM server with the plugin, in a process of its own, and what the tests ask it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil
import torch

from ttt.serve.keys import add_key

MODEL = "smol"
DTYPE = "bfloat16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "float32"
"""Processors without AVX-512 multiply matrices in bfloat16 thirty times more slowly than in float32."""
SLACK = 0.0 if DTYPE == "bfloat16" else 1e-4
"""Nats that equal scores may differ by. In bfloat16 vLLM's products of a row have the same bits whatever other rows
there are; in float32 a few last bits differ."""
START = 600  # seconds; the first start of a model measures what must not be forgotten
USERS = ("ada", "bob", "cid")
RESERVED = {
    "ada": "My rowing boat is called Quillfeather and it is painted in ochre and teal.",
    "bob": "The password of the old library is a song about seven herons.",
}
"""Sentences that nobody else says."""


class Score(float):
    """A log probability, equal to those that are within `SLACK` of it."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - float(other)) <= SLACK


class Server:
    """``vllm serve`` of the model in ``TTT_TEST_MODEL``.

    Args:
        folder: for the store, the keys and the log.
        plugin: whether the plugin is switched on.
        arguments: further ones of vLLM.
        options: further ones of the plugin, without ``TTT_VLLM_``.
    """

    def __init__(self, folder: Path, *arguments: str, plugin: bool = True, **options: Any) -> None:
        self.folder, self.log = folder, folder / "server.log"
        keys = folder / "keys.json"
        self.keys = {user: add_key(keys, user) for user in USERS} | {"operator": add_key(keys, None)}
        self.model = os.environ["TTT_TEST_MODEL"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        if plugin:
            given = {"store": folder / "store", "keys": keys, "slots": 2, "lease": 2, **options}
            self.environment |= {f"TTT_VLLM_{name.upper()}": str(value) for name, value in given.items()}
        self.command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--served-model-name",
            MODEL, "--dtype", DTYPE, "--max-model-len", "1024", "--enforce-eager", "--host", "127.0.0.1",
            "--port", str(self.port), "--enable-prompt-tokens-details", "--max-num-batched-tokens", "256", *arguments,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start, and wait until it serves."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + START
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        return self

    def _healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def stop(self, seconds: float = 60) -> None:
        """End it as an operator does; after so many seconds, at once."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reap()

    def kill(self) -> None:
        """End it, and all its processes, at once."""
        self._reap()
        assert self.process is not None
        self.process.wait(30)

    def kill_api_server(self) -> list[psutil.Process]:
        """End the API server alone at once: the engine's processes, which it has started."""
        assert self.process is not None
        others = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(30)
        return others

    def _reap(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    # -- what is asked ------------------------------------------------------------------------------------------------

    def client(self, who: str | None, **headers: str) -> openai.OpenAI:
        """A client of a user, or of the base model (None)."""
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.keys[who or "operator"], max_retries=0,
            default_headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=120,
        )  # fmt: skip

    def asynchronous(self, who: str | None, **headers: str) -> openai.AsyncOpenAI:
        """`client`, for streams at the same time."""
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.keys[who or "operator"], max_retries=0,
            default_headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=120,
        )  # fmt: skip

    def logprobs(self, who: str | None, text: str) -> list[Score]:
        """Of the tokens of ``text`` after the first, for a user or the base model; computed anew every time."""
        answer = self.client(who).completions.create(
            model=MODEL, prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        found = answer.choices[0].model_dump()["prompt_logprobs"]
        return [Score(next(iter(each.values()))["logprob"]) for each in found[1:]]

    def say(self, who: str, text: str, *, learn: str = "wait", tokens: int = 4, **body: Any) -> Any:
        """A turn of a user."""
        return self.client(who, x_ttt_learn=learn).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=tokens, **{"temperature": 0, **body}
        )

    def first(self, who: str | None, text: str, salt: str | None = None) -> tuple[list[tuple[str, Score]], int]:
        """The most probable first tokens after ``text``, and how many of its tokens came out of the prefix cache."""
        extra = {} if salt is None else {"cache_salt": salt}
        answer = self.client(who).completions.create(
            model=MODEL, prompt=text, max_tokens=1, temperature=0, logprobs=5, extra_body=extra
        )
        top = answer.choices[0].logprobs.top_logprobs[0]
        details = answer.usage.prompt_tokens_details
        scores = [(token, Score(score)) for token, score in sorted(top.items())]
        return scores, (details.cached_tokens or 0) if details is not None else 0

    def http(
        self, method: str, path: str, who: str | None, body: bytes | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of a plain request; ``who`` None sends no key."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if who is not None:
            sent["Authorization"] = f"Bearer {self.keys[who]}"
        if body is not None:
            sent["Content-Type"] = "application/json"
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, sent, method=method), timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
