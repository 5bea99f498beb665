"""Check and time one case, and make its rows of the JSON."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from bench.kernels.case import Case
from bench.kernels.contender import Contender, Unavailable
from bench.kernels.timing import CLOCKS, quartiles, sampler

MIN_ROUNDS = 3


def checked(case: Case) -> tuple[dict[str, Contender], list[dict[str, Any]]]:
    """Make the contenders of ``case`` and check them.

    Returns:
        (contenders whose check passed, by name; a row for each of the others with ``reason`` and ``failed``, which is
        False for a contender that is `Unavailable`).
    """
    good: dict[str, Contender] = {}
    not_timed: list[dict[str, Any]] = []
    for name, make in case.contenders().items():
        try:
            contender = make()
            contender.check()
        except Exception as error:  # no error of a contender, a compiler's included, may end the run
            reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
            row = {"suite": case.suite, "case": case.name, "dtype": case.dtype, "contender": name}
            not_timed.append(row | {"reason": reason[:1000], "failed": not isinstance(error, Unavailable)})
            continue
        good[name] = contender
    return good, not_timed


@contextlib.contextmanager
def threads_of(case: Case) -> Iterator[None]:
    """Set the number of torch threads that the case asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    case: Case, rounds: int, seconds: float = 10.0, clock: str = "wall"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check and time the contenders of ``case``.

    In each round every ceiling and contender takes one sample, so that all of them are subject to the same
    disturbances of the machine.

    Args:
        rounds: number of samples of each contender. Measuring stops after ``seconds``, but not before `MIN_ROUNDS`.
        clock: of `bench.kernels.timing.CLOCKS`; measures the samples and ``seconds``.

    Returns:
        (a row for each contender, a row for each contender that was not timed, with the reason).
    """
    with threads_of(case):
        contenders, not_timed = checked(case)
        samples, fields = {}, {}
        if contenders:
            ceilings = {name: make() for name, make in case.ceilings().items()}
            for name, contender in (ceilings | contenders).items():
                samples[name], fields[name] = sampler(case.device, contender, clock)
                fields[name] |= contender.fields
        times: dict[str, list[float]] = {name: [] for name in samples}
        began = CLOCKS[clock]()
        for number in range(rounds if samples else 0):
            if number >= MIN_ROUNDS and CLOCKS[clock]() - began > seconds:
                break
            for name, sample in samples.items():
                times[name].append(sample())
    return [row_of(case, name, times, fields[name]) for name in contenders], not_timed


def row_of(case: Case, name: str, times: dict[str, list[float]], fields: dict[str, Any]) -> dict[str, Any]:
    """The figures of one contender.

    A ratio of times is the median of the ratios in each round, not the ratio of the medians.

    Args:
        times: seconds per unit in each round, by name of contender or ceiling (whose unit is a byte or a flop).
        fields: further fields of the row.
    """
    seconds = times[name]
    low, median, high = quartiles(seconds)
    moved, flops = case.bytes(name), case.flops(name)

    def against(other: str | None, share: float = 1.0) -> float | None:
        """Median over the rounds of time / (``share`` times the time of ``other``)."""
        if other not in times or not times[other]:
            return None
        return statistics.median(s / (share * o) for s, o in zip(seconds, times[other], strict=True))

    def percent(ceiling: str, amount: int | None) -> float | None:
        found = against(ceiling, amount) if amount else None
        return None if found is None else 100 / found

    row: dict[str, Any] = {"suite": case.suite, "case": case.name, "dtype": case.dtype, "contender": name}
    row |= {"unit": case.unit, "ours": name == case.ours, "rounds": len(seconds)}
    row |= {"us": median * 1e6, "us_q1": low * 1e6, "us_q3": high * 1e6}
    row |= {"ratio": against(case.baseline), "baseline": case.baseline, "ratio_to_forward": against(case.forward)}
    row |= {"bytes": moved, "flops": flops}
    row |= {"gb_per_s": moved and moved / median / 1e9, "tflop_per_s": flops and flops / median / 1e12}
    row["percent_of_copy"] = percent("copy", moved)
    row["ratio_to_bound"] = against("copy", moved) if moved else None
    row["ratio_to_read_bound"] = against("read", moved) if moved else None
    if (parts := case.parts(name)) is not None and "copy" in times and "square matmul" in times:
        row |= _against_parts(parts, seconds, times["copy"], times["square matmul"])
    row["percent_of_matmul"] = percent("matmul", case.product_flops(name))
    row["percent_of_square_matmul"] = percent("square matmul", case.product_flops(name))
    row["ceiling"] = case.ceiling
    row["percent_of_ceiling"] = row[f"percent_of_{case.ceiling}"] if case.ceiling else None
    row["us_above_baseline"] = _above(seconds, times.get(case.baseline))
    units = {"copy": "gb_per_s", "read": "gb_per_s", "matmul": "tflop_per_s", "square matmul": "tflop_per_s"}
    for ceiling, unit in units.items():
        if times.get(ceiling):
            rate = 1 / statistics.median(times[ceiling])
            row[f"{ceiling.replace(' ', '_')}_{unit}"] = rate / (1e9 if unit == "gb_per_s" else 1e12)
    row |= fields
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} | case.parameters()


def _against_parts(
    parts: list[tuple[float, float]], seconds: list[float], byte: list[float], flop: list[float]
) -> dict[str, float]:
    """Medians of the time divided by two bounds of consecutive ``parts``, given the seconds of a byte and of a flop.

    ``ratio_to_part_bound``: each part takes the larger of the times of its bytes and of its flops.
    ``ratio_to_part_sum``: it takes both, one after the other.
    """
    rounds = list(zip(seconds, byte, flop, strict=True))
    larger, both = (
        statistics.median(s / sum(of(moved * b, flops * f) for moved, flops in parts) for s, b, f in rounds)
        for of in (max, lambda x, y: x + y)
    )
    return {"ratio_to_part_bound": larger, "ratio_to_part_sum": both}


def _above(seconds: list[float], baseline: list[float] | None) -> float | None:
    if not baseline:
        return None
    return 1e6 * statistics.median(s - b for s, b in zip(seconds, baseline, strict=True))


def summary_of_ceilings(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ceilings of a whole run: median rates of copy and read, and the best rate of a square product by dtype."""
    found = {}
    for name in ("copy_gb_per_s", "read_gb_per_s"):
        rates = [r[name] for r in rows if name in r]
        if rates:
            found[name] = statistics.median(rates)
    for dtype in sorted({r["dtype"] for r in rows}):
        rates = [
            r["square_matmul_tflop_per_s"] for r in rows if r["dtype"] == dtype and "square_matmul_tflop_per_s" in r
        ]
        if rates:
            found[f"matmul_{dtype}_tflop_per_s"] = max(rates)
    return found
