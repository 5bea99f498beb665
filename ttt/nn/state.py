"""The state of a `ttt.nn.Linear`: its buffers, reading and replacing it, resetting it, and counting its window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ttt.checks import check_dense, check_type
from ttt.config import TTTConfig
from ttt.nn.base import Adapted, Layout
from ttt.nn.directions import count_directions
from ttt.nn.feedback import BUFFERS as FEEDBACK
from ttt.nn.gaussian import FIELDS, PAST, PRESENT, Gaussian, buffer_layout
from ttt.nn.graph_steps import WindowCounter, check_capturable, forbid_capture
from ttt.nn.kronecker import MOMENTS, layout
from ttt.nn.parallel import WHOLE, Sharding, Side
from ttt.nn.rates import STREAM
from ttt.ops import log8
from ttt.ops.dtypes import accumulation

BASE = ("anchor", "importance", "importance_scale", "memory", "seen", "basis", "output_basis", *MOMENTS, *PAST)
"""Buffers that calibrating and consolidating write, and learning does not."""

_MATRICES = ("weight", "anchor", "importance", "trace", "momentum")
_INPUTS = ("win_x", "memory", "recent", "basis", "input_factor", *PAST[:2], *PRESENT[:2])
_OUTPUTS = ("win_delta", "win_trace", "recent_delta", "output_basis", "output_factor")

_COUNTERS = ("seen", "recent_seen", "step", "tokens")
_RECENT = 1024  # the most rows of the sample of recent inputs
_MAX_COUNT = 2**62  # far from an overflow of int64

Layer = TypeVar("Layer", bound="StatefulLinear")


class StatefulLinear(Adapted):
    """The part of `ttt.nn.Linear` that holds its state. The docstring of `ttt.nn.Linear` lists the buffers."""

    routed = False  # whether it is part of an expert, which a router sends some tokens of each batch
    places: Tensor | None = None  # (T,) int64: which tokens it is being called with, if it is routed and learns
    anchor: Tensor
    win_x: Tensor
    win_delta: Tensor
    win_eta: Tensor
    # None if the configuration does not need them:
    importance: Tensor
    trace: Tensor
    momentum: Tensor
    win_trace: Tensor
    recent: Tensor
    recent_delta: Tensor
    input_factor: Tensor
    input_sums: Tensor
    output_factor: Tensor
    output_sums: Tensor
    past_mean: Tensor
    moments: Tensor
    agreement: Tensor
    win_weight: Tensor
    drift: Tensor
    # Counters:
    recent_seen: Tensor
    step: Tensor
    tokens: Tensor
    importance_scale: Tensor

    shared: set[str]  # names of buffers that other models may hold, too (`ttt.fork`); see `unshare`
    base: dict[str, Tensor]  # BASE buffers from before the first consolidation; empty until then
    strength: float  # of the protection: multiplies ewc_lambda and replay_beta (`ttt.Guard`)
    guarded: bool  # whether a guard has set the strength
    _pending: int
    _counter: WindowCounter | None  # of a capturable layer

    def _layout(self, dtype: torch.dtype) -> Layout:
        config, sum_dtype = self.config, accumulation(dtype)
        m, n, c = self.out_features, self.in_features, self.config.window
        default = torch.float32 if dtype == torch.float32 else torch.bfloat16
        if dtype == torch.float64:
            state = torch.float64
        elif config.state_dtype is not None:
            state = torch.uint8 if config.state_dtype == "8bit" else getattr(torch, config.state_dtype)
        else:
            state = default
        signed = state if state.is_floating_point else default  # 8 bits hold no signs
        sides, protects = self.sharding, config.ewc_lambda > 0
        k = count_directions(config.orthogonal or config.kronecker, sides.input.size(n))
        remembers, soft = config.replay_rows > 0 or (config.orthogonal > 0 and k > 0), config.kronecker > 0
        outputs = count_directions(config.kronecker, sides.output.size(m))
        recent = min(capacity := config.replay_capacity, _RECENT)
        columns = log8.width(n) if state == torch.uint8 else n
        gaussians = buffer_layout(n, sum_dtype, config.generated_rank)
        counter = ((1,), torch.int64)
        return {
            "anchor": ((m, n), dtype),
            "importance": ((m, columns), state) if protects else None,
            "trace": ((m, columns), state) if protects else None,
            "momentum": ((m, n), signed) if config.momentum else None,
            "win_x": ((c, n), dtype),
            "win_delta": ((c, m), dtype),
            "win_eta": ((c,), sum_dtype),
            "win_trace": ((c, m), dtype) if protects and config.importance == "mas" else None,
            "memory": ((capacity, n), dtype) if remembers else None,
            "recent": ((recent, n), dtype) if remembers or soft else None,
            "recent_delta": ((recent, m), dtype) if soft else None,
            "basis": ((k, n), dtype) if k else None,
            "output_basis": ((outputs, m), dtype) if outputs else None,
            **{name: kind if soft else None for name, kind in layout(config, m, n, sum_dtype, sides).items()},
            **{name: kind if config.generated_rows else None for name, kind in gaussians.items()},
            "seen": counter,
            "recent_seen": counter,
            "step": counter,
            "tokens": counter,
            "moments": None if config.rate == "constant" else ((2, 3), torch.float64),
            "importance_scale": ((1,), torch.float64),
            "agreement": ((1,), torch.float64) if config.follows else None,
            "win_weight": ((c,), sum_dtype) if config.follows else None,
            "drift": ((1,), torch.float64) if config.budget else None,
        }

    def _build(self, config: TTTConfig, name: str) -> None:
        super()._build(config, name)
        self.anchor.copy_(self.weight.detach())
        self._counter = None
        self._pending = 0
        self.strength, self.guarded = 1.0, False
        self.unsampled = 0  # rows that may be sampled before the counter has to be looked at
        self.shared = set()
        self.base = {}

    def _apply(self, fn, recurse=True):
        if self._counter is not None:
            raise RuntimeError("a capturable layer cannot be moved or converted; call capturable_(None) first")
        super()._apply(fn, recurse)
        with torch.inference_mode(False):
            self.base = {name: self._converted(name, t, fn(t)) for name, t in self.base.items()}
        return self

    # -- the whole state --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The live state tensors by name (not copies), and ``pending`` as a tensor (1,)."""
        out = {"weight": self.weight.detach()}
        out |= dict(self.named_buffers(recurse=False))
        out["pending"] = torch.tensor([self.pending])
        return out

    def gathered(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of `state` or ``base``; of a layer that is sharded over processes, those of the whole layer."""
        return {name: self._spread_as(name).gather(t) for name, t in state.items()}

    def parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `gathered`: of tensors of the whole layer, the parts that this process holds."""
        return {name: self._spread_as(name).part(t) for name, t in state.items()}

    def _spread_as(self, name: str) -> Sharding | Side:
        """What gathers and cuts the tensor ``name`` of the state."""
        if name in _MATRICES:
            return self.sharding
        return self.sharding.input if name in _INPUTS else self.sharding.output if name in _OUTPUTS else WHOLE

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Check that `load_state` can take ``state``: names, shapes, and the range of all counters.

        Raises:
            TypeError: if it is no dict of tensors.
            ValueError: if it does not fit. Dtypes and other values are not checked.
        """
        check_type("state", state, Mapping, "a dict of tensors by name")
        live: dict[str, Tensor] = {"weight": self.weight, **dict(self.named_buffers(recurse=False))}
        for name, value in state.items():
            check_dense(f"{name} of {self.name or 'the layer'}", value)
            if name != "pending" and name not in live:
                raise ValueError(f"{self.name or 'the layer'} has no state named {name!r}; it has {sorted(live)}")
            shape = (1,) if name == "pending" else tuple(live[name].shape)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} of {self.name or 'the layer'} must have shape {shape}, got {tuple(value.shape)}"
                )
            if name in ("pending", *_COUNTERS):
                if value.is_floating_point() or value.is_complex():
                    raise ValueError(f"{name} of {self.name or 'the layer'} must hold an integer, got {value.dtype}")
                if name == "pending":
                    self.check_pending(int(value))
                elif not 0 <= int(value) <= _MAX_COUNT:
                    raise ValueError(
                        f"{name} of {self.name or 'the layer'} must be in [0, {_MAX_COUNT}], got {int(value)}"
                    )

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy ``state``, as returned by `state`, into the live tensors. It may lack names.

        Raises:
            TypeError, ValueError: as `check_state`. Nothing has changed then.
            RuntimeError: if the layer's own tensors cannot be written; see `require_writable`.
        """
        self.check_state(state)
        self.require_writable()
        self.unsampled, self._binding = 0, None  # both know the counter of sampled rows
        for name, value in state.items():
            if name == "pending":
                self.pending = int(value)
            else:
                self._overwrite(name, value)
        if state.keys() >= self.state().keys():
            self.torn = ""

    def _overwrite(self, name: str, value: Tensor) -> None:
        """Copy ``value`` into the live tensor ``name``. If that is shared and equal already, it stays shared."""
        live = getattr(self, name).detach()
        if name in self.shared:
            if torch.equal(live, value.to(live.device)):
                return
            self.unshare(name, copy=False)
            live = getattr(self, name)
        live.copy_(value)

    def require_writable(self) -> None:
        """Check that the state can be written now.

        Raises:
            RuntimeError: if the weight or a buffer was made under `torch.inference_mode`, which is off now. Torch would
                refuse some of the writes of a learning step, after others have been made.
        """
        if torch.is_inference_mode_enabled():
            return
        tensors = {"weight": self.weight, **self._buffers}
        if fixed := [name for name, t in tensors.items() if t is not None and t.is_inference()]:
            raise RuntimeError(
                f"{fixed} of {self.name or 'the layer'} were made under torch.inference_mode() and cannot be written "
                "outside it; load or copy the model outside of inference mode"
            )

    def unshare(self, *names: str, copy: bool = True) -> None:
        """Make buffers ready to be written: those shared with other models are replaced by the layer's own.

        Args:
            names: of the buffers.
            copy: whether the new buffers get the content of the old ones; if False it is undefined.

        Raises:
            RuntimeError: if a buffer must be replaced, but the layer is capturable. Nothing has changed then.
        """
        replaced = self.shared.intersection(names)
        if replaced and self._counter is not None:
            raise RuntimeError(
                f"{sorted(replaced)} are shared with a fork and must be replaced, but a captured graph may hold them; "
                "call capturable_(None) first"
            )
        with torch.inference_mode(False):
            for name in replaced:
                buffer = getattr(self, name)
                setattr(self, name, buffer.clone() if copy else torch.empty_like(buffer))
                self.shared.discard(name)

    # -- before any learning ----------------------------------------------------------------------------------

    def remember_base(self) -> None:
        """Keep the buffers that `reset` and `ttt.restore_` go back to. Call it before the anchor first moves."""
        if not self.base:
            live = {name: b for name in BASE if (b := getattr(self, name)) is not None}
            self.base = {name: b if name in self.shared else b.clone() for name, b in live.items()}

    @property
    def base_weight(self) -> Tensor:
        """(m, n): the weight from before any learning."""
        return self.base.get("anchor", self.anchor)

    @torch.no_grad()
    def rebase(self) -> None:
        """Take the present weight, which was loaded from outside, as the one from before any learning.

        The anchor moves to it, and what was learnt on another weight is gone. What was calibrated stays as it is.
        """
        self.base = {name: value for name, value in self.base.items() if name != "anchor"}
        self.unshare("anchor", copy=False)
        self.anchor.copy_(self.weight)
        if self.base:
            self.base["anchor"] = self.anchor.clone()
        self._forget()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything learnt since calibration: weights, trace, window, and what was consolidated.

        Raises:
            ValueError: if ``base`` does not fit the layer; see `check_state`. Nothing has changed then.
            RuntimeError: if the layer's tensors cannot be written; see `require_writable`.
        """
        self.check_state(self.base)
        self.require_writable()
        for name, value in self.base.items():
            self._overwrite(name, value)
        self.base = {}
        self.weight.copy_(self.anchor)
        self._forget()

    def _forget(self) -> None:
        """Empty the window, the trace and all counters of what was learnt."""
        # Zeroed, not only marked empty: what a user said must not stay in memory.
        counted = ("recent_seen", "step", "tokens", "drift")
        learnt = ("trace", "momentum", "recent", "recent_delta", *counted, *PRESENT, *FEEDBACK)
        for name in ("win_x", "win_delta", "win_eta", "win_trace", *learnt):
            if (b := getattr(self, name)) is not None:
                b.zero_()
        if self.moments is not None:
            self.moments[STREAM].zero_()
        self.pending = 0
        self.torn = ""

    # -- Gaussians of the inputs, if ``generated_rows`` > 0 ---------------------------------------------------

    @property
    def past_inputs(self) -> Gaussian | None:
        """The Gaussian from which rows are drawn (live buffers); None if the configuration needs none."""
        return self._gaussian(PAST)

    @property
    def present_inputs(self) -> Gaussian | None:
        """The Gaussian of inputs committed since the last consolidation (live buffers), or None."""
        return self._gaussian(PRESENT)

    def set_past_inputs(self, past: Gaussian | None) -> None:
        """Write ``past`` into the buffers from which rows are drawn. None changes nothing."""
        if past is not None:
            self.unshare(*PAST, copy=False)
            self._write_gaussian(PAST, past)

    def add_present_inputs(self, x: Tensor) -> None:
        """Add the rows of ``x`` (T, n) to the present Gaussian, if there is one."""
        if (present := self.present_inputs) is not None:
            self._write_gaussian(PRESENT, present.with_rows(x))

    def merge_present_inputs(self) -> None:
        """Merge the present Gaussian into the past one and begin it anew."""
        past, present = self.past_inputs, self.present_inputs
        if past is not None and present is not None:
            self.set_past_inputs(past.joined(present))
            for name in PRESENT:
                getattr(self, name).zero_()

    def _gaussian(self, names: tuple[str, ...]) -> Gaussian | None:
        if self.past_mean is None:
            return None
        mean, factor, moments = (getattr(self, name) for name in names)
        return Gaussian(mean, factor, moments, self.sharding.input)

    def _write_gaussian(self, names: tuple[str, ...], values: Gaussian) -> None:
        for name, field in zip(names, FIELDS, strict=True):
            getattr(self, name).copy_(getattr(values, field))

    # -- counting the window ----------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Rows of the window in use, in [0, window]. If the layer is capturable, reading waits for the device.

        Setting it raises ValueError for other values and, if the layer is capturable, for numbers of rows that its
        steps do not make.
        """
        return self._pending if self._counter is None else self._counter.pending

    @pending.setter
    def pending(self, rows: int) -> None:
        self.check_pending(rows)
        if self._counter is None:
            self._pending = rows
        else:
            self._counter.pending = rows

    def check_pending(self, rows: int) -> None:
        """Raise ValueError unless ``pending`` can be set to ``rows``."""
        window, counter = self.config.window, self._counter
        if not isinstance(rows, int) or isinstance(rows, bool) or not 0 <= rows <= window:
            raise ValueError(
                f"pending of {self.name or 'the layer'} must be a whole number in [0, {window}], got {rows!r}"
            )
        if counter is not None and not counter.can_hold(rows):
            raise ValueError(
                f"pending = {rows} is no whole number of the layer's steps of {counter.rows} rows; "
                "call capturable_(None) first"
            )

    @property
    def capturable(self) -> int | None:
        """Rows of every step of a capturable layer; None for one that is not."""
        return None if self._counter is None else self._counter.rows

    def check_capturable(self, rows: int) -> None:
        """Raise ValueError if the layer cannot be made capturable for steps of ``rows`` rows."""
        if self.routed:
            raise ValueError(f"{self.name} is part of an expert, whose steps have as many rows as are routed to it")
        check_capturable(rows, self.weight, self.config.generated_rows)

    def capturable_(self: Layer, rows: int | None) -> Layer:
        """Let steps of ``rows`` rows be captured in a CUDA graph: forward, `learn`, and the commits that fall due.

        A capturable layer counts its window on the device only, so that a graph's replays and the host cannot
        disagree. `learn` reads nothing on the host and allocates nothing that outlives it. What needs the count
        (`pending`, `state`, `flush`, ...) still works, but waits for the device. Two things differ from other layers:

        - Every step must have ``rows`` rows.
        - A window without room for another step is committed by the next step, before its rows enter, as by `flush`
          at that moment. Steps of more than half the window's rows are committed at once and never enter it.

        Args:
            rows: rows of every step. None ends it. If the window's rows are no whole number of such steps, or leave no
                room for another, they are committed now.

        Returns:
            The layer. While it is capturable it cannot be moved or converted.

        Raises:
            ValueError: if ``rows`` is less than 1; if the layer is on a GPU and has a dtype without GPU kernels; or if
                it generates rows, which takes an eigendecomposition for which the host waits. Nothing has changed then.
            RuntimeError: while a CUDA graph is being captured.
        """
        if rows is not None:
            self.check_capturable(rows)
        forbid_capture("capturable_")
        pending = self.pending
        counter = None if rows is None else WindowCounter.of(rows, self.config.window, self.weight.device)
        if counter is not None and not counter.can_hold(pending):
            self.flush()
            pending = 0
        self._counter = counter
        self.pending = pending
        return self

    def flush(self) -> None:
        """Commit the rows of the window to the weights."""
        raise NotImplementedError
