"""Named arguments of ops that have many: one structure for the checks and every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CommitArguments(NamedTuple):
    """The arguments of `ttt.ops.commit`, in the order of its schema; `ttt.ops.commit` documents each of them.

    A backend takes them as ``CommitArguments(*args)``.
    """

    weight: Tensor
    anchor: Tensor | None
    importance: Tensor | None
    trace: Tensor | None
    x: Tensor
    delta: Tensor
    eta: Tensor
    trace_delta: Tensor | None
    memory: Tensor | None
    seen: Tensor | None
    step: Tensor
    seed: int = 0
    replay_rows: int = 0
    beta: float = 0.1
    eps: float = 1e-3
    lam: float = 0.0
    gamma: float = 1.0
    kind: str = "fisher"
    trace_every: int = 1
    gate: Tensor | None = None
    momentum: Tensor | None = None
    mu: float = 0.0
    decay: float = 0.0

    @property
    def traced_delta(self) -> Tensor:
        """The gradient (T, m) that the trace uses."""
        return self.delta if self.trace_delta is None else self.trace_delta

    @property
    def written(self) -> list[Tensor]:
        """The tensors that a commit writes."""
        return [t for t in (self.weight, self.trace, self.step, self.momentum) if t is not None]
