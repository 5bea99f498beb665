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


class WindowStepArguments(NamedTuple):
    """The arguments of ``torch.ops.ttt.window_step``, in the order of its schema.

    It is `ttt.ops.commit` of the first ``held`` rows of the window if ``counters`` say that it is full, and then
    `ttt.ops.window_append`, which documents ``counters`` and ``tokens``. ``row_weight`` (B,) is written to the rows of
    ``win_weight`` (C,) that belong to the new tokens. If ``gate`` holds 0, nothing changes.
    """

    win_x: Tensor
    win_delta: Tensor
    win_eta: Tensor
    win_trace: Tensor | None
    x: Tensor
    delta: Tensor
    eta: Tensor
    trace_delta: Tensor | None
    counters: Tensor
    tokens: Tensor | None
    gate: Tensor | None
    win_weight: Tensor | None
    row_weight: Tensor | None
    held: int
    weight: Tensor
    anchor: Tensor | None
    importance: Tensor | None
    trace: Tensor | None
    memory: Tensor | None
    seen: Tensor | None
    step: Tensor
    seed: int
    replay_rows: int
    beta: float
    eps: float
    lam: float
    gamma: float
    kind: str
    trace_every: int
    momentum: Tensor | None
    mu: float
    decay: float

    @property
    def commit(self) -> CommitArguments:
        """The commit of the window; its gate is open whatever the counters say."""
        held, traced = self.held, self.win_trace
        return CommitArguments(
            self.weight, self.anchor, self.importance, self.trace, self.win_x[:held], self.win_delta[:held],
            self.win_eta[:held], None if traced is None else traced[:held], self.memory, self.seen, self.step,
            self.seed, self.replay_rows, self.beta, self.eps, self.lam, self.gamma, self.kind, self.trace_every,
            None, self.momentum, self.mu, self.decay,
        )  # fmt: skip

    @property
    def append(self) -> tuple:
        """The arguments of `ttt.ops.window_append`."""
        rows = (self.x, self.delta, self.eta, self.trace_delta)
        return *self[:4], *rows, 0, self.counters, self.tokens, self.gate
