"""`ttt.nn.Linear`: an `nn.Linear` whose weight learns from the tokens that pass through it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ttt import ops
from ttt.nn.autocast import autocast_dtype, full_precision, without_autocast
from ttt.nn.base import captures, is_traced, is_transformed, refuse_written
from ttt.nn.budget import pace
from ttt.nn.committing import CommittingLinear
from ttt.nn.cpu_binding import Binding, binding_of
from ttt.nn.feedback import Latest
from ttt.nn.graph_steps import WindowCounter
from ttt.nn.rates import STREAM, count_, rates
from ttt.nn.update import Update, versions
from ttt.ops.gate import advance, gated
from ttt.ops.reference import LARGEST_SEEN


class _Capture(torch.autograd.Function):
    """The layer's forward pass, with a backward pass that leaves (x, delta) in ``layer.sink``.

    No weight gradient is made. ``root`` requires grad, so autograd's graph begins here even if ``x`` needs no gradient;
    then no graph is built below this layer.
    """

    @staticmethod
    def forward(ctx, x, root, layer):
        ctx.save_for_backward(x)
        ctx.layer, ctx.captures, ctx.places = layer, captures(layer), layer.places
        ctx.written = None if is_traced() else layer.written()
        return layer._apply_window(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        if ctx.written is not None and layer.written() != ctx.written:
            refuse_written(layer)
        delta = grad.reshape(-1, layer.out_features)
        if layer.sink is not None and ctx.captures:
            layer.sink.append((x.detach().reshape(-1, layer.in_features), delta.detach()))
            if ctx.places is not None:
                layer.sink.places.append(ctx.places)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        with without_autocast(x.device):
            return layer._transposed_window(delta).view(x.shape), None, None


class Linear(CommittingLinear):
    """A linear layer that learns: y = x W_t^T + b with W_t = W - sum over the window of eta delta x^T.

    ``weight`` stays an `nn.Parameter` that never requires grad; commits write it in place. The rest of the state is in
    buffers that are not part of `state_dict`, so nothing that a user taught enters ``save_pretrained``. After
    construction all tensors stay at their addresses, except those shared with a `ttt.fork`, which are replaced when
    they must be written.

    With weights (m, n), a window of C rows and a replay memory of K rows:

        ====================  ============  =======================================================
        ``anchor``            (m, n)        W*, the weights that must not be forgotten
        ``importance``        (m, n)        Omega, of mean 1 over the model; if ``ewc_lambda`` > 0
        ``trace``             (m, n)        F, importance of the current stream; likewise
        ``momentum``          (m, n)        M, the velocity; if ``momentum`` > 0
        ``win_x``             (C, n)        the window: inputs x,
        ``win_delta``         (C, m)        gradients delta at the output,
        ``win_eta``           (C,)          and steps eta; 0 in rows that are not in use
        ``win_trace``         (C, m)        gradients for the trace; only for ``importance="mas"``
        ``memory``            (K, n)        replay memory: inputs on which the anchor defines the
                                            outputs; if ``replay_rows`` or ``orthogonal`` > 0
        ``recent``            (K', n)       reservoir sample of inputs since the last consolidation;
                                            likewise, or if ``kronecker`` > 0; K' = min(K, 1024)
        ``recent_delta``      (K', m)       the gradients of the same tokens; if ``kronecker`` > 0
        ``basis``             (k, n)        U, orthogonal directions of inputs that updates leave alone
                                            (rows of length 1) or damp (shorter rows); if ``orthogonal``
                                            or ``kronecker`` > 0. Rows of zeros have no effect
        ``output_basis``      (k, m)        the same of gradients; if ``kronecker`` > 0
        ``input_factor``,     (2 k, n)      second moments of inputs and of gradients, from which
        ``output_factor``     (2 k, m)      the directions are made (`ttt.nn.kronecker`); likewise,
        ``input_sums``,       (2,) float64  with their counts and the energy in other directions
        ``output_sums``       (2,) float64
        ``seen``              (1,) int64    rows that were ever offered to ``memory``,
        ``recent_seen``       (1,) int64    and to ``recent``
        ``past_mean``,        (n,)          Gaussian of past inputs (`ttt.nn.gaussian`); if
        ``past_factor``,      (r, n)        ``generated_rows`` > 0
        ``past_moments``      (2,) float64
        ``present_mean``,     (n,)          Gaussian of inputs since the last consolidation; likewise
        ``present_factor``,   (r, n)
        ``present_moments``   (2,) float64
        ``step``              (1,) int64    commits so far
        ``tokens``            (1,) int64    tokens in the trace
        ``moments``           (2, 3)        float64: sums of |x|^2 and of |delta|^2 |x|^2 as
                                            `ttt.nn.rates` defines them, and the number of tokens, at
                                            calibration and since; unless ``rate`` is "constant"
        ``importance_scale``  (1,)          float64: mean importance at the first calibration, the
                                            unit of Omega
        ``agreement``,        (1,) float64  feedback (`ttt.nn.feedback`): a, and the weights of the
        ``win_weight``        (C,)          window's rows; if ``feedback`` > 0
        ``drift``             (1,) float64  |W - W*|^2 after the last commit; if there is a budget
                                            (`ttt.nn.budget`)
        ====================  ============  =======================================================

    Buffers that the configuration does not need are None.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        config: a `TTTConfig`.
        name: seeds this layer's random draws, together with ``config.seed``.
    """

    def _bind(self) -> Binding:
        return Binding(self)

    # -- forward ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m), with the rows of the window in effect. Gradients reach ``x``, but not the weight."""
        if (dtype := autocast_dtype(x)) is not None:
            with without_autocast(x.device):
                return self.forward(x.to(self.weight.dtype)).to(dtype)
        if is_transformed(self):
            return self._plain_window(x)
        if torch.is_grad_enabled():
            self._require_frozen()
            if x.requires_grad or captures(self):
                return _Capture.apply(x, self._root, self)
        return self._apply_window(x)

    def written(self) -> tuple[Any, ...]:
        """Changes when something is written that outputs depend on, except by a CUDA graph."""
        return versions(self.weight, self.win_x, self.win_delta, self.win_eta)

    def _apply_window(self, x: Tensor) -> Tensor:
        binding = binding_of(self)
        if binding is not None and (y := binding.forward(x)) is not None:
            return y
        window = self.win_x, self.win_delta, self.win_eta
        if self._counter is not None and not self._counter.capacity:  # steps never enter the window
            window = window[0][:0], window[1][:0], window[2][:0]
        return ops.window_linear(x.contiguous(), self.weight, self.bias, *window)

    def _plain_window(self, x: Tensor) -> Tensor:
        """`_apply_window` in plain torch, which every transform can differentiate and batch."""
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if used := self._rows_in_effect():
            rows = slice(0, used)
            coef = (x @ self.win_x[rows].T) * self.win_eta[rows].to(x.dtype)
            y = y - coef @ self.win_delta[rows]
        return y

    def _rows_in_effect(self) -> int:
        """How many rows of the window may be in use; those that are not have eta = 0."""
        # The host does not know how many rows a capturable layer has pending.
        return self.pending if self._counter is None else self._counter.capacity

    def _transposed_window(self, delta: Tensor) -> Tensor:
        """dL/dx = delta W_t, (T, m) -> (T, n)."""
        grad = delta @ self.weight
        if used := self._rows_in_effect():
            rows = slice(0, used)
            coef = (delta @ self.win_delta[rows].T) * self.win_eta[rows].to(delta.dtype)
            grad = grad - coef @ self.win_x[rows]
        return grad

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_t, (m, n): the weight minus the updates of the window. A new tensor."""
        sum_dtype = self.win_eta.dtype
        d = self.win_delta.to(sum_dtype) * self.win_eta.unsqueeze(1)
        return (self.weight.to(sum_dtype) - d.T @ self.win_x.to(sum_dtype)).to(self.weight.dtype)

    # -- learning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    @full_precision
    def update_from(
        self,
        captured: list[tuple[Tensor, Tensor]],
        trace_captured: list[tuple[Tensor, Tensor]] | None = None,
        rows: Tensor | None = None,
        *,
        gains: bool = False,
    ) -> Update | None:
        """Make an `Update` from what backward passes left in ``sink``; None if nothing was captured. Writes nothing.

        Args:
            captured: (x, delta) pairs, x (..., n) as rows (T_i, n) and delta (T_i, m), in order.
            trace_captured: the same inputs with the gradients that the trace uses.
            rows: (T,) bool, which of the rows may be learnt from; None: all.
            gains: whether the update gets a ``gain``.

        Raises:
            ValueError: if ``rows`` has another number of rows (as where a router sends a layer only some tokens).
        """
        if not captured:
            return None
        x, delta, trace_delta = self.rows_of(captured, trace_captured, rows)
        x, delta = x.to(self.weight.dtype).contiguous(), delta.to(self.weight.dtype).contiguous()
        sum_dtype = self.win_eta.dtype
        made: list[tuple[Tensor, Tensor]] = []  # by `rates`, if it needs them

        def applied(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            made.append(self.applied(x, delta))
            return made[0]

        found = rates(
            x, delta, self.config, sum_dtype,
            before=None if self.moments is None else self.moments.sum(0),
            applied=applied if self.damps else None, share=self.share, limit=self.largest_step(),
            latest=self.latest, sharding=self.sharding, gains=gains,
        )  # fmt: skip
        update = Update(
            x, delta, found.eta, None, found.finite.all(), found.grown, found.weight, found.agreement, found.gain,
            made[0] if made else None, self.made_of(x, delta),
        )  # fmt: skip
        if trace_delta is not None:
            update.trace_delta = trace_delta.to(self.weight.dtype).contiguous()
            length = self.sharding.output.sum(torch.linalg.vector_norm(update.trace_delta, dtype=sum_dtype))
            update.finite = update.finite & torch.isfinite(length)
        self.keep_in_budget(update)
        return update

    def keep_in_budget(self, update: Update) -> None:
        """Shrink the steps of ``update``, which `rates` made, as the layer's budget demands if there is one."""
        if self.drift is not None:
            factor = pace(self.config, self.drift, self._largest_drift())
            update.eta = update.eta * factor.to(update.eta.dtype)

    def rows_of(
        self,
        captured: list[tuple[Tensor, Tensor]],
        trace_captured: list[tuple[Tensor, Tensor]] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows x (T, n), delta (T, m) and trace_delta (T, m) or None, of the arguments of `update_from`, not empty.

        Raises:
            ValueError: as `update_from`.
        """
        x, delta = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*captured, strict=True))
        trace_delta = None
        if trace_captured:
            trace_delta = torch.cat([d for _, d in trace_captured])
        if rows is not None:
            if rows.numel() != x.shape[0]:
                raise ValueError(
                    f"{self.name} saw {x.shape[0]} rows where the mask has {rows.numel()} tokens: "
                    "masks need layers that see every token"
                )
            x, delta = x[rows], delta[rows]
            trace_delta = None if trace_delta is None else trace_delta[rows]
        for name, part, size in (("x", x, self.in_features), ("delta", delta, self.out_features)):
            if part.ndim != 2 or part.shape != (len(x), size):
                raise ValueError(
                    f"{name} of {self.name or 'the layer'} must be ({len(x)}, {size}), got {tuple(part.shape)}"
                )
        return x, delta, trace_delta

    @full_precision
    def learn(self, update: Update, gate: Tensor | None = None) -> None:
        """Put the rows of ``update`` into the window, and commit it if it then holds C rows or more.

        Args:
            gate: (1,) int64, for capturable layers only: if it is 0, nothing changes. The host does not wait for it.

        Raises:
            ValueError, TypeError, RuntimeError: as `check_update`. Nothing has changed then.
        """
        if update.applied is not None and update.made_of != self.made_of(update.x, update.delta):
            update = dataclasses.replace(update, applied=None)
        counter, count = self._counter, update.x.shape[0]
        learns = count > 0 and self.config.lr != 0
        if (
            learns
            and counter is None
            and gate is None
            and (binding := binding_of(self)) is not None
            and (pending := binding.learn(update, self._pending)) is not None
        ):
            self.set_learnt(pending)
            return
        self.check_update(update, gate)
        if not learns:
            return
        if counter is None:
            self._learn(update, count)
        else:
            self._learn_step(update, gate, counter)
            self._bound_drift()
        if update.moments is not None and self.moments is not None:
            count_(self.moments[STREAM], update.moments, None if gate is None else gate != 0)
        if update.agreement is not None and self.agreement is not None:
            self.agreement.copy_(gated(gate, update.agreement, self.agreement))

    def set_learnt(self, pending: int) -> None:
        """Do what follows where kernels have learnt an update and left ``pending`` rows in the window."""
        self._pending = pending
        if not pending:
            self._bound_drift()

    def check_update(self, update: Update, gate: Tensor | None = None) -> None:
        """Check that `learn` can take ``update`` and ``gate``. Nothing is written.

        Raises:
            ValueError: if the layer is capturable for steps of another number of rows, if ``gate`` is given and the
                layer is not capturable, or if a tensor of ``update`` has a wrong shape.
            TypeError: if a tensor of ``update`` has a wrong dtype.
            RuntimeError: if the layer's tensors cannot be written; see `require_writable`.
        """
        counter, count = self._counter, update.x.shape[0]
        if counter is not None and count != counter.rows:
            raise ValueError(
                f"{self.name or 'the layer'} is capturable for steps of {counter.rows} rows, got {count}; "
                "capturable_(None) takes any number"
            )
        if counter is None and gate is not None:
            raise ValueError("gate needs a capturable layer; call capturable_(rows) first")
        self.require_writable()
        update.check_fits(self.weight, self.win_eta.dtype)

    def _trace_gradients(self, update: Update) -> Tensor | None:
        """The rows of ``update`` for ``win_trace``, if there is one."""
        if self.win_trace is None:
            return None
        return update.delta if update.trace_delta is None else update.trace_delta

    def made_of(self, x: Tensor, delta: Tensor) -> tuple[Any, ...]:
        """``made_of`` of an `Update` with the rows ``x`` and ``delta``."""
        return versions(x, delta, self.basis, self.output_basis)

    def _applied_rows(self, update: Update) -> tuple[Tensor, Tensor]:
        """The rows that ``update`` is made with."""
        return self.applied(update.x, update.delta) if update.applied is None else update.applied

    def _sample(self, update: Update, gate: Tensor | None = None) -> None:
        """Offer the rows of ``update`` to the samples of recent inputs and gradients, if there are any."""
        if self.recent is not None and self._counter is None:
            self._make_room(len(update.x))
        if self.recent is not None and self.recent_delta is not None:  # the same tokens are kept of both
            torch.ops.ttt.reservoir_insert_pair(
                self.recent, self.recent_seen, update.x, self.seed, gate, self.recent_delta, update.delta
            )
        elif self.recent is not None:
            ops.reservoir_insert(self.recent, self.recent_seen, update.x, seed=self.seed, gate=gate)

    def _make_room(self, rows: int) -> None:
        """Let the counter of sampled rows be one to which ``rows`` can be added.

        At its largest it goes on from half of it: each row is sampled as one of so many then. The host looks at it
        again when as many rows as were left have been sampled.
        """
        if rows > self.unsampled:
            if int(self.recent_seen) > LARGEST_SEEN - rows:
                self.recent_seen.fill_(LARGEST_SEEN // 2)
            self.unsampled = LARGEST_SEEN - int(self.recent_seen)
        self.unsampled -= rows

    @torch.no_grad()
    def _learn(self, update: Update, count: int) -> None:
        """`learn` through the ops, for layers that are not capturable."""
        p, c = self._pending, self.config.window
        traced = self._trace_gradients(update)
        self._sample(update)
        (x, delta), eta = self._applied_rows(update), update.eta
        if p + count <= c:
            ops.window_append(
                self.win_x, self.win_delta, self.win_eta, self.win_trace, x, delta, eta, trace_delta=traced, at=p
            )
            self._follow(update, p)
            self._pending = p + count
            if self._pending == c:
                self.flush()
            return
        weight = update.weight
        if p:
            weight = None if weight is None else torch.cat([self.win_weight[:p], weight])
            x = torch.cat([self.win_x[:p], x])
            delta = torch.cat([self.win_delta[:p], delta])
            eta = torch.cat([self.win_eta[:p], eta])
            traced = None if traced is None else torch.cat([self.win_trace[:p], traced])
        self._commit(x, delta, eta, traced)
        self._bound_drift()
        self.tokens.add_(len(eta))
        self._empty_window()
        self._keep_latest(x, delta, weight)

    @torch.no_grad()
    def _learn_step(self, update: Update, gate: Tensor | None, counter: WindowCounter) -> None:
        """`learn` of a capturable layer: the host neither knows nor waits for the number of rows in the window."""
        self._sample(update, gate)
        x, delta = self._applied_rows(update)
        if not counter.capacity:
            self._commit(x, delta, update.eta, self._trace_gradients(update), gate)
            advance(self.tokens, counter.rows, gate)
            self._keep_latest(x, delta, update.weight, gate)
            return
        weight = None if self.win_weight is None else self._row_weights(update)
        memory, seen = self._replay_source(self.win_x[: counter.capacity])
        torch.ops.ttt.window_step(
            self.win_x, self.win_delta, self.win_eta, self.win_trace, x, delta, update.eta,
            self._trace_gradients(update), counter.counters, self.tokens, gate, self.win_weight, weight,
            counter.capacity, self.weight, self.anchor, self.importance, self.trace, memory, seen, self.step,
            **self.commit_options(), momentum=self.momentum,
        )  # fmt: skip

    # -- feedback (`ttt.nn.feedback`) -------------------------------------------------------------------------
    # The rows of the window hold the latest C tokens: a commit sets their steps to 0, and leaves x and delta.

    @property
    def latest(self) -> Latest | None:
        """The latest update (live buffers); None if the configuration has no feedback."""
        if self.win_weight is None:
            return None
        return Latest(self.win_x, self.win_delta, self.win_weight, self.agreement)

    @torch.no_grad()
    def _follow(self, update: Update, at: int) -> None:
        """Keep the weights of ``update``, whose rows are those of the window from row ``at`` on."""
        if self.win_weight is not None:
            weight = self._row_weights(update)
            self.win_weight[at : at + len(weight)] = weight

    @staticmethod
    def _row_weights(update: Update) -> Tensor:
        """The weights of the rows of ``update``; 0 where it has none."""
        return torch.zeros_like(update.eta) if update.weight is None else update.weight

    @torch.no_grad()
    def _keep_latest(self, x: Tensor, delta: Tensor, weight: Tensor | None, gate: Tensor | None = None) -> None:
        """Keep the last of the rows ``x`` (T, n) and ``delta`` (T, m), which were committed without the window."""
        if self.win_weight is None:
            return
        weight = self.win_weight.new_zeros(len(x)) if weight is None else weight
        kept = min(len(x), len(self.win_weight))
        for live, rows in ((self.win_x, x), (self.win_delta, delta), (self.win_weight, weight)):
            live[:kept] = gated(gate, rows[len(rows) - kept :], live[:kept])

    @torch.no_grad()
    @full_precision
    def flush(self) -> None:
        """Commit the rows of the window to the weights now, however many there are.

        Raises:
            RuntimeError: if the layer's tensors cannot be written; see `require_writable`. Nothing has changed then.
        """
        if count := self.pending:
            self.require_writable()
            self._commit(*self._window_rows(count))
            self._bound_drift()
            self.tokens.add_(count)
            self._empty_window()
            if self.win_weight is not None:  # the next rows are to replace the oldest
                for rows in (self.win_x, self.win_delta, self.win_weight):
                    rows.copy_(rows.roll(-count, 0))

    def _window_rows(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The first ``count`` rows of the window: the arguments of `_commit`."""
        traced = None if self.win_trace is None else self.win_trace[:count]
        return self.win_x[:count], self.win_delta[:count], self.win_eta[:count], traced

    def _empty_window(self) -> None:
        if self.pending:
            self.win_eta.zero_()
            self.pending = 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lr={self.config.lr}, window={self.config.window}"
