"""``python -m bench.serving.soak``: many users talk to ``ttt serve`` on SmolLM2, which is killed again and again.

There are more users than slots, so that they are evicted and read again all the time, and every few minutes the server
is killed with SIGKILL and started anew. At the end each user's state in the store is compared with what a learner that
does nothing else makes of the same turns, in the same order. It writes bench/serving/results/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.progress import track

from bench.machine import provenance
from bench.serving.account import replay_difference
from bench.serving.server import MODEL, words_of
from bench.serving.servers import ServerProcess
from ttt.serve.main import ServeOptions, build_learner
from ttt.store import Store

RESULTS = Path(__file__).parent / "results" / "soak.json"


class Talker:
    """A user who says one thing after the other, and keeps account of what was learnt.

    Attributes:
        learnt: the texts that the server has learnt, in order.
        acknowledged: how many of them it said were stored.
        unknown: a text during which the server was killed: it was learnt, or it was not.
        faults: what must not happen.
    """

    def __init__(self, name: str, texts: list[str]) -> None:
        self.name, self.texts = name, texts
        self.learnt: list[str] = []
        self.acknowledged, self.refused = 0, 0
        self.unknown: str | None = None
        self.faults: list[str] = []

    def turn(self, url: str, text: str) -> None:
        """Say ``text`` and wait until it is stored."""
        with httpx.Client(base_url=url, timeout=120, headers={"x-ttt-user": self.name}) as client:
            try:
                self._settle(client)
                self.unknown = text
                body = {"model": MODEL, "messages": chat(text), "max_tokens": 3, "temperature": 0}
                answer = client.post("/v1/chat/completions", json=body, headers={"x-ttt-learn": "wait"})
            except httpx.TransportError:
                time.sleep(0.5)  # the server was killed
                return
            if answer.status_code != 200:
                self.refused += 1
                self.unknown = None
                time.sleep(0.5)
                return
            found = answer.json()["ttt"]
            self.unknown = None
            if found["learning"] != "stored":
                self.refused += 1  # another server still has the lease of the one that was killed
                time.sleep(0.5)
                return
            self.learnt.append(text)
            self.acknowledged += 1
            if found["updates"] != len(self.learnt):
                self.faults.append(f"{self.name}: {found['updates']} updates after {len(self.learnt)} turns")

    def _settle(self, client: httpx.Client) -> None:
        """After a kill: find out whether the last turn was learnt."""
        if self.unknown is None:
            return
        body = {"model": MODEL, "messages": chat("x"), "max_tokens": 1}
        answer = client.post("/v1/chat/completions", json=body, headers={"x-ttt-learn": "off"})
        updates = answer.raise_for_status().json()["ttt"]["updates"]
        if updates == len(self.learnt) + 1:
            self.learnt.append(self.unknown)
        elif updates != len(self.learnt):
            self.faults.append(f"{self.name}: {updates} updates after {len(self.learnt)} acknowledged turns")
        self.unknown = None


def chat(text: str) -> list[dict[str, str]]:
    """A chat of one turn."""
    return [{"role": "user", "content": text}]


def talk(talkers: list[Talker], url: str, until: float, seed: int) -> None:
    """Let one of ``talkers`` say something, then another, until the time has come."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        talker = draw.choice(talkers)
        with contextlib.suppress(httpx.HTTPError):
            talker.turn(url, draw.choice(talker.texts))


def compare(talkers: list[Talker], store: Store, options: ServeOptions) -> dict[str, Any]:
    """Replay every user's turns with a learner like that of the server, and compare with what is stored."""
    learner, tokenizer = build_learner(dataclasses.replace(options, slots=1))
    replayed = [talker for talker in talkers if talker.learnt]
    differences = [
        replay_difference(
            learner, tokenizer, learner.context, talker.name, talker.learnt, store.get(talker.name).tensors
        )
        for talker in track(replayed, "replaying")
    ]
    return {
        "users_replayed": len(replayed),
        "users_equal_to_the_bit": differences.count(0.0),
        "largest_difference": max(differences, default=0.0),
    }


def main() -> None:
    """Run, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)  # as the server's: sums of other parts round otherwise
    found: dict[str, Any] = provenance("cpu") | {"model": MODEL, "server_threads": options.threads}
    texts = words_of(options.users * 20, 100)
    talkers = [Talker(f"user-{i}", texts[20 * i : 20 * i + 20]) for i in range(options.users)]
    with tempfile.TemporaryDirectory() as place:
        serve = ServeOptions(store=f"{place}/store", rows=4, slots=options.slots, study_after=0.0, lease_seconds=5.0)
        process = ServerProcess(serve, Path(place) / "log", options.threads)
        process.start()
        process.wait_until_ready()
        memory, numbers = list[list[int]](), dict[str, float]()
        until = time.monotonic() + 60 * options.minutes
        # Each client speaks for its own users, so that a user's turns have an order.
        threads = [
            threading.Thread(target=talk, args=(talkers[at :: options.clients], process.url, until, at))
            for at in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        period = 60 * options.minutes / (options.kills + 1)
        for life in range(options.kills + 1):
            ends, memory_of_life = min(time.monotonic() + period, until), list[int]()
            while time.monotonic() < ends:
                time.sleep(min(10.0, max(0.1, ends - time.monotonic())))
                memory_of_life.append(process.resident())
            memory.append(memory_of_life)
            for name, value in process.metrics().items():
                numbers[name] = numbers.get(name, 0.0) + value
            if life < options.kills:
                process.kill()
                process.start()
                process.wait_until_ready()
        for thread in threads:
            thread.join()
        for talker in talkers:  # one last look at turns that a kill has left open
            with httpx.Client(base_url=process.url, timeout=120, headers={"x-ttt-user": talker.name}) as client:
                talker._settle(client)
        found["stopped_with"] = process.stop()
        result = compare(talkers, Store(serve.store), serve)
    found |= {
        "minutes": options.minutes, "users": options.users, "slots": options.slots, "kills": options.kills,
        "turns_acknowledged": sum(talker.acknowledged for talker in talkers),
        "turns_learnt": sum(len(talker.learnt) for talker in talkers),
        "turns_refused": sum(talker.refused for talker in talkers),
        "faults": [fault for talker in talkers for fault in talker.faults],
        "evictions": int(numbers.get("ttt_evictions_total", 0)),
        "resident_bytes": memory,
    } | result  # fmt: skip
    print(json.dumps(found | {"resident_bytes": [life[-1:] for life in memory]}, indent=1))
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
