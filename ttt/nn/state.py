"""What a learning layer holds: reading it, replacing it, going back, and forgetting it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttt.nn import gaussian
from ttt.nn.base import Adapted
from ttt.nn.rates import STREAM

if TYPE_CHECKING:
    from ttt.nn.graph_steps import Steps

BASE = ("anchor", "importance", "importance_scale", "memory", "seen", "basis", *gaussian.PAST)
"""Buffers that calibrating and consolidating write, and learning does not."""


class Held(Adapted):
    """The state of a `ttt.nn.Linear`, whose docstring lists the buffers."""

    anchor: Tensor
    moments: Tensor
    pending: int
    # Names of buffers that other models may hold, too (`ttt.fork`): never written in place; see `own`.
    shared: set[str]
    base: dict[str, Tensor]  # state from before the first consolidation; empty until then
    _steps: Steps | None

    def state(self) -> dict[str, Tensor]:
        """The live state tensors by name (not copies), and ``pending`` as a tensor."""
        out = {"weight": self.weight.detach()}
        out |= dict(self.named_buffers(recurse=False))
        out["pending"] = torch.tensor([self.pending])
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` (as from `state`) into the live tensors. Names and shapes must fit; the caller checks.

        Raises:
            ValueError: as `check_pending`.
        """
        self.check_pending(state)
        for name, value in state.items():
            if name == "pending":
                self.pending = int(value)
            else:
                self._take(name, value)
        if state.keys() >= self.state().keys():
            self.torn = ""

    def check_pending(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError if the layer is capturable and ``pending`` is no number of rows that its steps make."""
        steps = self._steps
        if steps is not None and "pending" in state and not steps.takes(int(state["pending"])):
            raise ValueError(
                f"pending = {int(state['pending'])} is no whole number of the layer's steps of {steps.rows} rows; "
                "call capturable_(None) first"
            )

    def own(self, *names: str, copy: bool = True) -> None:
        """Make buffers ready to be written: those shared with other models are replaced by the layer's own.

        ``copy`` False leaves the new ones' content undefined.
        """
        replaced = self.shared.intersection(names)
        if replaced and self._steps is not None:
            raise RuntimeError(
                f"{sorted(replaced)} are shared with a fork and must be replaced, but a captured graph may hold them; "
                "call capturable_(None) first"
            )
        for name in replaced:
            held = getattr(self, name)
            setattr(self, name, held.clone() if copy else torch.empty_like(held))
            self.shared.discard(name)

    def _take(self, name: str, value: Tensor) -> None:
        """Give the live tensor ``name`` the content of ``value``. A shared one that has it already stays shared."""
        live = getattr(self, name).detach()
        if name in self.shared:
            if torch.equal(live, value.to(live.device)):
                return
            self.own(name, copy=False)
            live = getattr(self, name)
        live.copy_(value)

    def remember_base(self) -> None:
        """Keep what `reset` and `ttt.restore_` go back to; called before the anchor first moves."""
        if not self.base:
            held = {name: b for name in BASE if (b := getattr(self, name)) is not None}
            self.base = {name: b if name in self.shared else b.clone() for name, b in held.items()}

    @property
    def base_weight(self) -> Tensor:
        """(m, n): the weight from before any learning."""
        return self.base.get("anchor", self.anchor)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything learnt since calibration: weights, trace, window, and what was consolidated."""
        for name, value in self.base.items():
            self._take(name, value)
        self.base = {}
        self.weight.copy_(self.anchor)
        # Zeroed, not only marked empty: what a user said must not stay in memory.
        learnt = ("trace", "momentum", "recent", "recent_seen", "step", "tokens", *gaussian.PRESENT)
        for name in ("win_x", "win_delta", "win_eta", "win_trace", *learnt):
            if (b := getattr(self, name)) is not None:
                b.zero_()
        if self.moments is not None:
            self.moments[STREAM].zero_()
        self.pending = 0
        self.torn = ""
