"""`ttt.nn.LowRankLinear`: an `nn.Linear` with low-rank weights of many users beside its own, in one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ttt import ops
from ttt.config import TTTConfig
from ttt.defences import LowRank
from ttt.nn.base import Adapted, Layout
from ttt.nn.cpu_binding import LowRankBinding, binding_of
from ttt.nn.directions import count_directions, project_inputs
from ttt.nn.rates import Rates, count_, places, rates
from ttt.ops.reference import _wide

PER_ROW = ("a", "b")
PER_SLOT = ("eta_sum", "lost", "step")


class Routing:
    """Whose the rows of the present batch are; one for all layers of a model. ``slots`` (B,) int32, or None."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self._tokens: dict[int, Tensor] = {}

    def set(self, slots: Tensor | None) -> None:
        """``slots``: (B,) int32, the slot of each row of the batch, -1 for the base model; None: all are the base's."""
        self.slots, self._tokens = slots, {}

    def tokens(self, x: Tensor) -> Tensor | None:
        """(T,) int32: the slot of each token of ``x`` (B, ..., n).

        Raises:
            ValueError: if ``x`` has another number of rows.
        """
        if self.slots is None:
            return None
        batch = self.slots.numel()
        if x.ndim < 2 or x.shape[0] != batch:
            raise ValueError(f"x must have shape ({batch}, ..., n) for {batch} users, got {tuple(x.shape)}")
        each = x.shape[1:-1].numel()
        if each not in self._tokens:
            self._tokens[each] = self.slots.repeat_interleave(each)
        return self._tokens[each]


class _Capture(torch.autograd.Function):
    """As that of `ttt.nn.Linear`: hands (x, delta) to the layer, and makes no gradient of a weight.

    dL/dx_t = delta_t W + (delta_t B_u^T) A_u.
    """

    @staticmethod
    def forward(ctx, x, root, layer, users):
        ctx.save_for_backward(x, users)
        ctx.layer = layer
        return layer._product(x, users)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, users = ctx.saved_tensors
        layer = ctx.layer
        if layer.sink is not None:
            delta = grad.detach().reshape(-1, layer.out_features)
            layer.sink.append((x.detach().reshape(-1, layer.in_features), delta))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return layer._transposed_product(grad, users), None, None, None


class LowRankLinear(Adapted):
    """y_t = W x_t + b + B_u^T (A_u x_t): a linear layer for a batch in which each row belongs to a user, or to none.

    ``weight`` and ``bias`` never change; rows of no user get the base layer's output bit for bit. The state is in
    buffers that are no part of `state_dict`, at fixed addresses. S slots of R = rank + window rows:

    =================  ============  ==========================================================
    ``a``              (S, R, n)     inputs, or right singular vectors,
    ``b``              (S, R, m)     and -eta delta, or left ones. In float16 a step below 3e-8 is 0
    ``rows``           (S,) int32    rows in use
    ``eta_sum``        (S,)          steps since the slot was compressed
    ``lost``           (S,)          bound on the Frobenius norm of what truncation dropped
    ``step``           (S,) int64    compressions so far
    ``importance_m``   (m,)          shared by all users, if ``ewc_lambda`` > 0: Omega_ij is taken
    ``importance_n``   (n,)          as importance_m[i] importance_n[j], by its row and column means
    ``memory``         (K, n)        shared, if ``replay_rows`` or ``orthogonal`` > 0: inputs whose
    ``seen``           (1,)          outputs the anchor defines, and how many rows ever entered
    ``basis``          (k, n)        shared, if ``orthogonal`` > 0: U, orthonormal directions that
                                     learning leaves alone, or rows of zeros
    ``calibrated``     (3,)          shared, unless ``rate`` is "constant"; float64: sums of |x|^2 and
                                     |delta|^2 |x|^2, and rows, at calibration,
    ``moments``        (S, 3)        and of each user since
    =================  ============  ==========================================================

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        config: see `TTTConfig`; its ``per_user`` (`ttt.LowRank`) says how many slots there are.
        name: seeds this layer's random draws, together with ``config.seed``.
    """

    a: Tensor
    b: Tensor
    rows: Tensor
    eta_sum: Tensor
    lost: Tensor
    step: Tensor
    # None where the configuration does without them:
    importance_m: Tensor
    importance_n: Tensor
    memory: Tensor
    seen: Tensor
    basis: Tensor
    calibrated: Tensor
    moments: Tensor

    @staticmethod
    def _default_config() -> TTTConfig:
        return TTTConfig(per_user=LowRank())

    def _layout(self, dtype: torch.dtype) -> Layout:
        config, wide, low_rank = self.config, _wide(dtype), self.low_rank
        m, n = self.out_features, self.in_features
        k, protects, scaled = count_directions(config.orthogonal, n), config.ewc_lambda > 0, config.rate != "constant"
        remembers = config.replay_rows > 0 or k > 0
        return {
            "a": ((low_rank.slots, low_rank.capacity, n), dtype),
            "b": ((low_rank.slots, low_rank.capacity, m), dtype),
            "rows": ((low_rank.slots,), torch.int32),
            "eta_sum": ((low_rank.slots,), wide),
            "lost": ((low_rank.slots,), wide),
            "step": ((low_rank.slots,), torch.int64),
            "importance_m": ((m,), wide) if protects else None,
            "importance_n": ((n,), wide) if protects else None,
            "memory": ((config.replay_capacity, n), dtype) if remembers else None,
            "seen": ((1,), torch.int64) if remembers else None,
            "basis": ((k, n), dtype) if k else None,
            "calibrated": ((3,), torch.float64) if scaled else None,
            "moments": ((low_rank.slots, 3), torch.float64) if scaled else None,
        }

    def _build(self, config: TTTConfig, name: str) -> None:
        if config.per_user is None:
            raise ValueError("config.per_user must be a ttt.LowRank, got None")
        self.low_rank = config.per_user
        self.routing = Routing()
        super()._build(config, name)

    def _bind(self) -> LowRankBinding:
        return LowRankBinding(self)

    # -- using ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., n) -> (B, ..., m), row by row with the weights of the users that `ttt.users` names.

        Gradients reach ``x``; no weight gets one.
        """
        users = self.routing.tokens(x)
        if torch.is_grad_enabled() and (self.sink is not None or x.requires_grad):
            return _Capture.apply(x, self._root, self, users)
        return self._product(x, users)

    def _product(self, x: Tensor, users: Tensor | None) -> Tensor:
        if users is None:
            return linear(x, self.weight, self.bias)
        binding = binding_of(self)
        if binding is not None and (y := binding.forward(x, users)) is not None:
            return y
        return ops.low_rank_linear(x.contiguous(), self.weight, self.bias, self.a, self.b, self.rows, users)

    def _transposed_product(self, delta: Tensor, users: Tensor | None) -> Tensor:
        if users is None:
            return delta @ self.weight
        return ops.low_rank_linear(delta.contiguous(), self.weight.T, None, self.b, self.a, self.rows, users)

    @torch.no_grad()
    def effective_weight(self, slot: int) -> Tensor:
        """W + B^T A of one slot, (m, n). A new tensor."""
        held = slice(0, int(self.rows[slot]))
        wide = self.eta_sum.dtype
        change = self.b[slot, held].to(wide).T @ self.a[slot, held].to(wide)
        return (self.weight.to(wide) + change).to(self.weight.dtype)

    # -- learning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def steps(self, x: Tensor, delta: Tensor, users: Tensor | None) -> tuple[Tensor, Rates]:
        """What updates are made with: the inputs without their part in the span of ``basis`` (T, n), and the steps.

        A user's steps depend on the user's own tokens and on calibration alone. Nothing is written: `count` does.

        Args:
            x: (T, n); delta: (T, m), gradients of the summed loss at the output; both of the weight's dtype.
            users: (T,), int32; -1 for tokens that teach nobody. None: as those of one user who has learnt nothing yet.
        """
        x, before = project_inputs(x, self.basis), self.moments
        if before is not None:
            before = self.calibrated if users is None else self.calibrated + before
        return x, rates(x, delta, self.config, self.eta_sum.dtype, before=before, users=users)

    @torch.no_grad()
    def count(self, grown: Tensor | None, kept: Tensor) -> None:
        """Add to the moments what `steps` found, of the slots that ``kept`` (S,) bool says."""
        if grown is not None:
            count_(self.moments, grown, kept.unsqueeze(1))

    @torch.no_grad()
    def learn(self, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor) -> None:
        """Append each token's step to its user's slot; a slot is compressed when it is full, or has too little room.

        Args:
            x: (T, n), inputs as `steps` returns them; delta: (T, m); both of the weight's dtype.
            eta: (T,), float32 (float64 for float64): steps. users: (T,), int32; -1 for tokens that teach nobody.
        """
        binding = binding_of(self)
        if binding is None or not binding.learn(x, delta, eta, users):
            self._learn(x, delta, eta, users)

    def _learn(self, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor) -> None:
        """`learn` by the ops, to the bit what the bound kernels do. The slots to compress are chosen on the device: the
        host waits only where there are more tokens than a window, and not while a CUDA graph is captured."""
        tokens, window, capacity = users.numel(), self.low_rank.window, self.low_rank.capacity
        place, parts = None, min(tokens, 1)
        if tokens > window:  # there may be more of one user than a slot has room for at a time
            place, parts = places(users), -(-tokens // window)
            if not (users.is_cuda and torch.cuda.is_current_stream_capturing()):
                parts = int(torch.where(users >= 0, place, -window).max()) // window + 1
        for k in range(parts):
            part = users if place is None else torch.where(place // window == k, users, -1)
            count = torch.zeros(self.low_rank.slots + 1, dtype=torch.int32, device=users.device)
            count = count.index_add_(0, part + 1, torch.ones_like(part))[1:]
            self.compress((count > 0) & (self.rows + count > capacity))
            ops.low_rank_append(self.a, self.b, self.rows, self.eta_sum, x, delta, eta, part)
            self.compress((count > 0) & (self.rows == capacity))

    @torch.no_grad()
    def compress(self, chosen: Tensor) -> None:
        """Bring the ``chosen`` slots, (S,) bool, back to ``rank`` rows, with the pull and the replay of ``config``."""
        if chosen.is_cpu and not chosen.any():  # where looking costs no wait
            return
        slots = torch.where(chosen, torch.arange(len(chosen), device=chosen.device), -1)
        state = self.a, self.b, self.rows, self.eta_sum, self.lost, self.step
        ops.low_rank_compress(*state, slots, **self.compress_options())

    def compress_options(self) -> dict[str, Any]:
        """The keywords of `ttt.ops.low_rank_compress`."""
        c = self.config
        memory, seen = (self.memory, self.seen) if c.replay_rows else (None, None)
        return {
            "rank": self.low_rank.rank, "shrink": self.low_rank.shrink, "lam": c.ewc_lambda,
            "importance_m": self.importance_m, "importance_n": self.importance_n, "memory": memory, "seen": seen,
            "seed": self.seed, "replay_rows": c.replay_rows, "replay": c.replay, "beta": c.replay_beta,
            "eps": c.replay_eps,
        }  # fmt: skip

    # -- a user's state -----------------------------------------------------------------------------------------

    @property
    def _per_slot(self) -> tuple[str, ...]:
        return PER_SLOT if self.moments is None else (*PER_SLOT, "moments")

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """Copies of all that one slot holds: ``a`` (rows, n), ``b`` (rows, m), (1,) each of the counters, and unless
        ``rate`` is "constant" ``moments`` (1, 3)."""
        held = int(self.rows[slot])
        state = {name: getattr(self, name)[slot, :held].clone() for name in PER_ROW}
        return state | {name: getattr(self, name)[slot : slot + 1].clone() for name in self._per_slot}

    def check_slot_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError or TypeError unless ``state`` is one that `load_slot` can take.

        It may lack ``moments``, as where the user learnt at a constant rate: they are zeros then.
        """
        allowed = {*PER_ROW, *self._per_slot}
        if not {*PER_ROW, *PER_SLOT} <= set(state) <= allowed:
            why = f" (rate is {self.config.rate!r})" if "moments" in state and self.moments is None else ""
            raise ValueError(f"{self.name} needs the tensors {sorted(allowed)}{why}, got {sorted(state)}")
        held = state["a"].shape[0] if state["a"].ndim else 0
        if held > self.low_rank.capacity:
            raise ValueError(f"{self.name}.a must have at most {self.low_rank.capacity} rows, got {held}")
        for name, value in state.items():
            live = getattr(self, name)
            shape = (held, live.shape[2]) if name in PER_ROW else (1, *live.shape[1:])
            if value.shape != shape:
                raise ValueError(f"{self.name}.{name} must have shape {shape}, got {tuple(value.shape)}")
            if value.dtype != live.dtype:
                raise TypeError(f"{self.name}.{name} must be {live.dtype}, got {value.dtype}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{self.name}.{name} must be finite")
            if name == "moments" and float(value.min()) < 0:
                raise ValueError(f"{self.name}.moments must be sums of squares, got {value.tolist()}")

    @torch.no_grad()
    def load_slot(self, slot: int, state: dict[str, Tensor]) -> None:
        """Give a slot what `slot_state` returned, to the bit; the caller checks."""
        self.clear_slot(slot)
        held = state["a"].shape[0]
        for name, value in state.items():
            (getattr(self, name)[slot, :held] if name in PER_ROW else getattr(self, name)[slot : slot + 1]).copy_(value)
        self.rows[slot] = held

    @torch.no_grad()
    def clear_slot(self, slot: int) -> None:
        """Zero the slot's memory, all of it: what a user said must not stay."""
        for name in (*PER_ROW, *self._per_slot, "rows"):
            getattr(self, name)[slot].zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lr={self.config.lr}, {self.low_rank}"
