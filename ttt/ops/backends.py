"""Counts which backend ran each op, and why a faster one did not; `ttt.info()` prints the counts."""

from __future__ import annotations

from collections import Counter

OPS = ("window_linear", "project_out", "project_out_pair", "window_append", "window_step", "commit", "reservoir_insert", "reservoir_insert_pair",
       "reservoir_draw",
       "low_rank_linear", "low_rank_append", "low_rank_compress")  # fmt: skip

calls: Counter[tuple[str, str, str]] = Counter()
"""(op, backend, why) -> calls; ``why`` is empty unless a slower backend was used."""

unavailable: dict[str, str] = {}
"""Backend ("cpu", "triton") -> why it cannot be used in this process."""


def record(op: str, backend: str, why: str = "") -> None:
    """Count one call of ``op``; ``why`` is the reason why a faster backend was not used."""
    calls[op, backend, why] += 1
