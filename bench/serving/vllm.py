"""The vLLM plugin beside plain vLLM and beside vLLM's own adapters: ``python -m bench.serving.vllm MODEL``.

Three servers run one after another. Run it in the environment of ``make test-vllm``. Written
is a JSON file: tokens per second and the largest gap between two tokens of 8 streams, and what learning costs in units
of a prefill of the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
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


async def lesson(measured: Measured) -> dict[str, float]:
    """What the worker says of a lesson, when nothing else runs."""
    await measured.client("user0", "wait").chat.completions.create(
        model="smol", messages=[{"role": "user", "content": LESSON}], max_tokens=1
    )
    code, text = measured.server.http("GET", "/v1/users/user0", "user0")
    assert code == 200, text
    return json.loads(text)["lesson"]


async def rounds(count: int, run: Callable[[], Coroutine[Any, Any, dict[str, float]]]) -> dict[str, Any]:
    """The medians of ``count`` rounds, and all of them."""
    await run()
    found = [await run() for _ in range(count)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]} | {"rounds": found}


async def measure(kind: str, server: Any, count: int) -> dict[str, Any]:
    """Everything that is measured of one server."""
    measured = Measured(server, kind == "lora")
    users: list[str | None] = [f"user{i}" for i in range(STREAMS)]
    found: dict[str, Any] = {"base": await rounds(count, lambda: measured.streams([None] * STREAMS))}
    if kind != "plain":
        found["users"] = await rounds(count, lambda: measured.streams(users))
    if kind == "plugin":
        found["users learning"] = await rounds(count, lambda: measured.streams(users, "on", LESSON))
        found["base beside a user"] = await rounds(count, lambda: measured.beside("off"))
        found["base beside a user who learns"] = await rounds(count, lambda: measured.beside("on"))
        found["prefill_ms"] = await prefill(measured, 2 * count + 1)
        lessons = [await lesson(measured) for _ in range(count)]
        found["lesson"] = {name: statistics.median(each[name] for each in lessons) for name in lessons[0]}
    return found


def adapters(model: str, folder: Path) -> list[str]:
    """Arguments of stock vLLM that serve adapters of the size of the plugin's users."""
    config = json.loads((Path(model) / "config.json").read_text())
    blocks, d, wide = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for block in range(blocks - -(-blocks // 4), blocks):
        name = f"model.layers.{block}.mlp.down_proj"
        state |= {f"{name}.a": torch.randn(64, wide), f"{name}.b": 1e-4 * torch.randn(64, d)}
    for i in range(STREAMS):
        export_peft(state, folder / f"user{i}", base_model=model, rank=64)
    served = [f"user{i}={folder / f'user{i}'}" for i in range(STREAMS)]
    slots = ["--max-loras", str(STREAMS), "--max-lora-rank", "64"]
    return ["--enable-lora", *slots, "--lora-modules", *served]


def main() -> None:
    """Measure, print the medians, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="bench/serving/results/vllm_cpu.json")
    given = parser.parse_args()
    os.environ["TTT_TEST_MODEL"] = given.model
    sys.path.insert(0, "tests/serve_vllm")
    import server as servers  # of the tests

    servers.USERS = tuple(f"user{i}" for i in range(STREAMS))
    results: dict[str, Any] = {}
    for kind in ("plain", "lora", "plugin"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = adapters(given.model, Path(folder)) if kind == "lora" else []
            running = servers.Server(Path(folder), *arguments, plugin=kind == "plugin", slots=STREAMS)
            running.start()
            try:
                results[kind] = asyncio.run(measure(kind, running, given.rounds))
            finally:
                running.kill()
        print(kind, json.dumps(results[kind])[:2000], flush=True)
    plugin, plain = results["plugin"], results["plain"]
    goals = {
        "base tokens/s beside plain vLLM (goal 0.97)": _ratio(plugin["base"], plain["base"], "tokens_per_second"),
        "users' tokens/s beside stock adapters": _ratio(plugin["users"], results["lora"]["users"], "tokens_per_second"),
        "largest gap beside a user who learns, and who does not (goal 1.5)": _ratio(
            plugin["base beside a user who learns"], plugin["base beside a user"], "largest_gap_ms"
        ),
        "a lesson in prefills (goal 1.0)": plugin["lesson"]["milliseconds"] / plugin["prefill_ms"],
    }
    print(json.dumps(goals, indent=1))
    written = {
        "machine": provenance("cpu") | {"vllm": installed_version(), "load": os.getloadavg()[0]},
        "goals": goals,
        **results,
    }
    Path(given.json).write_text(json.dumps(written, indent=1) + "\n")


def _ratio(one: dict[str, Any], other: dict[str, Any], name: str) -> float:
    return one[name] / other[name]


if __name__ == "__main__":
    main()
