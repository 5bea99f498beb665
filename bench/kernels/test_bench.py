"""``pytest bench --benchmark-only``: the cases of `bench.kernels.suites` under pytest-benchmark.

By default it runs the smaller selection; ``TTT_BENCH_ALL=1`` runs all cases, ``TTT_BENCH_DEVICE=cuda`` those of a GPU.
Times are of one ``run`` of a contender, which processes ``units`` units (see the extra information);
`bench.kernels.run` reports times per unit.
"""

from __future__ import annotations

import os
import time

import pytest
import torch

from bench.kernels.case import Case
from bench.kernels.contender import Unavailable
from bench.kernels.measure import threads_of
from bench.kernels.suites import select

pytest.importorskip("pytest_benchmark")

DEVICE = os.environ.get("TTT_BENCH_DEVICE", "cpu")
CASES = select(DEVICE, quick=not os.environ.get("TTT_BENCH_ALL"))
PARAMETERS = [
    pytest.param(case, name, id=f"{case.suite}-{case.name}-{case.dtype}-{name}".replace(" ", ""))
    for case in CASES
    for name in case.contenders()
]


@pytest.mark.parametrize(("case", "name"), PARAMETERS)
def test_bench(case: Case, name: str, benchmark) -> None:
    with threads_of(case):
        try:
            contender = case.contenders()[name]()
            contender.check()
        except Unavailable as why:
            pytest.skip(str(why))
        benchmark.group = f"{case.suite}: {case.name}, {case.dtype}"
        benchmark.extra_info.update(case.parameters(), unit=case.unit, units=contender.units)
        benchmark.extra_info.update(bytes=case.bytes(name), flops=case.flops(name), **contender.fields)

        def work() -> None:
            contender.run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        work()
        began = time.perf_counter()
        work()
        iterations = max(1, min(1000, round(0.01 / (time.perf_counter() - began))))
        benchmark.pedantic(work, rounds=5, iterations=iterations)
