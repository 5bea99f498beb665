"""Timing: one sample of a contender on CPU or GPU, and the quartiles of several samples."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from bench.kernels.contender import Contender

SAMPLE_SECONDS = 0.03
"""A sample repeats the work until it takes about this long, which is far above the clock's resolution."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks, in seconds. "cpu" stands still while other processes have the core, and adds up the threads of this one."""
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


def sampler(device: str, contender: Contender, clock: str = "wall") -> tuple[Callable[[], float], dict]:
    """(function that takes one sample, in seconds per unit; fields for the row). Warms the contender up.

    Args:
        clock: of `CLOCKS`; on a GPU its own events are the clock.
    """
    return _cuda_sampler(contender) if device == "cuda" else _cpu_sampler(contender, CLOCKS[clock])


def _repeats(seconds: float) -> int:
    return max(1, min(20_000, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def _cpu_sampler(contender: Contender, clock: Callable[[], float]) -> tuple[Callable[[], float], dict]:
    run = contender.run
    for _ in range(2):  # the first call builds caches and touches pages
        began = clock()
        run()
        took = clock() - began
        if took > 4 * SAMPLE_SECONDS:  # the first call's extra time is a small part of it
            break
    repeats = _repeats(took)

    def sample() -> float:
        start = clock()
        for _ in range(repeats):
            run()
        return (clock() - start) / (repeats * contender.units)

    return sample, {}


def _cuda_sampler(contender: Contender) -> tuple[Callable[[], float], dict]:
    """Times with CUDA events, after flushing the L2 cache; in a CUDA graph where the work can be captured.

    The graph holds a whole rotation among the layers: a graph of one call would replay the same addresses, and so
    always find the same layer in the cache.
    """
    run, cycle = contender.run, contender.cycle
    fields: dict = {"cuda_graph": False}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(cycle):  # a whole rotation, after which state on the host is as before
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
        except Exception as error:  # timed without a graph, launches included; the row says so
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
