"""Layers whose weight is quantized: users' low-rank weights learn beside it, and it is never written.

A weight of torchao is a tensor of a class of its own. It has the dtype and the shape that it stands for, and computes
`torch.nn.functional.linear`. For the gradient at the layer's input it is dequantized, a block of rows at a time. What
only its own layer can compute with, as weights of bitsandbytes, is a `ttt.nn.module_weight.ModuleWeight`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt import ops
from ttt.config import TTTConfig
from ttt.nn.autocast import autocast_dtype
from ttt.nn.base import absent
from ttt.nn.bnb import mixes_rows
from ttt.nn.frozen_weight import FrozenWeight
from ttt.nn.low_rank import LowRankLinear
from ttt.nn.module_weight import ModuleWeight
from ttt.nn.own_gradient import give_own_gradient
from ttt.nn.row_blocks import Blocks, can_be_cut, dequantized_blocks, dequantized_rows, transposed_product
from ttt.ops.modes import has_tangents

_ROUNDING = 0.03  # of the output of a layer that computes in 8 bits, relative to its size
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")  # where torchao's tensors say that inputs are rounded


def quantized(module: nn.Module) -> str:
    """What quantized ``module``, a linear layer; empty if it is not quantized."""
    if type(module).__module__.startswith("bitsandbytes."):
        return f"bitsandbytes' {type(module).__name__}"
    kind = type(getattr(module, "weight", None))
    if any(each.__module__.split(".")[0] == "torchao" for each in kind.__mro__):
        return f"torchao's {kind.__name__}"
    return ""


def blocks_gradients(module: nn.Module) -> bool:
    """Whether ``module`` is quantized by torchao in a way that rounds its inputs, through which no gradient passes."""
    weight = getattr(module, "weight", None)
    return bool(quantized(module)) and any(getattr(weight, name, None) is not None for name in _ACTIVATIONS)


def why_blocked(module: Any, *, own: bool = False) -> str:
    """Why layers before ``module``, if it is quantized, would learn something wrong; empty if they would not.

    Some kernels for packed weights have no derivative, or silently give none; those of bitsandbytes for CPUs with
    AVX512-BF16 do so once they have run without gradients. So a copy is run as a learner would. A layer that is not in
    memory cannot be tried.

    Args:
        own: whether the gradient is that of `ttt.nn.frozen_weight`, and not the library's.
    """
    if blocks_gradients(module):
        return "rounds its inputs, through which no gradient passes"
    if not quantized(module) or absent(module.weight):
        return ""
    trial = copy.deepcopy(module).eval().requires_grad_(False)
    frozen = FrozenWeight(trial)
    if own:
        give_own_gradient(trial)
    forward = frozen.product if own else trial
    weight, generator = trial.weight, torch.Generator().manual_seed(0)
    x, other = (
        torch.randn(1, 1, trial.in_features, generator=generator).to(weight.device, frozen.dtype) for _ in range(2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            change = _change(forward, other)
        except (NotImplementedError, RuntimeError, TypeError, AssertionError):
            return ""  # the model's own forward pass will say why
        directions, gradients = (change, torch.randn(change.shape, generator=generator).to(change)), list[Tensor]()
        try:
            for direction in directions:
                with torch.enable_grad():
                    y = trial(x.requires_grad_(True))
                    if not y.requires_grad:
                        return "lets no gradient through to its inputs"
                    found = torch.autograd.grad((y * direction).sum(), x, allow_unused=True)[0]
                gradients.append(torch.zeros_like(x) if found is None else found)
        except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            return f"lets no gradient through to its inputs ({type(error).__name__}: {str(error)[:120]})"
        steps = other, gradients[1]
        changes = change, _change(forward, gradients[1])
    right = all(map(_fits, changes, directions, steps, gradients))
    return "" if right else "gives its inputs a gradient that is not its own"


@torch.no_grad()
def _change(linear: Callable[[Tensor], Tensor], step: Tensor) -> Tensor:
    """How the output of ``linear`` changes along ``step`` (1, 1, n) from zeros."""
    return linear(step) - linear(torch.zeros_like(step))


def _fits(change: Tensor, direction: Tensor, step: Tensor, gradient: Tensor) -> bool:
    """Whether the output of a linear layer changes along ``step`` as its ``gradient`` in ``direction`` says.

    With a random step and a random direction both sides are small where there are many outputs, and nearly any gradient
    seems to fit. They are large where the ``direction`` is the ``change`` itself, which shows a gradient that is zero
    or of another scale, and where the ``step`` is the ``gradient`` in a random direction, which shows that of another
    matrix.
    """
    wanted = float((change.double() * direction.double()).sum())
    found = float((step.double() * gradient.double()).sum())
    sizes = float(change.double().norm() * direction.double().norm() + step.double().norm() * gradient.double().norm())
    return abs(found - wanted) <= _ROUNDING * sizes


def why_not(module: nn.Module) -> str:
    """Why users' weights cannot learn beside the quantized weight of ``module``; empty if they can."""
    if not isinstance(module, nn.Linear):
        return "it is no torch.nn.Linear"
    if blocks_gradients(module):
        return "it rounds its inputs, too, and lets no gradient through"
    if mixes_rows(module):
        return "its outliers (threshold > 0) change the rounding of other users' rows"
    return ""


def dequantized(weight: Tensor) -> Tensor:
    """(m, n): all of a quantized ``weight``, as a plain tensor of its dtype."""
    return weight.dequantize() if isinstance(weight, ModuleWeight) else dequantized_rows(weight)


def plain_parts(t: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of which ``t`` consists: itself, or what a tensor class of its own holds."""
    if hasattr(t, "__tensor_flatten__"):
        for part in t.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(t, part), f"{name}.{part}")
    else:
        yield name, t.as_subclass(Tensor)


def row_blocks(weight: Tensor) -> Blocks:
    """(rows, these rows dequantized) of a quantized ``weight`` (m, n), one block after another."""
    if isinstance(weight, ModuleWeight):
        yield from weight.frozen.blocks()
        return
    yield from dequantized_blocks(weight)


class QuantizedLowRankLinear(LowRankLinear):
    """A `ttt.nn.LowRankLinear` whose ``weight`` is quantized.

    Rows of no user get the quantized layer's output bit for bit. The gradient at the input is that of the dequantized
    weight; only one block of its rows is in memory at a time.
    """

    @classmethod
    def beside(cls, module: Any, config: TTTConfig, name: str, dtype: torch.dtype) -> QuantizedLowRankLinear:
        """A layer that learns beside the quantized ``module``.

        ``dtype`` is that of its inputs, where the module does not say.
        """
        weight = module.weight if can_be_cut(module) else nn.Parameter(ModuleWeight(FrozenWeight(module, dtype)), False)
        return cls.from_weight(weight, module.bias, config, name)

    def forward(self, x: Tensor) -> Tensor:
        """As `ttt.nn.LowRankLinear.forward`; layers of bitsandbytes take inputs of any dtype."""
        own = isinstance(self.weight, ModuleWeight) and autocast_dtype(x) is None
        if own and x.is_floating_point() and x.dtype != self.weight.dtype:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return super().forward(x)

    def _base(self, x: Tensor) -> Tensor:
        """W x + bias for each row of ``x``.

        Raises:
            RuntimeError: in forward-mode autograd, as the libraries that quantize pass no tangents.
        """
        if has_tangents():
            raise RuntimeError(
                f"{self.name or 'a layer'} is quantized, and passes no tangents of forward-mode autograd "
                "(torch.func.jvp, torch.autograd.forward_ad); take gradients by a backward pass"
            )
        if isinstance(self.weight, ModuleWeight):
            return self.weight.frozen.product(x)
        return nn.functional.linear(x, self.weight, self.bias)

    def _product(self, x: Tensor, users: Tensor | None) -> Tensor:
        if users is None:
            return self._base(x)
        x = x.contiguous()
        finite = torch.isfinite(x).all(-1, keepdim=True)  # see `isolated_linear`
        base = torch.where(finite, self._base(torch.where(finite, x, 0.0)), torch.nan)
        return base + ops.low_rank_linear(x, None, None, self.a, self.b, self.rows, users)

    def transposed_product(self, delta: Tensor, users: Tensor | None) -> Tensor:
        base = transposed_product(delta, row_blocks(self.weight), self.in_features)
        if users is None:
            return base
        return base + ops.low_rank_linear(delta.contiguous(), None, None, self.b, self.a, self.rows, users)

    @property
    def base_weight(self) -> Tensor:
        """(m, n): the weight, dequantized. A new tensor."""
        return dequantized(self.weight)

    # -- the tensors of another library's layer are moved, saved and loaded by itself ---------------------------------

    def _apply(self, fn, recurse=True):
        if isinstance(self.weight, ModuleWeight):
            self.weight.frozen.module.to(fn(torch.empty(0, device=self.weight.device)).device)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if isinstance(self.weight, ModuleWeight):
            self.weight.frozen.module._save_to_state_dict(destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if isinstance(self.weight, ModuleWeight):
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}  # as `Adapted`: the bias is shared
            self.weight.frozen.module._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            torch.autograd.graph.increment_version(self.weight)  # the module was written, for `ttt.version`
            self._largest_step = None
            self.rebases += 1
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
