"""Users who talk to two servers, and note of each turn whether it was acknowledged as learnt.

A user's turns follow one another. Each attempt to say something has a text of its own, so that the user's final state
tells which attempts were learnt. If a server does not answer, or refuses to learn, the user tries again at the other.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

STORED, REFUSED, UNKNOWN = "stored", "refused", "unknown"
_PAUSE = 0.25  # seconds before another attempt


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One request that was to teach.

    Attributes:
        text: what the user said, which no other attempt has.
        server: which server was asked.
        began, ended: by `time.monotonic`.
        outcome: STORED: acknowledged; REFUSED: the server says that nothing was learnt; UNKNOWN: no answer came.
        why: of a refusal, or of a missing answer.
    """

    text: str
    server: int
    began: float
    ended: float
    outcome: str
    why: str = ""


class Talker(threading.Thread):
    """One user, who says something, waits until it is learnt, pauses, and goes on until `stop` is set.

    Args:
        name: the user's id.
        urls: of the servers.
        model: name of the model that they serve.
        pause: seconds between turns, on average.
        stray: share of turns that begin at a server chosen by chance instead of the one that answered last.
        stop: ends the talk after the turn that is going on.
        seed: of the pauses and choices.
        headers: more headers, such as ``authorization``.
    """

    def __init__(
        self, name: str, urls: Sequence[str], model: str, *, pause: float, stray: float, stop: threading.Event,
        seed: int, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name=name, daemon=True)
        self.user, self.urls, self.model, self.pause, self.stray = name, list(urls), model, pause, stray
        self.stop, self.random, self.server = stop, random.Random(seed), seed % len(urls)
        self.headers = {"x-ttt-user": name, "x-ttt-learn": "wait", **(headers or {})}
        self.attempts: list[Attempt] = []

    def run(self) -> None:
        turn = 0
        with httpx.Client(timeout=30, headers=self.headers) as client:
            while not self.stop.wait(self.random.uniform(0.5, 1.5) * self.pause):
                turn += 1
                if self.random.random() < self.stray:
                    self.server = self.random.randrange(len(self.urls))
                attempt = 1
                while not self.say(client, f"{self.user} says {turn}, try {attempt}: I like {self.random.random()}"):
                    attempt += 1
                    self.server = (self.server + 1) % len(self.urls)
                    time.sleep(_PAUSE)

    def say(self, client: httpx.Client, text: str) -> bool:
        """Send a turn and note what came of it; whether it was acknowledged as learnt."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        began = time.monotonic()
        try:
            answer = client.post(f"{self.urls[self.server]}/v1/chat/completions", json=body)
            outcome, why = judged(answer)
        except httpx.ConnectError as error:
            outcome, why = REFUSED, f"no connection: {type(error).__name__}"
        except httpx.TransportError as error:
            outcome, why = UNKNOWN, type(error).__name__
        self.attempts.append(Attempt(text, self.server, began, time.monotonic(), outcome, why))
        return outcome == STORED


def judged(answer: httpx.Response) -> tuple[str, str]:
    """The outcome of a turn by its answer, and why it was not stored."""
    try:
        found: dict[str, Any] = answer.json()
    except ValueError:
        return UNKNOWN, f"status {answer.status_code}"
    if answer.status_code == 200:
        learning = found["ttt"]["learning"]
        return (STORED, "") if learning == "stored" else (REFUSED, learning)
    # A server that is busy or stopping has not begun; after other errors the turn may have been learnt.
    refused = answer.status_code in (429, 503)
    error = found.get("error")
    return REFUSED if refused else UNKNOWN, str(error.get("message") if isinstance(error, dict) else found)
