"""The vLLM plugin beside plain vLLM and beside vLLM's own adapters: ``python -m bench.serving.vllm MODEL``.

All servers run at the same time, and are measured in turns: what one of them does is compared with what another did
just before. Run it in the environment of ``make test-vllm``. Written is a JSON file: tokens per second and the largest
gap between two tokens of 8 streams, and what learning costs in units of a prefill of the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import openai
import torch

from bench.machine import provenance
from ttt.adapt.peft_export import export_peft
from ttt.serve.vllm.options import Options
from ttt.serve.vllm.supported import installed_version

STREAMS, TOKENS = 8, 100
DAY = "On day {day} the keeper of the lighthouse wrote down wind {day}, the tide and ships."
LESSON = " ".join(DAY.format(day=day) for day in range(12))
TELL = "Tell me a long story of the sea."


class Measured:
    """One server and its users."""

    def __init__(self, server: Any, adapters: bool) -> None:
        self.server, self.adapters = server, adapters
        self._clients: dict[tuple[str | None, str], openai.AsyncOpenAI] = {}

    def client(self, who: str | None, learn: str = "off") -> openai.AsyncOpenAI:
        """Of a user, or of the base model."""
        if (who, learn) not in self._clients:
            self._clients[who, learn] = self.server.asynchronous(who, x_ttt_learn=learn)
        return self._clients[who, learn]

    def model(self, who: str | None) -> str:
        """Stock vLLM serves each adapter as a model."""
        return who if self.adapters and who is not None else "smol"

    async def stream(self, who: str | None, learn: str = "off", say: str = TELL) -> tuple[int, list[float]]:
        """(tokens, seconds between them) of one answer."""
        stream = await self.client(who, learn).chat.completions.create(
            model=self.model(who), messages=[{"role": "user", "content": say}], max_tokens=TOKENS, temperature=0,
            stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        times = [time.perf_counter() async for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
        return len(times), [b - a for a, b in itertools.pairwise(times)]

    async def streams(self, users: list[str | None], learn: str = "off", say: str = TELL) -> dict[str, float]:
        """Streams at the same time: tokens per second of all, and the largest gap in milliseconds."""
        began = time.perf_counter()
        found = await asyncio.gather(*(self.stream(user, learn, say) for user in users))
        spent = time.perf_counter() - began
        gaps = sorted(gap for _, gaps in found for gap in gaps)
        return {
            "tokens_per_second": sum(count for count, _ in found) / spent,
            "largest_gap_ms": 1e3 * gaps[-1],
            "median_gap_ms": 1e3 * gaps[len(gaps) // 2],
        }

    async def settled(self) -> None:
        """Wait until all that was said is learnt: a user's next request waits for that."""
        for at in range(STREAMS):
            await self.client(f"user{at}").chat.completions.create(
                model=self.model(f"user{at}"), messages=[{"role": "user", "content": "Hi"}], max_tokens=1
            )

    async def beside(self, learn: str) -> dict[str, float]:
        """Seven streams of the base model beside a user who says something again and again."""
        over = False

        async def talk() -> None:
            turn = 0
            while not over:
                turn += 1
                await self.client("user0", learn).chat.completions.create(
                    model=self.model("user0"), messages=[{"role": "user", "content": f"{turn} {LESSON}"}], max_tokens=4
                )

        talking = asyncio.create_task(talk())
        found = await self.streams([None] * (STREAMS - 1))
        over = True
        await talking
        return found


async def prefill(measured: Measured, count: int) -> float:
    """Milliseconds of a request that computes the lesson's prompt and one token, less those of a prompt of a word."""

    async def spent(say: str) -> float:
        began = time.perf_counter()
        await measured.client("user0").chat.completions.create(
            model=measured.model("user0"), messages=[{"role": "user", "content": say}], max_tokens=1,
            extra_body={"cache_salt": str(time.perf_counter())},
        )  # fmt: skip
        return 1e3 * (time.perf_counter() - began)

    whole = [await spent(LESSON) for _ in range(count)]
    word = [await spent("Hi") for _ in range(count)]
    return statistics.median(whole) - statistics.median(word)


async def lesson(measured: Measured, count: int) -> dict[str, float]:
    """What the worker says of a lesson, when nothing else runs, and the milliseconds of a prefill of its prompt."""
    await measured.client("user0", "wait").chat.completions.create(
        model="smol", messages=[{"role": "user", "content": LESSON}], max_tokens=1
    )
    code, text = measured.server.http("GET", "/v1/users/user0", "user0")
    assert code == 200, text
    found = json.loads(text)["lesson"]
    return {**found, "prefill_ms": await prefill(measured, count)}


Run = Callable[[], Coroutine[Any, Any, dict[str, float]]]


def runs(kind: str, server: Any) -> dict[str, Run]:
    """What is measured of one server."""
    measured = Measured(server, kind == "lora")
    users: list[str | None] = [f"user{i}" for i in range(STREAMS)]
    found: dict[str, Run] = {"base": lambda: measured.streams([None] * STREAMS)}
    if kind != "plain":
        found["users"] = lambda: measured.streams(users)
    if kind.startswith("plugin"):
        found["users learning"] = lambda: measured.streams(users, "on", LESSON)
        found["base beside a user"] = lambda: measured.beside("off")
        found["base beside a user who learns"] = lambda: measured.beside("on")
        found["lesson"] = lambda: lesson(measured, 3)
        for name in ("users learning", "base beside a user who learns"):  # or what comes next is measured beside it
            found[name] = _then(found[name], measured.settled)
    return found


def _then(run: Run, after: Callable[[], Coroutine[Any, Any, None]]) -> Run:
    """What ``run`` finds; ``after`` it comes something that is not measured."""

    async def both() -> dict[str, float]:
        result = await run()
        await after()
        return result

    return both


async def in_turns(servers: dict[str, Any], count: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Of each server and measurement, what ``count`` rounds found; a round before them is not counted."""
    plans = {kind: runs(kind, server) for kind, server in servers.items()}
    found: dict[str, dict[str, list[dict[str, float]]]] = {kind: {} for kind in servers}
    for at in range(count + 1):
        for name in dict.fromkeys(name for plan in plans.values() for name in plan):
            for kind, plan in plans.items():
                if name in plan:
                    result = await plan[name]()
                    if at:
                        found[kind].setdefault(name, []).append(result)
        print(f"round {at} of {count}", flush=True)
    return found


def adapters(model: str, folder: Path) -> list[str]:
    """Arguments of stock vLLM that serve adapters of the rank and in the blocks of the plugin's users."""
    plugin = Options("users", identity="header")
    config = json.loads((Path(model) / "config.json").read_text())
    blocks, d, wide = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    rank = plugin.adapter_rank
    for block in plugin.blocks(blocks):
        name = f"model.layers.{block}.mlp.down_proj"
        state |= {f"{name}.a": torch.randn(rank, wide), f"{name}.b": 1e-4 * torch.randn(rank, d)}
    for i in range(STREAMS):
        export_peft(state, folder / f"user{i}", base_model=model, rank=rank)
    served = [f"user{i}={folder / f'user{i}'}" for i in range(STREAMS)]
    slots = ["--max-loras", str(STREAMS), "--max-lora-rank", str(rank)]
    return ["--enable-lora", *slots, "--lora-modules", *served]


def main() -> None:
    """Measure, print the medians, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", type=float, nargs="*", default=[], help="also measured beside the default")
    parser.add_argument("--json", default="bench/serving/results/vllm_cpu.json")
    given = parser.parse_args()
    os.environ["TTT_TEST_MODEL"] = given.model
    sys.path.insert(0, "tests/serve_vllm")
    import server as servers  # of the tests

    servers.USERS = tuple(f"user{i}" for i in range(STREAMS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended, too
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        running: dict[str, Any] = {}

        def start(kind: str, *arguments: str, **options: Any) -> None:
            place = Path(folder) / kind.replace(" ", "-")
            place.mkdir()
            server = servers.Server(place, *arguments, **options)
            stack.callback(server.kill)
            running[kind] = server.start()

        stock = Path(folder) / "adapters"
        stock.mkdir()
        start("plain", plugin=False)
        start("lora", *adapters(given.model, stock), plugin=False)
        start("plugin", slots=STREAMS)
        for size in given.slices:
            start(f"plugin, slice {size:g}", slots=STREAMS, slice=size)
        found = asyncio.run(in_turns(running, given.rounds))
    command = f"python -m bench.serving.vllm MODEL --rounds {given.rounds}"
    if given.slices:
        command += f" --slices {' '.join(f'{size:g}' for size in given.slices)}"
    written = {
        "machine": provenance("cpu") | {"command": command, "vllm": installed_version(), "load": os.getloadavg()[0]},
        "goals": goals(found),
        "medians": {kind: {name: _medians(each) for name, each in of.items()} for kind, of in found.items()},
        "rounds": found,
    }
    print(json.dumps(written["goals"], indent=1))
    Path(given.json).write_text(json.dumps(written, indent=1) + "\n")


def goals(found: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, dict[str, float]]:
    """Of each kind of plugin, the medians of the ratios of single rounds."""
    plain, lora = found["plain"], found["lora"]
    return {
        kind: {
            "base: tokens/s beside plain vLLM (goal 0.97)": _ratio(of["base"], plain["base"], "tokens_per_second"),
            "users: tokens/s beside vLLM's adapters": _ratio(of["users"], lora["users"], "tokens_per_second"),
            "base: largest gap beside a user who learns, and one who does not (goal 1.5)": _ratio(
                of["base beside a user who learns"], of["base beside a user"], "largest_gap_ms"
            ),
            "a lesson in prefills": statistics.median(
                each["milliseconds"] / each["prefill_ms"] for each in of["lesson"]
            ),
            "one reading of it in prefills (goal 1.0)": statistics.median(
                each["milliseconds"] / each["prefill_ms"] / each["passes"] for each in of["lesson"]
            ),
        }
        for kind, of in found.items()
        if kind.startswith("plugin")
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _ratio(ones: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] / other[name] for one, other in zip(ones, others, strict=True))


if __name__ == "__main__":
    main()
