"""Counts which backend ran each op, and why a faster one did not; `ttt.info()` shows the counts."""

from __future__ import annotations

from collections import Counter

JOINED = ("window_step", "project_out_pair", "reservoir_insert_pair")
"""Ops that layers use, each of which does the work of two calls of others."""

OPS = ("window_linear", "project_out", "window_append", "commit", "reservoir_insert", "reservoir_draw",
       "low_rank_linear", "low_rank_append", "low_rank_compress", *JOINED)  # fmt: skip

MANY = ("experts_forward", "experts_backward", "experts_update", "experts_learn")
"""What is done for all experts of a stack in one call: outputs, the gradients at inputs, the agreement of new gradients
with the latest updates (`ttt.nn.feedback`), and learning."""

MANY_ON_GPU = ("experts_forward", "experts_backward")
"""Which of these there is a Triton kernel for."""

ONE_BY_ONE = "expert by expert"
"""The backend of what is not done in one call."""

calls: Counter[tuple[str, str, str]] = Counter()
"""(op, backend, why) -> calls; ``why`` is empty unless a slower backend was used."""

unavailable: dict[str, str] = {}
"""Backend ("cpu", "triton") -> why it cannot be used in this process."""


def record(op: str, backend: str, why: str = "") -> None:
    """Count one call of ``op``; ``why`` is the reason why a faster backend was not used."""
    calls[op, backend, why] += 1
