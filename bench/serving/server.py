"""``python -m bench.serving.server``: speed and latency of ``ttt serve`` on SmolLM2, with learning off and on.

It writes bench/serving/results/server.json. Learning off and on alternate in each round, and medians over the rounds
are given: the machine may be shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from bench.machine import provenance
from bench.serving.clients import Streamed, all_at_once
from bench.serving.servers import ServerProcess, running
from ttt.demo.language_model import load
from ttt.serve.main import ServeOptions, adapted

MODEL = "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results" / "server.json"
TOKENS = 48
"""Tokens of each answer."""


def words_of(count: int, size: int) -> list[str]:
    """``count`` different pieces of English, of ``size`` characters each."""
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    return [text[at * size : (at + 1) * size] for at in range(count)]


def percentiles(values: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    return {f"p{q}_ms": round(1e3 * float(np.percentile(values, q)), 2) for q in (50, 99)}


def measure_streams(url: str, users: int, learn: str, turn: int) -> dict[str, Any]:
    """``users`` answers at the same time, each for a user of its own."""
    texts = words_of(users * (turn + 1), 120)[-users:]
    found, seconds = asyncio.run(all_at_once(url, MODEL, texts, [f"user-{i}" for i in range(users)], learn, TOKENS))
    return {"streams": found, "tokens_per_s": sum(each.tokens for each in found) / seconds}


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and percentiles over all tokens of all rounds."""
    streams: list[Streamed] = [stream for run in runs for stream in run["streams"]]
    return {
        "tokens_per_s": round(median(run["tokens_per_s"] for run in runs), 1),
        "first_token": percentiles([stream.first for stream in streams]),
        "between_tokens": percentiles([gap for stream in streams for gap in stream.gaps]),
        "largest_gap_ms": round(1e3 * median(max(stream.gaps) for stream in streams), 1),
    }


def wait_for_learning(process: ServerProcess) -> None:
    """Wait until everything that was said is learnt."""
    while httpx.get(f"{process.url}/v1/status").json()["learning_tokens"]:
        time.sleep(0.05)


def measure_prices(process: ServerProcess, rounds: int) -> dict[str, Any]:
    """Milliseconds of a token that is read and of one that is learnt, of the same texts."""
    texts = words_of(rounds + 1, 1200)
    reading, learning, counts = [], [], []
    for text in texts:
        began = time.perf_counter()
        body = {"model": MODEL, "prompt": text, "max_tokens": 1, "temperature": 0}
        answer = httpx.post(f"{process.url}/v1/completions", json=body, headers={"x-ttt-user": "reader"}, timeout=600)
        counts.append(answer.json()["usage"]["prompt_tokens"])
        reading.append((time.perf_counter() - began) / counts[-1])
        before = process.metrics().get("ttt_learning_seconds_total", 0.0)
        learnt = httpx.post(f"{process.url}/v1/users/learner/learn", json={"text": text}, timeout=600).json()
        learning.append((process.metrics()["ttt_learning_seconds_total"] - before) / learnt["tokens"])
    reading, learning = reading[1:], learning[1:]  # the first one warms up
    ratios = [learnt / read for learnt, read in zip(learning, reading, strict=True)]
    return {
        "prompt_tokens": counts[1:], "read_ms": round(1e3 * median(reading), 2),
        "learnt_ms": round(1e3 * median(learning), 2), "learnt_over_read": round(median(ratios), 2),
    }  # fmt: skip


def measure_memory(process: ServerProcess, users: int) -> dict[str, Any]:
    """Bytes of a user in the store, and what the server needs for one more user in a slot."""
    sizes = []
    for i in range(users):
        versions = httpx.get(f"{process.url}/v1/users/user-{i}").json()["versions"]
        sizes += [version["bytes"] for version in versions[:1]]
    return {"stored_bytes": int(median(sizes)), "resident": process.resident()}


def slot_bytes() -> int:
    """Bytes of one slot in all layers, by the shapes of the serving configuration."""
    learner = adapted(load()[0], slots=1)
    assert learner.pool is not None
    tensors = [getattr(layer, name) for layer in learner.pool.layers.values() for name in ("a", "b")]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = provenance("cpu") | {"model": MODEL, "server_threads": options.threads, "answer": TOKENS}
    largest = max(options.users)
    with tempfile.TemporaryDirectory() as place:
        serve = ServeOptions(store=f"{place}/store", rows=largest, slots=largest, waiting=128, study_after=0.0)
        with running(serve, Path(place) / "log", options.threads) as process:
            found["prices"] = measure_prices(process, options.rounds)
            found["streams"] = []
            for users in options.users:
                runs: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
                measure_streams(process.url, users, "off", 0)  # opens the users
                for turn in range(options.rounds):
                    for learn, kept in runs.items():
                        kept.append(measure_streams(process.url, users, learn, turn))
                        wait_for_learning(process)
                row: dict[str, Any] = {"users": users, "off": summed_up(runs["off"]), "on": summed_up(runs["on"])}
                row["beside_learning"] = summed_up([beside(process, users, turn) for turn in range(options.rounds)])
                found["streams"].append(row)
                print(json.dumps(row))
            numbers = process.metrics()
            found["store_write_ms"] = _mean_ms(numbers, "ttt_store_write_seconds")
            found["memory"] = measure_memory(process, min(options.users))
        with running(serve, Path(place) / "log", options.threads) as process:
            measure_streams(process.url, max(options.users), "off", 0)  # all of them are opened from the store
            found["user_open_ms"] = _mean_ms(process.metrics(), "ttt_user_open_seconds")
    found["memory"]["slot_bytes"] = slot_bytes()
    print(json.dumps(found, indent=1))
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


def beside(process: ServerProcess, users: int, turn: int) -> dict[str, Any]:
    """Streams of the base model while other users' texts are learnt all the time."""

    async def both() -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=process.url, timeout=600) as client:
            ended = asyncio.Event()

            async def teach() -> None:
                for at, text in enumerate(words_of(1000, 600)):
                    if ended.is_set():
                        return
                    await client.post(f"/v1/users/taught-{turn}-{at % 2}/learn", json={"text": text})

            teaching = asyncio.create_task(teach())
            await asyncio.sleep(0.5)
            texts = words_of(users, 120)
            names: list[str | None] = [f"user-{i}" for i in range(users)]
            found, seconds = await all_at_once(process.url, MODEL, texts, names, "off", TOKENS)
            ended.set()
            await teaching
        return {"streams": found, "tokens_per_s": sum(each.tokens for each in found) / seconds}

    return asyncio.run(both())


def _mean_ms(numbers: dict[str, float], name: str) -> float:
    return round(1e3 * numbers[f"{name}_sum"] / numbers[f"{name}_count"], 2)


if __name__ == "__main__":
    main()
