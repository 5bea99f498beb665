"""Timing of contenders in turn, in one process, and the machine's own ceilings."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def clock(device: str, run: Callable[[], None]) -> float:
    """Seconds of one call, by CUDA events on a GPU."""
    if device != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(device: str, contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, all of them in turn: they meet the same noise."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(clock(device, run))
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def copy_rate(device: str, rounds: int = 7) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    size = 1 << (30 if device == "cuda" else 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved(device, {"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * size / statistics.median(times)


def matmul_rate(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """Flops per second of a square matrix product."""
    # Where a processor has no bfloat16 units its product is hundreds of times slower.
    d = 8192 if device == "cuda" else (2048 if dtype == torch.float32 else 256)
    a, b = (torch.randn(d, d, device=device, dtype=dtype) for _ in range(2))
    times = interleaved(device, {"matmul": lambda: torch.mm(a, b)}, rounds)["matmul"]
    return 2 * d**3 / statistics.median(times)


def machine(device: str) -> dict[str, object]:
    """What ran where: for the first line of every result."""
    import ttt

    active = ttt.info(file=None)
    name = active["processor"]
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()} ({name})"
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": active["threads"],
        "isa": active["isa"],
        "python": active["python"],
        "torch": active["torch"],
        "triton": active["triton"],
        "commit": _commit_hash(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit_hash() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
