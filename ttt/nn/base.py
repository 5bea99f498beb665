"""What `ttt.nn.Linear` and `ttt.nn.LowRankLinear` share: construction, buffers, conversion, and state_dict."""

from __future__ import annotations

import threading
import weakref
import zlib
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_type
from ttt.config import TTTConfig
from ttt.layer_lock import LayerLock
from ttt.nn.directions import principal_directions, project_rows
from ttt.nn.parallel import UNSHARDED, Sharding, is_sharded
from ttt.ops import log8
from ttt.ops.dtypes import accumulation
from ttt.ops.modes import dispatch_modes, transforms_active
from ttt.ops.schema import FLOATS

DTYPES = FLOATS
"""Dtypes of weights that can be adapted."""

Layout = dict[str, "tuple[tuple[int, ...], torch.dtype] | None"]
"""Buffer name -> shape and dtype, or None for a buffer that the configuration does not need."""

_LARGEST_STEP = 0.01  # in units of the norm of the weight
_SEED_MASK = (1 << 63) - 1
# Parameters that torch.nn.utils (weight_norm, spectral_norm, prune) registers in place of one of a layer's own.
_COMPUTED = {f"{name}_{end}": name for name in ("weight", "bias") for end in ("orig", "g", "v")}
# They change at every step, and torch's way of setting attributes takes 3 us.
_OFTEN = ("sink", "_pending", "unsampled")
_BOUND = ("config", "strength", "seed")  # Attributes that are no tensors, but whose values a binding holds.


_ddp: Any = torch.nn.parallel.DistributedDataParallel if torch.distributed.is_available() else None


class Sink(list[tuple[Tensor, Tensor]]):
    """Where the backward passes of one thread leave (x, delta) of a layer."""

    def __init__(self, joins: bool = False) -> None:
        self.thread = threading.get_ident()
        self.joins = joins  # whether what it gets is joined with what other processes have found
        self.places: list[Tensor] = []  # of a layer that a router sends some tokens: which they are, for each pair


def absent(weight: Tensor) -> str:
    """Why ``weight``, which is not all in memory, cannot learn; empty if it is."""
    if is_sharded(weight):
        return "is a DTensor, of which this process holds a part (FSDP2 or tensor parallelism)"
    if weight.is_meta:
        return (
            "is on the meta device: it was not loaded yet, or hooks offload it (accelerate's device_map with 'cpu' or "
            "'disk', cpu_offload)"
        )
    return ""


def captures(layer: Adapted) -> bool:
    """Whether a forward pass that begins here is to leave (x, delta) of ``layer`` in its sink.

    Another thread's is not; but autograd computes checkpointed layers again in threads of its own.
    """
    sink = layer.sink
    if sink is None or is_traced():
        return sink is not None
    if not sink.joins and _ddp is not None and _ddp._active_ddp_module is not None:
        raise RuntimeError(
            f"{layer.name or 'a layer'} is to learn inside of a DistributedDataParallel, whose replicas would learn "
            "from different tokens and drift apart; give ttt.learning data_parallel=True, by which all learn from the "
            "tokens of all, or call the model that it wraps, and learn in one process"
        )
    return sink.thread == threading.get_ident() or in_backward()


def is_traced() -> bool:
    """Whether this thread traces what it computes, for `torch.compile` or `torch.export`.

    `torch.compiler.is_compiling` is True in all threads while one of them compiles.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and dispatch_modes() > 0


def refuse_written(layer: Adapted) -> None:
    """Raise RuntimeError in the backward pass of outputs that ``layer`` made with other weights than it has now."""
    raise RuntimeError(
        f"{layer.name or 'a layer'} has learnt, or was reset or loaded, since the forward pass of this backward pass: "
        "its gradients would be those of other weights. Run the backward pass first, or the forward pass again"
    )


def is_transformed(layer: Adapted) -> bool:
    """Whether ``layer`` must compute in plain torch, which transforms of torch.func and forward-mode autograd need.

    They cannot see into ops that have no derivative of theirs, and would take their tangents for zero.

    Raises:
        RuntimeError: if the layer is to learn from what it computes: nothing would be captured.
    """
    if torch.compiler.is_dynamo_compiling() or not transforms_active():
        return False
    if torch.is_grad_enabled() and captures(layer):
        raise RuntimeError(
            f"{layer.name or 'a layer'} cannot learn from what a transform of torch.func or forward-mode autograd "
            "computes; leave ttt.learning(model) first, or learn from a backward pass"
        )
    return True


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


class Adapted(torch.nn.Linear):
    """A linear layer with learning state in buffers; its parameters are new or existing ones, and get no gradient.

    If ``transposed`` is True, ``weight`` (m, n) is saved and loaded as (n, m), the layout of GPT-2's ``Conv1D``. When
    the layer is converted to another dtype (``model.to(torch.bfloat16)``, ``.half()``, ...), its weights and the
    buffers stored in the same dtype are rounded to it. All other buffers get the dtypes that they have in a layer
    built with the new dtype.
    """

    transposed = False
    placed = 0  # the number of the call of `ttt.adapt_` that has put the layer in the place of another module
    released = False  # True once `ttt.restore_` has put the original module back: the layer must not learn any more
    memory: Tensor
    seen: Tensor
    basis: Tensor
    output_basis: Tensor
    _largest_step: float | None = None
    sharding = UNSHARDED  # of a layer whose weight is spread over processes: how; its sizes are those of its part
    share = 1.0  # 1 / the number of learning layers of the model (`ttt.adapt_`), for ``rate="decrease"``
    _binding: Any = None  # addresses of the tensors, for the C++ kernels; made by `ttt.nn.cpu_binding.binding_of`
    torn = ""  # names the write to several layers that ended half-way at this layer or beside it; usually empty

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: TTTConfig | None = None,
        name: str = "",
    ) -> None:
        if config is not None:
            check_type("config", config, TTTConfig, "a ttt.TTTConfig or None")
        with torch.inference_mode(False):  # Parameters made in inference mode could not be written outside it.
            super().__init__(in_features, out_features, bias, device, dtype)
        self._build(config or self._default_config(), name)

    @classmethod
    def from_weight(
        cls,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        config: TTTConfig,
        name: str,
        sharding: Sharding = UNSHARDED,
    ):
        """A layer around existing parameters, which are shared, not copied; of a sharded one this process's part."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        if sharding:
            layer.sharding = sharding
        layer.out_features, layer.in_features = weight.shape
        layer.weight = weight
        layer.bias = bias  # type: ignore[assignment]
        layer._build(config, name)
        return layer

    @staticmethod
    def _default_config() -> TTTConfig:
        return TTTConfig()

    def _layout(self, dtype: torch.dtype) -> Layout:
        """Shapes and dtypes of the layer's buffers if its weight has ``dtype``."""
        raise NotImplementedError

    @torch.inference_mode(False)
    def _build(self, config: TTTConfig, name: str) -> None:
        """Set all attributes besides the parameters, which exist already; buffers are zeros."""
        self.config = config
        self.name = name
        self.lock = LayerLock()
        self.seed = ((config.seed << 32) ^ zlib.crc32(name.encode())) & _SEED_MASK
        self.loads = self.rebases = 0  # how often another state, and another base weight, was put in
        self.sink: Sink | None = None  # where backward passes leave (x, delta)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # Requires grad, so that autograd's graph begins at this layer. It never receives a gradient.
        self._root = torch.zeros((), requires_grad=True, device=self.weight.device)
        for buffer, kind in self._layout(self.weight.dtype).items():
            zeros = None if kind is None else torch.zeros(kind[0], dtype=kind[1], device=self.weight.device)
            self.register_buffer(buffer, zeros, persistent=False)

    def _bind(self) -> Any:
        """A new binding; see `ttt.nn.cpu_binding`."""
        raise NotImplementedError

    def __setattr__(self, name, value):
        if name in _OFTEN:
            self.__dict__[name] = value
            return
        if isinstance(value, Tensor) or name in _BOUND or value is None:
            self.__dict__["_binding"] = None  # It may hold what is replaced here.
        super().__setattr__(name, value)

    def __getstate__(self):
        # A copy has other addresses, and does not learn in the block that the layer learns in.
        return {**self.__dict__, "_binding": None, "_own": {}, "sink": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._remember_own()

    def _remember_own(self) -> None:
        """Note the parameters, without keeping them, for `register_parameter`."""
        self.__dict__["_own"] = {key: weakref.ref(p) for key, p in self._parameters.items() if p is not None}

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """As of any module.

        Raises:
            RuntimeError: for one from which a weight is to be computed before each forward pass, as by weight_norm,
                spectral_norm and prune of torch.nn.utils. The layer is as it was then.
        """
        if (replaced := _COMPUTED.get(name)) is not None:
            own = self.__dict__.get("_own", {}).get(replaced)
            if replaced not in self._parameters and own is not None and (parameter := own()) is not None:
                held = {replaced: parameter, **self._parameters}  # weight_norm has removed it
                self._parameters.clear()
                self._parameters.update({key: held.pop(key) for key in ("weight", "bias") if key in held} | held)
            raise RuntimeError(self._refuses_removal(replaced))
        super().register_parameter(name, param)
        if param is not None:
            self.__dict__.setdefault("_own", {})[name] = weakref.ref(param)

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "bias") and name in self._parameters:
            raise RuntimeError(self._refuses_removal(name))
        super().__delattr__(name)

    def _refuses_removal(self, key: str) -> str:
        return (
            f"{self.name or 'the layer'}.{key} cannot be removed or computed from other parameters (weight_norm, "
            "spectral_norm, prune or a parametrization of torch.nn.utils): the layer learns in it. Call ttt.restore_ "
            "first, and leave the layer out of target_modules afterwards"
        )

    def unshare(self, *names: str, copy: bool = True) -> None:
        """Make buffers ready to be written, which other models may hold, too. Here no buffer is ever shared."""

    def _require_frozen(self) -> None:
        """Raise RuntimeError if a parameter requires grad, which it would not get: an optimizer must not write it."""
        for key, parameter in self._parameters.items():
            if parameter is not None and parameter.requires_grad:
                raise RuntimeError(
                    f"{self.name or 'the layer'}.{key} requires grad, but adapted layers give their parameters none; "
                    "what an optimizer writes would be neither learnt nor protected. Call requires_grad_(False) on it, "
                    "and train other parameters only; or call ttt.restore_(model, keep_learned=True) before training it"
                )

    @property
    def base_weight(self) -> Tensor:
        """(m, n): the weight from before any learning."""
        raise NotImplementedError

    def largest_step(self) -> float | None:
        """The largest norm of one token's update; None for no limit.

        There is one for ``rate="decrease"``, unless the weight was 0 before learning.
        """
        if self.config.rate != "decrease":
            return None
        if self._largest_step is None:
            norm = self.sharding.norm(self.base_weight.detach(), accumulation(self.weight.dtype))
            self._largest_step = _LARGEST_STEP * float(norm)
        return self._largest_step or None

    @property
    def damps(self) -> bool:
        """Whether updates are made with other rows than those that backward passes give; see `applied`."""
        return self.basis is not None or self.output_basis is not None

    def applied(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that updates are made with for inputs ``x`` (T, n) and gradients ``delta`` (T, m)."""
        sides = self.sharding
        if x.is_cuda and self.basis is not None and self.output_basis is not None and sides.side is None:
            return torch.ops.ttt.project_out_pair(x, self.basis, delta, self.output_basis)
        return project_rows(x, self.basis, sides.input), project_rows(delta, self.output_basis, sides.output)

    @torch.no_grad()
    def refresh_basis(self) -> None:
        """Set ``basis``, if updates are orthogonal, to the principal directions of the rows of the replay memory."""
        if self.config.orthogonal and self.basis is not None:
            self.unshare("basis", copy=False)
            side = self.sharding.input
            rows = side.gather(self.memory[: int(self.seen)])
            self.basis.copy_(side.part(side.same(principal_directions(rows, len(self.basis)))))

    @torch.inference_mode(False)
    def _apply(self, fn, recurse=True):
        dtype = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
        if dtype not in DTYPES:
            raise TypeError(f"{self.name or 'the layer'} must be one of {[str(d) for d in DTYPES]}, got {dtype}")
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._binding = self._largest_step = None
        self._remember_own()
        for name, buffer in before.items():
            if buffer is not None:
                self._buffers[name] = self._converted(name, buffer, getattr(self, name))
        return self

    def _converted(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """Buffer ``name`` for the present weight, if a conversion has turned ``before`` into ``after``."""
        kind = self._layout(self.weight.dtype)[name]
        if kind is None or after.dtype == kind[1]:
            return after
        # From the tensor before the conversion, as ``after`` may have lost digits.
        moved, dtype = before.to(after.device), kind[1]
        if moved.dtype == dtype:
            return moved
        moved = log8.decode(moved, self.in_features) if log8.is_packed(moved) else moved
        return log8.encode(moved) if dtype == torch.uint8 else moved.to(dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:
            key = prefix + "weight"
            destination[key] = destination[key].T.contiguous()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        key = prefix + "weight"
        if self.transposed and key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].T}
        # Copied, not assigned: the module that `ttt.restore_` puts back has the same parameter.
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if key in state_dict and state_dict[key].shape == self.weight.shape:
            self._largest_step = None
            self.rebases += 1
            self.rebase()

    def rebase(self) -> None:
        """Take the present weight, which was loaded from outside, as the one from before any learning."""
