"""`ttt.nn.LowRankLinear`: a linear layer whose batches mix users, each with low-rank weights of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttt import ops
from ttt.checks import check_dense
from ttt.config import TTTConfig
from ttt.defences import LowRank
from ttt.nn.autocast import autocast_dtype, full_precision, without_autocast
from ttt.nn.base import Adapted, Layout, captures, is_traced, is_transformed, refuse_written
from ttt.nn.budget import bound_, largest_square, low_rank_square, pace
from ttt.nn.cpu_binding import LowRankBinding, binding_of
from ttt.nn.directions import count_directions
from ttt.nn.rates import Rates, count_, places, rates
from ttt.nn.routing import Routing
from ttt.nn.update import versions
from ttt.ops.dtypes import accumulation

PER_ROW = ("a", "b")
PER_SLOT = ("eta_sum", "lost", "step")
MOST_STEPS = {"eta_sum": float("inf"), "lost": float("inf"), "step": 2**62}


class _Capture(torch.autograd.Function):
    """Hands (x, delta) to the layer in the backward pass and computes no gradient of a weight, as in `ttt.nn.Linear`.

    dL/dx_t = delta_t W + (delta_t B_u^T) A_u.
    """

    @staticmethod
    def forward(ctx, x, root, layer, users):
        ctx.save_for_backward(x, users)
        ctx.layer, ctx.captures = layer, captures(layer)
        ctx.written = None if is_traced() else layer.written()
        return layer._product(x, users)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, users = ctx.saved_tensors
        layer = ctx.layer
        if ctx.written is not None and layer.was_written(ctx.written, users):
            refuse_written(layer)
        if layer.sink is not None and ctx.captures:
            delta = grad.detach().reshape(-1, layer.out_features)
            layer.sink.append((x.detach().reshape(-1, layer.in_features), delta))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        with without_autocast(x.device):
            return layer.transposed_product(grad, users), None, None, None


class LowRankLinear(Adapted):
    """y_t = W x_t + b + B_u^T (A_u x_t): a linear layer for a batch in which each row belongs to a user or to none.

    ``weight`` and ``bias`` never change. Rows of no user get the base layer's output bit for bit. The bits of a user's
    outputs do not depend on rows of others, whether these are finite or not. A row that is not finite gives NaN.

    The state is in buffers at fixed addresses that are not part of `state_dict`. There are S slots of R = rank + window
    rows; ``eta_sum`` and the importance are float32 (float64 for float64 weights):

        =================  ============  ==========================================================
        ``a``              (S, R, n)     inputs x_t; after compression scaled right singular vectors
        ``b``              (S, R, m)     -eta_t delta_t; after compression scaled left singular vectors.
                                         In float16 numbers below 3e-8 are rounded to 0
        ``rows``           (S,) int32    rows in use
        ``eta_sum``        (S,)          sum of eta_t since the slot was compressed
        ``lost``           (S,)          bound on the Frobenius norm of what truncation dropped
        ``step``           (S,) int64    compressions so far
        ``importance_m``   (m,)          row and column means of Omega, shared by all users, if
        ``importance_n``   (n,)          ``ewc_lambda`` > 0: Omega_ij = importance_m[i] importance_n[j]
        ``memory``         (K, n)        replay memory, shared, if ``replay_rows`` or ``orthogonal`` > 0,
        ``seen``           (1,)          and how many rows were ever offered to it
        ``basis``          (k, n)        orthogonal directions of inputs that updates leave alone or damp,
                                         shared, if ``orthogonal`` or ``kronecker`` > 0 (`ttt.nn.Linear`)
        ``output_basis``   (k, m)        the same of gradients, shared, if ``kronecker`` > 0
        ``calibrated``     (3,)          float64, shared, unless ``rate`` is "constant": sums of |x|^2 and
                                         of |delta|^2 |x|^2, and the number of tokens, at calibration
        ``moments``        (S, 3)        the same of each user's own tokens since
        =================  ============  ==========================================================

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        config: a `TTTConfig` whose ``per_user`` (`ttt.LowRank`) gives the number and size of the slots.
        name: seeds this layer's random draws, together with ``config.seed``.
    """

    flat = False  # whether the model hands the layer its tokens as (B T, n)
    a: Tensor
    b: Tensor
    rows: Tensor
    eta_sum: Tensor
    lost: Tensor
    step: Tensor
    # None if the configuration does not need them:
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
        config, wide, low_rank = self.config, accumulation(dtype), self.low_rank
        m, n = self.out_features, self.in_features
        k, protects = count_directions(config.orthogonal or config.kronecker, n), config.ewc_lambda > 0
        outputs, scaled = count_directions(config.kronecker, m), config.rate != "constant"
        remembers = config.replay_rows > 0 or (config.orthogonal > 0 and k > 0)
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
            "output_basis": ((outputs, m), dtype) if outputs else None,
            "calibrated": ((3,), torch.float64) if scaled else None,
            "moments": ((low_rank.slots, 3), torch.float64) if scaled else None,
        }

    def _build(self, config: TTTConfig, name: str) -> None:
        if config.per_user is None:
            raise ValueError("config.per_user must be a ttt.LowRank, got None")
        self.low_rank = config.per_user
        self.routing = Routing()
        self.strengths: dict[int, float] = {}  # of the protection, by slot, where it is not 1 (`UserGuards`)
        super()._build(config, name)
        self.first_version = self.weight._version  # a weight that was loaded since has another one (`ttt.version`)

    def _bind(self) -> LowRankBinding:
        return LowRankBinding(self)

    # -- forward ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., n) -> (B, ..., m): each row with the weights of the user that `ttt.users` names for it.

        Gradients reach ``x``, but no weight.

        Raises:
            ValueError: if ``x`` has another number of rows than users were named.
        """
        if (dtype := autocast_dtype(x)) is not None:
            with without_autocast(x.device):
                return self.forward(x.to(self.weight.dtype)).to(dtype)
        users = self.routing.tokens(x, self.flat, self.name)
        if is_transformed(self):
            return self._plain_product(x, users)
        if torch.is_grad_enabled():
            self._require_frozen()
            if x.requires_grad or captures(self):
                return _Capture.apply(x, self._root, self, users)
        return self._product(x, users)

    def _product(self, x: Tensor, users: Tensor | None) -> Tensor:
        if users is None:  # all rows are the base model's: plain torch, without isolation between rows
            return torch.nn.functional.linear(x, self.weight, self.bias)
        binding = binding_of(self)
        if binding is not None and (y := binding.forward(x, users)) is not None:
            return y
        return ops.low_rank_linear(x.contiguous(), self.weight, self.bias, self.a, self.b, self.rows, users)

    def _base(self, x: Tensor) -> Tensor:
        """W x + bias for each row of ``x``."""
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def _plain_product(self, x: Tensor, users: Tensor | None) -> Tensor:
        """`_product` in plain torch, which every transform can differentiate and batch."""
        if users is None:
            return self._base(x)
        finite = torch.isfinite(x).all(-1, keepdim=True)  # see `isolated_linear`
        known = torch.where(finite, x, 0.0)
        y, whose = self._base(known), users.view(*x.shape[:-1], 1)
        for slot in range(self.low_rank.slots):  # whose values transforms that trace do not know; unused rows are 0
            mine = whose == slot
            own = torch.where(mine, known, 0.0)  # so that no user's factors reach another's gradient
            y = torch.where(mine, y + own @ self.a[slot].T @ self.b[slot], y)
        return torch.where(finite, y, torch.nan)

    def transposed_product(self, delta: Tensor, users: Tensor | None) -> Tensor:
        """The gradient at the input, delta_t W + (delta_t B_u^T) A_u, from ``delta`` (..., m) at the output.

        ``users``: (T,) int32, the slot of each row, -1 for the base model; None if all are the base model's.
        """
        if users is None:
            return delta @ self.weight
        return ops.low_rank_linear(delta.contiguous(), self.weight.T, None, self.b, self.a, self.rows, users)

    @property
    def base_weight(self) -> Tensor:
        """(m, n): the weight, which never changes."""
        return self.weight.detach()

    @torch.no_grad()
    def effective_weight(self, slot: int) -> Tensor:
        """W + B_u^T A_u of slot u, (m, n). A new tensor."""
        held = slice(0, int(self.rows[slot]))
        wide = self.eta_sum.dtype
        change = self.b[slot, held].to(wide).T @ self.a[slot, held].to(wide)
        return (self.base_weight.to(wide) + change).to(self.weight.dtype)

    def written(self) -> Any:
        """What tells `was_written` whether anything is written that outputs depend on, except by a CUDA graph."""
        counters = tuple(getattr(self, name).clone() for name in ("rows", *PER_SLOT))
        return versions(self.weight), versions(self.a, self.b), counters

    def was_written(self, before: Any, users: Tensor) -> bool:
        """Whether weights of ``users`` (T,) have changed since `written` returned ``before``."""
        weight, rows, counters = before
        if versions(self.weight) != weight:
            return True
        if versions(self.a, self.b) == rows:
            return False
        slots = users[users >= 0].unique().long()  # others may have learnt
        return not all(
            torch.equal(getattr(self, name)[slots], counter[slots])
            for name, counter in zip(("rows", *PER_SLOT), counters, strict=True)
        )

    # -- learning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    @full_precision
    def steps(
        self, x: Tensor, delta: Tensor, users: Tensor | None, *, gains: bool = False
    ) -> tuple[Tensor, Tensor, Rates]:
        """The rows (T, n) and (T, m) that updates are made with, and the step eta_t of each token.

        A user's steps depend only on the user's own tokens and on calibration. Nothing is written; `count` adds the
        tokens to the moments.

        Args:
            x: (T, n), of the weight's dtype.
            delta: (T, m), gradients of the summed loss at the output, of the weight's dtype.
            users: (T,) int32, the slot of each token's user; -1 for tokens that teach nobody. None: all tokens are
                taken as those of one user who has learnt nothing before.
            gains: whether the rates have a ``gain``.

        Returns:
            The rows of the update, (T, n) and (T, m), and the `Rates`.
        """
        before, applied = self.moments, (x, delta)
        if self.damps and x.is_cpu and _all_finite(x) and _all_finite(delta):
            # Given as other tensors than the rows, as below, so that `rates` computes with them in the same way: no bit
            # of a user's steps depends on whether another user's rows are finite.
            applied = self.applied(x.view_as(x), delta.view_as(delta))
        elif self.damps:
            # Rows that are not finite must not reach others through a product, see `forward`.
            finite = (torch.isfinite(x).all(1) & torch.isfinite(delta).all(1)).unsqueeze(1)
            x, delta = (torch.where(finite, rows, 0.0) for rows in (x, delta))
            applied = self.applied(x, delta)
            x, delta, *changed = (torch.where(finite, rows, torch.nan) for rows in (x, delta, *applied))
            applied = (changed[0], changed[1])
        if before is not None:
            before = self.calibrated if users is None else self.calibrated + before
        found = rates(
            x, delta, self.config, self.eta_sum.dtype,
            before=before, users=users, applied=(lambda *_: applied) if self.damps else None, share=self.share,
            limit=self.largest_step(), gains=gains,
        )  # fmt: skip
        if self.config.budget and users is not None:
            found = found._replace(eta=found.eta * self._pace(users).to(found.eta.dtype))
        return *applied, found

    @torch.no_grad()
    def count(self, grown: Tensor | None, kept: Tensor) -> None:
        """Add ``grown`` of the `Rates` from `steps` to the moments of the slots where ``kept``, (S,) bool, is True."""
        if grown is not None:
            count_(self.moments, grown, kept.unsqueeze(1))

    @torch.no_grad()
    @full_precision
    def learn(self, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor) -> None:
        """Append a row for each token to its user's slot; compress slots that are full or have too little room.

        Args:
            x: (T, n), rows of the update as `steps` returns them, of the weight's dtype.
            delta: (T, m), likewise, of the weight's dtype.
            eta: (T,), step sizes; float64 for float64 weights, else float32.
            users: (T,) int32, the slot of each token's user; -1 for tokens that teach nobody.

        Raises:
            ValueError, TypeError: as `ttt.ops.low_rank_append`.
            RuntimeError: as `ttt.ops.low_rank_compress`. Tokens before the failing compression have been learnt.
        """
        before = self.step.clone() if self.config.budget else None
        # The bound kernels compress all slots with one strength.
        binding = binding_of(self) if not self.strengths else None
        if binding is None or not binding.learn(x, delta, eta, users):
            self._learn(x, delta, eta, users)
        if before is not None:
            self._bound_drift((self.step != before).nonzero().flatten().tolist())

    def _learn(self, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor) -> None:
        """`learn` through the ops.

        The slots to compress are chosen on the device. The host waits only if there are more tokens than a window has
        rows, and never while a CUDA graph is captured.

        This mirrors ``LowRank::learn`` of csrc/low_rank_bindings.h, which makes the same calls to the kernels; a change
        of one must be made in the other. test_many_users_outputs_and_state_are_those_of_the_ops of
        tests/nn/test_cpu_binding.py compares the two bit for bit.
        """
        tokens, window, capacity = users.numel(), self.low_rank.window, self.low_rank.capacity
        place, parts = None, min(tokens, 1)
        if tokens > window:  # one user may have more tokens than a slot has room for at a time
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
        """Reduce the ``chosen`` slots, (S,) bool, to ``rank`` rows, with the protections of ``config``.

        Raises:
            ValueError, RuntimeError: as `ttt.ops.low_rank_compress`.
        """
        if chosen.is_cpu and not chosen.any():  # on CUDA a look at the values would make the host wait
            return
        slots = torch.where(chosen, torch.arange(len(chosen), device=chosen.device), -1)
        state = self.a, self.b, self.rows, self.eta_sum, self.lost, self.step
        if not self.strengths:
            ops.low_rank_compress(*state, slots, **self.compress_options())
            return
        strengths = [self.strengths.get(slot, 1.0) for slot in range(len(slots))]
        own = torch.tensor(strengths, dtype=torch.float64, device=slots.device)
        for strength in sorted(set(strengths)):
            group = torch.where(own == strength, slots, -1)
            if not group.is_cpu or bool((group >= 0).any()):
                ops.low_rank_compress(*state, group, **self.compress_options(strength))

    def compress_options(self, strength: float = 1.0) -> dict[str, Any]:
        """Keyword arguments of `ttt.ops.low_rank_compress`, with the protection ``strength`` times the configured."""
        c = self.config
        memory, seen = (self.memory, self.seen) if c.replay_rows else (None, None)
        return {
            "rank": self.low_rank.rank, "lam": c.ewc_lambda * strength,
            "importance_m": self.importance_m, "importance_n": self.importance_n, "memory": memory, "seen": seen,
            "seed": self.seed, "replay_rows": c.replay_rows,
            "beta": max(c.replay_beta, min(c.replay_beta * strength, 1.0)),  # 1: the full projection
            "eps": c.replay_eps,
        }  # fmt: skip

    # -- the budget of the change (`ttt.nn.budget`) -----------------------------------------------------------

    def _compressed(self, slot: int) -> slice:
        """The rows of a slot that a compression made; before the first one, as many rows of tokens at most."""
        return slice(0, min(self.low_rank.rank, int(self.rows[slot])))

    def _fillings(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        """Of each of ``slots``, |D|^2 of its compressed rows, and the one at which its budget is full: float64."""
        held = [(slot, self._compressed(slot)) for slot in slots]
        square = [low_rank_square(self.a[slot, rows], self.b[slot, rows]) for slot, rows in held]
        return torch.stack(square), self._largest(slots)

    def _largest(self, slots: list[int]) -> Tensor:
        """|D|^2 at which the budget of each of ``slots`` is full: float64."""
        size = self.out_features * self.in_features
        return largest_square(self.config, self.share, size, self.calibrated, self.moments[slots])

    def _pace(self, users: Tensor) -> Tensor:
        """What multiplies the steps of tokens of ``users`` (T,): (T,) float64. It depends on each user's rows alone."""
        factors = torch.ones(self.low_rank.slots + 1, dtype=torch.float64, device=users.device)
        if slots := [slot for slot in users.unique().tolist() if slot >= 0]:
            factors[slots] = pace(self.config, *self._fillings(slots))
        return factors[users.long()]

    def _bound_drift(self, slots: list[int]) -> None:
        """Bring what the users in ``slots`` learnt back into the budget, after a compression."""
        if not slots:
            return
        for slot, largest in zip(slots, self._largest(slots), strict=True):
            rows = self._compressed(slot)
            bound_(self.a[slot, rows], self.b[slot, rows], largest)

    # -- a user's state -----------------------------------------------------------------------------------------

    @property
    def _per_slot(self) -> tuple[str, ...]:
        return PER_SLOT if self.moments is None else (*PER_SLOT, "moments")

    @property
    def slot_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that hold something for each slot, (S, ...)."""
        return (*PER_ROW, *self._per_slot, "rows")

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's tensors: ``a`` (rows, n), ``b`` (rows, m), ``eta_sum``, ``lost`` and ``step`` (1,), and
        unless ``rate`` is "constant" ``moments`` (1, 3)."""
        held = int(self.rows[slot])
        state = {name: getattr(self, name)[slot, :held].clone() for name in PER_ROW}
        return state | {name: getattr(self, name)[slot : slot + 1].clone() for name in self._per_slot}

    def check_slot_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError or TypeError unless `load_slot` can load ``state``. Nothing is written.

        ``moments`` may be missing, for a user who learnt at a constant rate; they are loaded as zeros.
        """
        allowed = {*PER_ROW, *self._per_slot}
        if not {*PER_ROW, *PER_SLOT} <= set(state) <= allowed:
            why = f" (rate is {self.config.rate!r})" if "moments" in state and self.moments is None else ""
            more = "; ttt.import_peft(folder, model=model) makes them all" if set(state) == set(PER_ROW) else ""
            raise ValueError(f"{self.name} needs the tensors {sorted(allowed)}{why}, got {sorted(state)}{more}")
        for name, value in state.items():
            check_dense(f"{self.name}.{name}", value)
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
        counters = {name: value.flatten().tolist() for name, value in state.items() if name not in PER_ROW}
        for name in PER_SLOT:
            (value,) = counters[name]
            if not 0 <= value < MOST_STEPS[name]:
                raise ValueError(f"{self.name}.{name} must be in [0, {MOST_STEPS[name]}), got {value}")
        if held == 0 and counters["eta_sum"] != [0.0]:
            raise ValueError(f"{self.name}.eta_sum must be 0 for a slot without rows, got {counters['eta_sum'][0]}")
        if counters["step"] == [0] and counters["lost"] != [0.0]:
            raise ValueError(f"{self.name}.lost must be 0 before the first compression, got {counters['lost'][0]}")
        if "moments" in counters:
            energy, square, tokens = counters["moments"]
            if min(energy, square, tokens) < 0:
                raise ValueError(f"{self.name}.moments must be sums of squares, got {state['moments'].tolist()}")
            if not tokens.is_integer() or (tokens == 0 and (energy > 0 or square > 0)):
                raise ValueError(
                    f"{self.name}.moments must end in a number of tokens, with sums of 0 if it is 0, "
                    f"got {state['moments'].tolist()}"
                )

    @torch.no_grad()
    def load_slot(self, slot: int, state: dict[str, Tensor]) -> None:
        """Write a state that `slot_state` returned into a slot, bit for bit. The caller checks it first."""
        self.clear_slot(slot)
        held = state["a"].shape[0]
        for name, value in state.items():
            (getattr(self, name)[slot, :held] if name in PER_ROW else getattr(self, name)[slot : slot + 1]).copy_(value)
        self.rows[slot] = held

    @torch.no_grad()
    def clear_slot(self, slot: int) -> None:
        """Fill all of a slot's memory with zeros, so that nothing that a user wrote stays."""
        for name in self.slot_buffers:
            getattr(self, name)[slot].zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lr={self.config.lr}, {self.low_rank}"


def _all_finite(rows: Tensor) -> bool:
    """Whether sums show that ``rows`` (T, n) are finite; False also where a sum is too large for the dtype.

    It takes a small part of the time of looking at each number.
    """
    return bool(torch.isfinite(rows.sum(1)).all())
