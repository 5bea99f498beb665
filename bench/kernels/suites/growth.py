"""Suite ``growth``: the cost as a function of one parameter at a time; `bench.kernels.plot` draws the curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import ttt
from bench.kernels.case import Case
from bench.kernels.contender import Contender
from bench.kernels.state import LEARNS
from bench.kernels.suites.commit import Commit
from bench.kernels.suites.decode import Decode
from bench.kernels.suites.observe import Observe

SMALL_LLAMA = "llama 12x384"


@dataclasses.dataclass(frozen=True)
class GrowthCommit(Commit):
    """A commit beside the forward pass of its tokens; ``curve`` names the parameter that varies."""

    suite = "growth"
    baseline = "forward"

    curve: str = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.curve}: commit {super().name}"

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        return {name: make for name, make in super().contenders().items() if name in ("ttt", "forward")}

    def parameters(self) -> dict[str, Any]:
        found = super().parameters()
        return found | {"memory_bytes": layer_memory(self.m, self.n, self.dtype)} if self.curve == "d" else found


@dataclasses.dataclass(frozen=True)
class GrowthDecode(Decode):
    """Decoding with more window sizes; ``curve`` names the parameter that varies."""

    suite = "growth"

    curve: str = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.curve}: decode {super().name}"

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        return {"ttt": self.learning, "nn.Linear": self.linear}


@dataclasses.dataclass(frozen=True)
class GrowthObserve(Observe):
    """Reading with different numbers of adapted layers; ``curve`` names the parameter that varies."""

    suite = "growth"

    curve: str = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.curve}: observe {super().name}"


def layer_memory(m: int, n: int, dtype: str) -> dict[str, int]:
    """Bytes of each part of an (m, n) learning layer with the options of `bench.kernels.state.LEARNS`."""
    layer = ttt.nn.Linear(n, m, bias=False, device="meta", dtype=getattr(torch, dtype), config=LEARNS)
    parts: dict[str, tuple[str, ...]] = {
        "weight": ("weight",),
        "anchor": ("anchor",),
        "importance": ("importance",),
        "trace": ("trace",),
    }
    parts |= {"replay memory": ("memory", "recent"), "window": ("win_x", "win_delta", "win_eta")}
    return {part: sum(getattr(layer, name).nbytes for name in names) for part, names in parts.items()}


def cases(device: str) -> list[Case]:
    """Cost for several d, T, replay rows, windows and numbers of adapted layers; memory of a layer for several d."""
    cuda = device == "cuda"
    found: list[Case] = []
    for dtype in ("bfloat16",) if cuda else ("float32", "bfloat16"):
        d = 4096 if cuda else 1024

        def commit(curve: str, d: int, tokens: int, replay: int, dtype: str = dtype) -> Case:
            return GrowthCommit(device, dtype, d, d, tokens, replay, dtype, curve=curve)

        found += [commit("T", d, tokens, 0) for tokens in (1, 4, 16, 64, 256, 1024)]
        found += [commit("replay rows", d, 16, rows) for rows in (0, 1, 2, 4, 8, 16, 32, 64)]
        found += [commit("d", size, 16, 0) for size in (1024, 256, 512, 2048, 4096, *((8192,) if cuda else ()))]
        size = 4096 if cuda else 2048
        windows = (4, 8, 16, 32, 64, 128, 256)
        found += [GrowthDecode(device, dtype, size, size, c, 1, dtype, curve="window") for c in windows]
    found += [
        GrowthObserve(device, "float32", SMALL_LLAMA, 64, 128, f"last {k}", curve="adapted layers")
        for k in (1, 2, 3, 6, 9, 12)
    ]
    return found
