"""Direct calls of the C++ kernels for layers on the CPU.

A binding holds the addresses of a layer's tensors. Through it, a decoding step of a small layer calls the kernels
without the cost of the dispatcher and of the ops' checks, which would exceed that of the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ttt.nn.rates import STREAM
from ttt.ops import cpu
from ttt.ops.backends import record
from ttt.ops.cpu import address
from ttt.ops.low_rank.cpu import REFUSED, bind_low_rank, isolated_linear, refuse
from ttt.ops.modes import must_call_ops
from ttt.ops.reference import LARGEST_SEEN


class _Direct:
    address: int  # of the weight
    dtype: torch.dtype
    bound_bias: Tensor | None = None  # a bias of which the kernels hold the address
    bias_address = 0

    def _plain(self, t: Tensor, dtype: torch.dtype | None = None) -> bool:
        """Whether kernels can read ``t`` as a tensor of ``dtype``, by default the layer's."""
        return cpu.is_plain(t, dtype or self.dtype)


class Binding(_Direct):
    """The C++ kernels of a `ttt.nn.Linear`, called directly.

    Each method works only if the arguments are what the ops would accept. Otherwise it returns None and has changed
    nothing: the caller then calls the op, whose checks name what is wrong.
    """

    def __init__(self, layer) -> None:
        weight = layer.weight
        self.address = weight.data_ptr()
        if layer.bias is not None:
            self.bound_bias, self.bias_address = layer.bias, layer.bias.data_ptr()
        self.dtype = weight.dtype
        self.m, self.n = weight.shape
        moments = None if layer.moments is None else layer.moments[STREAM]
        self.kernels: Any = None if why_not_bound(layer) else cpu.bind_layer(layer, moments)
        self.few = cpu.few_tokens(weight.dtype) if self.kernels is not None else 0
        self.window, self.room = layer.config.window, self._room(layer)
        self.inserts, self.traces = layer.recent is not None, layer.win_trace is not None
        self.unsampled, self.recent_seen = 0, layer.recent_seen  # rows before the counter has to be looked at
        self.projects = layer.damps
        self.appended = _present(
            layer, "win_x", "win_delta", "win_eta", "win_trace", "recent", "recent_delta", "recent_seen",
            "win_weight", "moments", "agreement",
        )  # fmt: skip
        self.committed = _present(layer, "weight", "trace", "momentum", "step", "tokens", "win_eta")

    @staticmethod
    def _room(layer) -> float:
        """The most rows of the window and of a step that `learn` takes together; -1 if it may not be called."""
        if any(t is not None and t.is_inference() for t in (layer.weight, *layer._buffers.values())):
            return -1  # The layer checks whether they can be written.
        return layer.config.window - 1 if layer.mixes_replay_sources else math.inf  # The ops commit such windows.

    def forward(self, x: Tensor) -> Tensor | None:
        """The layer's output for x (..., n) of at most ``few`` tokens."""
        shape, n = x.shape, self.n
        if not shape or shape[-1] != n or x.dtype != self.dtype or type(x) is not Tensor:
            return None
        tokens = x.numel() // n
        if tokens > self.few or tokens == 0 or not x.is_contiguous() or not x.is_cpu or x.requires_grad:
            return None
        y = x.new_empty((*shape[:-1], self.m))
        self.kernels.forward(x.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads(), False)
        record("window_linear", "cpu")
        return y

    def learn(self, update, at: int) -> int | None:
        """Write the rows of ``update`` (`ttt.nn.Update`) into the window from row ``at`` on, and commit a full window.

        Returns:
            The number of rows in the window afterwards; None if nothing was done.
        """
        given = self.given(update, at)
        if given is None:
            return None
        self.kernels.learn(given, torch.get_num_threads())
        return self.learnt(at + len(update.x), update)

    def given(self, update, at: int) -> tuple[int, ...] | None:
        """What the kernels are given to do what `learn` does; None where they cannot."""
        x, delta, eta, traced = update.x, update.delta, update.eta, 0
        rows = x.shape[0]
        full = at + rows
        if full > self.room or x.shape != (rows, self.n) or delta.shape != (rows, self.m) or eta.shape != (rows,):
            return None
        if not (self._plain(x) and self._plain(delta) and self._plain(eta, torch.float32)):
            return None
        if self.inserts:
            if rows > self.unsampled:
                self.unsampled = LARGEST_SEEN - int(self.recent_seen)
                if rows > self.unsampled:
                    return None  # the layer makes room in the counter
            self.unsampled -= rows
        weight, moments, agreement = update.weight, update.moments, update.agreement
        if weight is not None and not (weight.shape == (rows,) and self._plain(weight, torch.float32)):
            return None
        if moments is not None and not (moments.shape == (3,) and self._plain(moments, torch.float64)):
            return None
        if agreement is not None and not (agreement.shape == (1,) and self._plain(agreement, torch.float64)):
            return None
        if self.traces:
            trace_delta = delta if update.trace_delta is None else update.trace_delta
            if trace_delta.shape != delta.shape or not self._plain(trace_delta):
                return None
            traced = trace_delta.data_ptr()
        applied_x = applied_delta = 0
        if update.applied is not None:
            one, other = update.applied
            if one.shape != x.shape or other.shape != delta.shape or not (self._plain(one) and self._plain(other)):
                return None
            applied_x, applied_delta = one.data_ptr(), other.data_ptr()
        followed = address(weight), address(moments), address(agreement)
        rows_of = x.data_ptr(), delta.data_ptr(), eta.data_ptr(), traced, applied_x, applied_delta
        return *rows_of, *followed, at, rows

    def why_not_given(self, full: int) -> str:
        """Why `given` returned None for rows of which the window and the update have ``full`` together."""
        if self.room < 0:
            return "tensors that were made in inference mode"
        if self.inserts and LARGEST_SEEN - int(self.recent_seen) <= full:
            return "a sample that has counted as many rows as it can"
        if full > self.room:
            return "a commit that replays rows of several sources"
        return "an update that is not what kernels read"

    def learnt(self, full: int, update) -> int:
        """Count what the kernels did that left ``full`` rows in the window with those of ``update``, or committed them.

        Returns:
            The number of rows in the window.
        """
        torch.autograd.graph.increment_version(self.appended)
        if self.inserts:
            record("reservoir_insert", "cpu")
        if self.projects and update.applied is None:
            record("project_out", "cpu")
        if full < self.window:
            return full
        torch.autograd.graph.increment_version(self.committed)
        record("commit", "cpu")
        return 0


class LowRankBinding(_Direct):
    """The C++ kernels of a `ttt.nn.LowRankLinear`, called directly as in `Binding`."""

    def __init__(self, layer) -> None:
        weight = layer.weight
        self.address, self.dtype = weight.data_ptr(), weight.dtype
        self.weight, self.bias = weight, layer.bias
        self.m, self.n = weight.shape
        self.kernels: Any = bind_low_rank(layer) if self.m and self.n else None
        self.appended = _present(layer, "a", "b", "rows", "eta_sum")
        self.compressed = _present(layer, "lost", "step")

    def forward(self, x: Tensor, users: Tensor) -> Tensor | None:
        """The layer's output for ``x`` (..., n) of T tokens; ``users`` (T,) int32: the slot of each, or -1."""
        tokens = users.numel()
        if type(x) is not Tensor or x.shape[-1] != self.n or x.numel() != tokens * self.n or not self._plain(x):
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        y = isolated_linear(x, self.weight, self.bias)
        if not self.kernels.forward(x.data_ptr(), users.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads()):
            return None
        record("low_rank_linear", "cpu")
        return y

    def learn(self, x: Tensor, delta: Tensor, eta: Tensor, users: Tensor) -> bool:
        """Do what the layer's `learn` does, where the arguments allow it; whether they do.

        Raises:
            RuntimeError: as `ttt.ops.low_rank_compress`. Tokens before the failing compression have been learnt.
        """
        tokens = users.numel()
        if x.shape != (tokens, self.n) or delta.shape != (tokens, self.m) or eta.shape != (tokens,):
            return False
        plain = self._plain(x) and self._plain(delta) and self._plain(eta, torch.float32)
        if not plain or not self._plain(users, torch.int32):
            return False
        appends, compressions, failed = self.kernels.learn(
            x.data_ptr(), delta.data_ptr(), eta.data_ptr(), users.data_ptr(), tokens, torch.get_num_threads()
        )
        if failed == REFUSED:
            return False
        if appends:
            record("low_rank_append", "cpu")
            torch.autograd.graph.increment_version(self.appended)
        if compressions:
            record("low_rank_compress", "cpu")
            torch.autograd.graph.increment_version(self.appended + self.compressed)
        refuse(failed)
        return True


def _present(layer, *names: str) -> list[Tensor]:
    return [t for name in names if (t := getattr(layer, name)) is not None]


def binding_of(layer) -> Any:
    """The layer's binding, made anew if its weight or bias has moved; None if the ops must be called."""
    return None if must_call_ops() else bound(layer)


def why_not_bound(layer) -> str:
    """Empty if a `ttt.nn.Linear` on the CPU has a binding with kernels, else the reason it has none."""
    weight = layer._parameters["weight"]
    if type(weight) is not torch.nn.Parameter:
        return f"a weight that is a {type(weight).__name__}"
    if not weight.numel():
        return "a weight without elements"
    if layer.sharding:  # sums over processes come between what the kernels do at once
        return "a weight that is spread over processes"
    return cpu.why_not_bound(layer)


def bound(layer) -> Any:
    """As `binding_of` where kernels may be called."""
    weight = layer._parameters["weight"]
    if type(weight) is not torch.nn.Parameter:
        return None
    binding = layer._binding
    if (
        binding is None
        or binding.address != weight.data_ptr()
        or ((bias := binding.bound_bias) is not None and bias.data_ptr() != binding.bias_address)
    ):
        if not weight.is_cpu:
            return None
        binding = layer._binding = layer._bind()
    return binding if binding.kernels is not None else None
