"""`ttt.nn.Linear`: an `nn.Linear` whose weight learns from the tokens that pass through it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ttt import ops
from ttt.config import TTTConfig
from ttt.nn import gaussian
from ttt.nn import replay_rows as rows
from ttt.nn.base import Layout
from ttt.nn.cpu_binding import Binding, binding_of
from ttt.nn.directions import directions, learnable
from ttt.nn.graph_steps import Steps, forbid_capture
from ttt.nn.rates import STREAM, count_, rates
from ttt.nn.state import Held
from ttt.ops import log8
from ttt.ops.gate import advance
from ttt.ops.reference import _wide


@dataclasses.dataclass
class Update:
    """What one layer can learn from one backward pass: T rows.

    ``x`` (T, n) inputs, ``delta`` (T, m) gradients of the summed loss at the output, ``eta`` (T,) steps,
    ``trace_delta`` (T, m) the gradients that the trace uses (MAS), ``finite`` () bool, ``moments`` (3,) float64 what
    the rows add to the layer's, where steps depend on them.
    """

    x: Tensor
    delta: Tensor
    eta: Tensor
    trace_delta: Tensor | None
    finite: Tensor
    moments: Tensor | None = None


class _Capture(torch.autograd.Function):
    """The layer's forward, with a backward that hands (x, delta) to the layer instead of making a weight gradient.

    ``root`` requires grad, so a graph begins here even where ``x`` needs none: nothing is built below.
    """

    @staticmethod
    def forward(ctx, x, root, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer._apply_window(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        delta = grad.reshape(-1, layer.out_features)
        if layer.sink is not None:
            layer.sink.append((x.detach().reshape(-1, layer.in_features), delta.detach()))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return layer._transposed_window(delta).view(x.shape), None, None


class Linear(Held):
    """A linear layer that learns: y = x W_t^T + b with W_t = W - sum over the window of eta delta x^T.

    ``weight`` stays an `nn.Parameter` (never requiring grad) and is changed in place; the state below are
    buffers that are not part of `state_dict`, so nothing a user taught leaks into ``save_pretrained``.
    No tensor is ever rebound after construction, unless it is shared with a `ttt.fork`.

    ==================  ============  =========================================================
    ``anchor``          (m, n)        W*, the weights that must not be forgotten
    ``importance``      (m, n)        Omega, mean 1 over the model; only if ``ewc_lambda`` > 0
    ``trace``           (m, n)        F, importance of the present stream; likewise
    ``momentum``        (m, n)        M, the velocity; only if ``momentum`` > 0
    ``win_x``           (C, n)        the window: inputs,
    ``win_delta``       (C, m)        gradients at the output,
    ``win_eta``         (C,)          and steps; 0 marks an empty row
    ``win_trace``       (C, m)        gradients for the trace; only for ``importance="mas"``
    ``memory``          (K, n)        inputs whose outputs the anchor defines; if ``replay_rows`` or ``orthogonal`` > 0
    ``recent``          (K', n)       a sample of inputs since the last consolidation, K' = min(K, 1024)
    ``basis``           (k, n)        U, orthonormal directions that learning leaves alone, or rows of zeros; if
                                      ``orthogonal`` > 0
    ``seen``            (1,)          rows that ever entered ``memory``; ``recent_seen`` likewise
    ``past_mean``, ...                the Gaussian of past inputs; if ``generated_rows`` > 0; see `ttt.nn.gaussian`
    ``present_mean``, ...             that of inputs since the last consolidation
    ``step``            (1,)          commits so far; ``tokens`` (1,) those in the trace
    ``moments``         (2, 3)        float64: sums of |x|^2 and |delta|^2 |x|^2, and rows; at calibration, and since;
                                      unless ``rate`` is "constant"
    ``importance_scale``  (1,)        float64: mean importance at the first calibration, Omega's unit
    ==================  ============  =========================================================

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        config: see `TTTConfig`.
        name: seeds this layer's random draws, together with ``config.seed``.
    """

    win_x: Tensor
    win_delta: Tensor
    win_eta: Tensor
    # None where the configuration does without them:
    importance: Tensor
    trace: Tensor
    momentum: Tensor
    win_trace: Tensor
    memory: Tensor
    recent: Tensor
    basis: Tensor
    past_mean: Tensor
    # Counters:
    seen: Tensor
    recent_seen: Tensor
    step: Tensor
    tokens: Tensor
    importance_scale: Tensor

    def _layout(self, dtype: torch.dtype) -> Layout:
        config, wide = self.config, _wide(dtype)
        m, n, c = self.out_features, self.in_features, self.config.window
        default = torch.float32 if dtype == torch.float32 else torch.bfloat16
        if dtype == torch.float64:
            state = torch.float64
        elif config.state_dtype is not None:
            state = torch.uint8 if config.state_dtype == "8bit" else getattr(torch, config.state_dtype)
        else:
            state = default
        signed = state if state.is_floating_point else default  # 8 bits hold no signs
        k, protects = directions(config, n), config.ewc_lambda > 0
        remembers = config.replay_rows > 0 or k > 0
        columns, capacity = log8.width(n) if state == torch.uint8 else n, config.replay_capacity
        counter = ((1,), torch.int64)
        return {
            "anchor": ((m, n), dtype),
            "importance": ((m, columns), state) if protects else None,
            "trace": ((m, columns), state) if protects else None,
            "momentum": ((m, n), signed) if config.momentum else None,
            "win_x": ((c, n), dtype),
            "win_delta": ((c, m), dtype),
            "win_eta": ((c,), wide),
            "win_trace": ((c, m), dtype) if protects and config.importance == "mas" else None,
            "memory": ((capacity, n), dtype) if remembers else None,
            "recent": ((min(capacity, 1024), n), dtype) if remembers else None,
            "basis": ((k, n), dtype) if k else None,
            **gaussian.layout(n, wide, config.generated_rank, config.generated_rows),
            "seen": counter,
            "recent_seen": counter,
            "step": counter,
            "tokens": counter,
            "moments": None if config.rate == "constant" else ((2, 3), torch.float64),
            "importance_scale": ((1,), torch.float64),
        }

    def _build(self, config: TTTConfig, name: str) -> None:
        super()._build(config, name)
        self.anchor.copy_(self.weight.detach())
        self._steps: Steps | None = None  # of a capturable layer
        self._pending = 0
        self.strength = 1.0  # of the protection: multiplies ewc_lambda and replay_beta (`ttt.Guard`)
        self.shared = set()
        self.base = {}

    def _bind(self) -> Binding:
        return Binding(self)

    # -- using ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m), the window included. Gradients reach ``x``; the weight gets none."""
        if torch.is_grad_enabled() and (self.sink is not None or x.requires_grad):
            return _Capture.apply(x, self._root, self)
        return self._apply_window(x)

    def _apply_window(self, x: Tensor) -> Tensor:
        binding = binding_of(self)
        if binding is not None and (y := binding.forward(x)) is not None:
            return y
        window = self.win_x, self.win_delta, self.win_eta
        if self._steps is not None and not self._steps.held:  # never filled
            window = window[0][:0], window[1][:0], window[2][:0]
        return ops.window_linear(x.contiguous(), self.weight, self.bias, *window)

    def __setattr__(self, name, value):
        if name == "_pending":  # changes with every token; torch's way takes 3 us
            self.__dict__[name] = value
            return
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        if self._steps is not None:
            raise RuntimeError("a capturable layer cannot be moved or converted; call capturable_(None) first")
        super()._apply(fn, recurse)
        self.base = {name: self._as_beside(name, t, fn(t)) for name, t in self.base.items()}
        return self

    def _transposed_window(self, delta: Tensor) -> Tensor:
        """dL/dx = delta W_t, (T, m) -> (T, n)."""
        grad = delta @ self.weight
        # A capturable layer's rows are counted on the device; empty ones have eta = 0.
        held = self.pending if self._steps is None else self._steps.held
        if held:
            rows = slice(0, held)
            coef = (delta @ self.win_delta[rows].T) * self.win_eta[rows].to(delta.dtype)
            grad = grad - coef @ self.win_x[rows]
        return grad

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_t, (m, n): the weight with the window written in. A new tensor."""
        wide = self.win_eta.dtype
        d = self.win_delta.to(wide) * self.win_eta.unsqueeze(1)
        return (self.weight.to(wide) - d.T @ self.win_x.to(wide)).to(self.weight.dtype)

    # -- learning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_from(
        self,
        captured: list[tuple[Tensor, Tensor]],
        trace_captured: list[tuple[Tensor, Tensor]] | None = None,
        rows: Tensor | None = None,
    ) -> Update | None:
        """An `Update` from what backward passes left in ``sink``; None if nothing was captured.

        Args:
            captured: (x, delta) pairs, in order.
            trace_captured: the same inputs with the gradients that the trace uses.
            rows: (T,) bool: the rows that may teach.

        Raises:
            ValueError: if ``rows`` does not fit (as where a router shows a layer only some tokens).
        """
        if not captured:
            return None
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
        x, delta = x.to(self.weight.dtype).contiguous(), delta.to(self.weight.dtype).contiguous()
        wide = self.win_eta.dtype
        eta, each, moments = rates(
            x, delta, self.config, wide,
            before=None if self.moments is None else self.moments.sum(0),
            applied=None if self.basis is None else functools.partial(learnable, self),
        )  # fmt: skip
        finite = each.all()
        if trace_delta is not None:
            trace_delta = trace_delta.to(self.weight.dtype).contiguous()
            finite = finite & torch.isfinite(torch.linalg.vector_norm(trace_delta, dtype=wide))
        return Update(x, delta, eta, trace_delta, finite, moments)

    def learn(self, update: Update, gate: Tensor | None = None) -> None:
        """Take the rows of ``update`` into the window, and commit when it holds C rows or more.

        Args:
            gate: (1,) int64, for capturable layers only: where it is 0 nothing changes, which is decided on the device.

        Raises:
            ValueError: as `check_update`. Nothing has changed then.
        """
        self.check_update(update, gate)
        count = update.x.shape[0]
        if count == 0 or self.config.lr == 0:
            return
        if self._steps is not None:
            self._learn_step(update, gate, self._steps)
        elif (binding := binding_of(self)) is not None and (held := binding.learn(update, self._pending)) is not None:
            self._pending = held
        else:
            self._learn(update, count)
        if self.moments is not None and update.moments is not None:
            count_(self.moments[STREAM], update.moments, None if gate is None else gate != 0)

    def check_update(self, update: Update, gate: Tensor | None = None) -> None:
        """Raise ValueError if `learn` cannot take ``update``.

        That is so if the layer is capturable for steps of another number of rows, or ``gate`` is given and the layer is
        not capturable.
        """
        if self._steps is None:
            if gate is not None:
                raise ValueError("gate needs a capturable layer; call capturable_(rows) first")
        elif (count := update.x.shape[0]) != self._steps.rows:
            raise ValueError(
                f"{self.name or 'the layer'} is capturable for steps of {self._steps.rows} rows, got {count}; "
                "capturable_(None) takes any number"
            )

    def _traced(self, update: Update) -> Tensor | None:
        """What of ``update`` goes into ``win_trace``."""
        if self.win_trace is None:
            return None
        return update.delta if update.trace_delta is None else update.trace_delta

    @torch.no_grad()
    def _learn(self, update: Update, count: int) -> None:
        p, c = self._pending, self.config.window
        traced = self._traced(update)
        if self.recent is not None:
            ops.reservoir_insert(self.recent, self.recent_seen, update.x, seed=self.seed)
        x, delta, eta = learnable(self, update.x), update.delta, update.eta
        if p + count <= c:
            ops.window_append(
                self.win_x, self.win_delta, self.win_eta, self.win_trace, x, delta, eta, trace_delta=traced, at=p
            )
            self._pending = p + count
            if self._pending == c:
                self.flush()
            return
        if p:
            x = torch.cat([self.win_x[:p], x])
            delta = torch.cat([self.win_delta[:p], delta])
            eta = torch.cat([self.win_eta[:p], eta])
            traced = None if traced is None else torch.cat([self.win_trace[:p], traced])
        self._commit(x, delta, eta, traced)
        self.tokens.add_(len(eta))
        self._empty_window()

    @torch.no_grad()
    def _learn_step(self, update: Update, gate: Tensor | None, steps: Steps) -> None:
        """As `_learn`, with nothing that the host must know or wait for."""
        if self.recent is not None:
            ops.reservoir_insert(self.recent, self.recent_seen, update.x, seed=self.seed, gate=gate)
        x = learnable(self, update.x)
        if not steps.held:
            self._commit(x, update.delta, update.eta, self._traced(update), gate)
            advance(self.tokens, steps.rows, gate)
            return
        self._commit(*self._rows(steps.held), steps.full if gate is None else steps.full * gate)
        ops.window_append(
            self.win_x, self.win_delta, self.win_eta, self.win_trace, x, update.delta, update.eta,
            trace_delta=self._traced(update), counters=steps.counters, tokens=self.tokens, gate=gate,
        )  # fmt: skip

    @torch.no_grad()
    def flush(self) -> None:
        """Write the window into the weights now, whatever it holds."""
        if held := self.pending:
            self._commit(*self._rows(held))
            self.tokens.add_(held)
            self._empty_window()

    def _rows(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The first rows of the window, as `_commit` takes them."""
        traced = None if self.win_trace is None else self.win_trace[:count]
        return self.win_x[:count], self.win_delta[:count], self.win_eta[:count], traced

    def _empty_window(self) -> None:
        if self.pending:
            self.win_eta.zero_()
            self.pending = 0

    def _commit(
        self, x: Tensor, delta: Tensor, eta: Tensor, trace_delta: Tensor | None, gate: Tensor | None = None
    ) -> None:
        memory, seen = (rows.assemble(self, x), None) if self.assembles else (self.replayed, self.seen)
        ops.commit(
            self.weight, self.anchor, self.importance, self.trace, x, delta, eta, self.step,
            trace_delta=trace_delta, memory=memory, seen=seen, gate=gate, momentum=self.momentum,
            **self.commit_options(),
        )  # fmt: skip
        gaussian.absorb(self, x)

    @property
    def assembles(self) -> bool:
        """Whether replay rows come from elsewhere than the memory alone, and are put together before each commit."""
        return self.config.commit_rows > self.config.replay_rows

    @property
    def replayed(self) -> Tensor | None:
        """The memory, if commits replay from it."""
        return self.memory if self.config.replay_rows else None

    def commit_options(self) -> dict[str, Any]:
        """The arguments of `ttt.ops.commit` that are no tensors."""
        c = self.config
        beta = max(c.replay_beta, min(c.replay_beta * self.strength, 1.0))  # 1: the projection in full
        return {
            "seed": self.seed, "replay_rows": c.commit_rows, "replay": c.replay, "beta": beta,
            "eps": c.replay_eps, "lam": c.ewc_lambda * self.strength, "gamma": c.trace_decay, "kind": c.importance,
            "trace_every": c.trace_every, "mu": c.momentum, "decay": c.decay,
        }  # fmt: skip

    # -- counting on the device -------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Rows of the window in use. Those of a capturable layer are counted on the device: reading waits for it."""
        return self._pending if self._steps is None else self._steps.pending

    @pending.setter
    def pending(self, rows: int) -> None:
        if self._steps is None:
            self._pending = rows
        else:
            self._steps.pending = rows

    @property
    def capturable(self) -> int | None:
        """Rows of every step of a capturable layer; None for one that is not."""
        return None if self._steps is None else self._steps.rows

    def capturable_(self, rows: int | None) -> Linear:
        """Let steps of ``rows`` rows be captured in a CUDA graph: forward, `learn`, and the commits that fall due.

        Such a layer counts its window on the device and there alone, so that the graph's replays and the host cannot
        disagree: `learn` neither reads nor allocates anything that outlives it, and whatever needs the count
        (`pending`, `state`, `flush`, ...) still works, but waits for the device. Two things differ from other layers:
        every step must have ``rows`` rows; and a window in which another step would not fit is written into the
        weights by the next step, before its rows enter, as `flush` at that moment would. Steps of more than half the
        window's rows are written at once and never enter it.

        Args:
            rows: B of every step; None for a layer as it was built. What stands in the window is committed now
                where it is no whole number of such steps, or leaves no room for another.

        Returns:
            The layer. It cannot be moved or converted while it is capturable.

        Raises:
            ValueError: if ``rows`` is less than 1, or the layer has a dtype without GPU kernels and is on a GPU, or
                generates rows, which takes an eigendecomposition that the host waits for.
            RuntimeError: while a CUDA graph is being captured.
        """
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ValueError(f"rows must be a whole number of at least 1, or None, got {rows!r}")
        if rows is not None and self.weight.is_cuda and self.weight.dtype == torch.float64:
            raise ValueError("a layer of torch.float64 cannot be captured: there are no GPU kernels for it")
        if rows is not None and self.config.generated_rows:
            raise ValueError(
                f"a layer with generated_rows = {self.config.generated_rows} cannot be captured: each of its commits "
                "takes an eigendecomposition, for which the host waits"
            )
        forbid_capture("capturable_")
        held = self.pending
        steps = None if rows is None else Steps.of(rows, self.config.window, self.weight.device)
        if steps is not None and not steps.takes(held):
            self.flush()
            held = 0
        self._steps = steps
        self.pending = held
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lr={self.config.lr}, window={self.config.window}"
