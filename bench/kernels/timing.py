"""Samples of contenders in turn, in one process, and the machine's own ceilings."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.kernels.registry import Contender

SAMPLE_SECONDS = 0.03
"""A sample repeats the work until it lasts about so long: far above the clock's resolution."""
COPY_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


def sampler(device: str, contender: Contender) -> tuple[Callable[[], float], dict]:
    """A function that takes one sample (seconds a unit), and fields for the row. Warms the contender up."""
    return (_cuda_sampler if device == "cuda" else _cpu_sampler)(contender)


def _repeats(seconds: float) -> int:
    return max(1, min(20_000, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def _cpu_sampler(contender: Contender) -> tuple[Callable[[], float], dict]:
    run = contender.run
    for _ in range(2):  # the first call builds caches and touches pages
        began = time.perf_counter()
        run()
        took = time.perf_counter() - began
        if took > 4 * SAMPLE_SECONDS:  # too long to matter
            break
    repeats = _repeats(took)

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / (repeats * contender.units)

    return sample, {}


def _cuda_sampler(contender: Contender) -> tuple[Callable[[], float], dict]:
    """By events, in a CUDA graph of a whole rotation where the work can be captured; the L2 is flushed before.

    One call would be captured with its addresses, and every replay would meet the same, warm layer.
    """
    run, cycle = contender.run, contender.cycle
    fields: dict = {"cuda_graph": False}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(cycle):  # a whole rotation: state on the host ends where it began
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    def eager() -> None:
        for _ in range(cycle):
            run()

    work: Callable[[], object] = eager
    if contender.graph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                eager()
            work, fields["cuda_graph"] = graph.replay, True
        except Exception as error:  # timed with its launches then, and the row says so
            fields["cuda_graph_error"] = f"{type(error).__name__}: {error}"[:200]
            torch.cuda.synchronize()
    repeats = _repeats(_cuda_seconds(work, 1))
    return (lambda: _cuda_seconds(work, repeats) / (repeats * cycle * contender.units)), fields


def _cuda_seconds(work: Callable[[], object], repeats: int) -> float:
    _flush_buffer().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


# -- ceilings -----------------------------------------------------------------------------------------------------


def _no_check() -> None:
    """torch's own copy and matrix product are taken to be right."""


@functools.cache
def _copy_buffers(device: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Written, not only allocated: the system hands out pages at the first touch.
    return torch.ones(size // 4, device=device), torch.zeros(size // 4, device=device)


def copy_ceiling(device: str) -> Contender:
    """A copy of a buffer larger than any cache; its unit is one byte, read and written bytes both counted."""
    source, target = _copy_buffers(device, COPY_BYTES[device])
    return Contender(lambda: target.copy_(source), _no_check, units=2 * COPY_BYTES[device])


def read_ceiling(device: str) -> Contender:
    """The same buffer's maximum, which reads it and writes nothing; its unit is one byte.

    Of torch's reductions it comes nearest to a loop that only loads: on an AMD EPYC (Zen 4, 2 threads) 32 to 33 GB/s,
    which is what such a loop reaches there, and the sum 28 to 30.
    """
    source, _ = _copy_buffers(device, COPY_BYTES[device])
    return Contender(source.max, _no_check, units=COPY_BYTES[device])


def product_ceiling(device: str, dtype: str, m: int, k: int, n: int) -> Contender:
    """torch's (m x k)(k x n), its unit being one flop."""
    a, b = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in ((k, m), (k, n)))
    out = torch.zeros(m, n, device=device, dtype=a.dtype)
    return Contender(lambda: torch.mm(a.T, b, out=out), _no_check, units=2 * m * k * n)


def square_ceiling(device: str, dtype: str) -> Contender:
    """A square product, as large as takes a fifth of a second at most: without bf16 units it is 100 times slower."""
    return product_ceiling(device, dtype, *(_square(device, dtype, torch.get_num_threads()),) * 3)


@functools.cache
def _square(device: str, dtype: str, threads: int) -> int:
    if device == "cuda":
        return 8192
    d = 256
    while d < 2048:
        product = product_ceiling(device, dtype, d, d, d)
        product.run()
        began = time.perf_counter()
        product.run()
        if (time.perf_counter() - began) * 8 > 0.2:
            break
        d *= 2
    return d


# -- machine ------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, object]:
    """What ran where, with which versions: for the first line of every result."""
    import ttt

    active = ttt.info(file=None)
    name = active["processor"]
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()} ({name})"
    return {
        "device": name,
        "kind": device,
        "cores": os.cpu_count(),
        "threads": active["threads"],
        "isa": active["isa"],
        "python": active["python"],
        "torch": active["torch"],
        "triton": active["triton"],
        "system": platform.platform(),
        "commit": _commit_hash(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _commit_hash() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
