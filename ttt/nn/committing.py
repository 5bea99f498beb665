"""`CommittingLinear`: how rows are committed to the weight of a layer, and how its change is kept within a budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt.nn.budget import largest_square, scale
from ttt.nn.rates import CALIBRATED, STREAM
from ttt.nn.replay_rows import gather_replay_rows
from ttt.nn.state import StatefulLinear
from ttt.ops.arguments import CommitArguments


class CommittingLinear(StatefulLinear):
    """The part of `ttt.nn.Linear` that writes rows into the weight, by the op `ttt.ops.commit`."""

    def _commit(
        self, x: Tensor, delta: Tensor, eta: Tensor, trace_delta: Tensor | None, gate: Tensor | None = None
    ) -> None:
        """Commit rows to the weight, the trace and the momentum, and count the commit; the window stays as it is."""
        memory, seen = self._replay_source(x)
        torch.ops.ttt.commit(
            *self.commit_arguments(x, delta, eta, trace_delta)._replace(memory=memory, seen=seen, gate=gate)
        )
        self.add_present_inputs(x)

    def commit_arguments(
        self, x: Tensor, delta: Tensor, eta: Tensor, trace_delta: Tensor | None = None
    ) -> CommitArguments:
        """The arguments with which these rows are committed, replaying from the memory."""
        return CommitArguments(
            weight=self.weight, anchor=self.anchor, importance=self.importance, trace=self.trace, x=x, delta=delta,
            eta=eta, trace_delta=trace_delta, memory=self.replayed, seen=self.seen, step=self.step,
            momentum=self.momentum, **self.commit_options(),
        )  # fmt: skip

    def _replay_source(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows that a commit of inputs ``x`` replays, or the memory from which it draws them, and its counter."""
        return (self._replay_rows(x), None) if self.mixes_replay_sources else (self.replayed, self.seen)

    def _replay_rows(self, x: Tensor) -> Tensor:
        """The rows (R, n) that the commit of inputs ``x`` replays, if they come from several sources."""
        c = self.config
        return gather_replay_rows(
            x, self.step, self.seed, memory=self.memory, seen=self.seen, memory_rows=c.replay_rows,
            window_rows=c.distill_rows, past=self.past_inputs, generated_rows=c.generated_rows,
        )  # fmt: skip

    @property
    def mixes_replay_sources(self) -> bool:
        """Whether commits replay rows of other sources than the memory, which are drawn before each commit."""
        return self.config.commit_rows > self.config.replay_rows

    @property
    def replayed(self) -> Tensor | None:
        """The replay memory, if commits replay rows of it; else None."""
        return self.memory if self.config.replay_rows else None

    def commit_options(self) -> dict[str, Any]:
        """The keyword arguments of `ttt.ops.commit` that are not tensors."""
        c = self.config
        beta = max(c.replay_beta, min(c.replay_beta * self.strength, 1.0))  # at 1 the drift is projected out in full
        return {
            "seed": self.seed, "replay_rows": c.commit_rows, "beta": beta,
            "eps": c.replay_eps, "lam": c.ewc_lambda * self.strength, "gamma": c.trace_decay, "kind": c.importance,
            "trace_every": c.trace_every, "mu": c.momentum, "decay": c.decay,
        }  # fmt: skip

    # -- the budget of the change (`ttt.nn.budget`) -----------------------------------------------------------

    def _largest_drift(self) -> Tensor:
        """(): |W - W*|^2 at which the layer's part of the budget is full."""
        sides = self.sharding
        size = sides.output.size(self.out_features) * sides.input.size(self.in_features)
        calibrated, learnt = self.moments[CALIBRATED], self.moments[STREAM]
        return largest_square(self.config, self.share, size, calibrated, learnt)

    @torch.no_grad()
    def _bound_drift(self) -> None:
        """Bring the weight back into the budget after a commit, if there is one. On a GPU the host does not wait."""
        if self.drift is None:
            return
        wide, largest = self.win_eta.dtype, self._largest_drift()
        change = self.weight.to(wide) - self.anchor.to(wide)
        square = torch.as_tensor(self.sharding.norm(change, wide)).double().square()
        factor = scale(square, largest)
        if not factor.is_cpu or float(factor) < 1.0:
            smaller = change.mul_(factor.to(wide)).add_(self.anchor)
            self.weight.copy_(torch.where(factor < 1.0, smaller.to(self.weight.dtype), self.weight))
        self.drift.copy_(square * factor.square())
