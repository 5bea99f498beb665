"""Layers whose weight is quantized: users' low-rank weights learn beside it, and it is never written.

A weight of torchao is a tensor of a class of its own. It has the dtype and the shape that it stands for, and computes
`torch.nn.functional.linear`. For the gradient at the layer's input it is dequantized, a block of rows at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ttt import ops
from ttt.nn.base import absent
from ttt.nn.low_rank import LowRankLinear
from ttt.ops.low_rank.reference import isolated_linear

_BLOCK = 1 << 20  # elements that are dequantized at a time, at most, unless a row has more
_ROUNDING = 0.03  # of the output of a layer that computes in 8 bits, relative to its size
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")  # where torchao's tensors say that inputs are rounded


def is_subclass(weight: Tensor) -> bool:
    """Whether ``weight`` is of a tensor class that is not torch's own, as quantized weights are."""
    return type(weight) not in (Tensor, nn.Parameter)


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


def why_blocked(module: Any) -> str:
    """Why layers before ``module``, if it is quantized, would learn something wrong; empty if they would not.

    Some kernels for packed weights have no derivative, or silently give none; those of bitsandbytes for CPUs with
    AVX512-BF16 do so once they have run without gradients. So a copy is run as a learner would. A layer that is not in
    memory cannot be tried.
    """
    if blocks_gradients(module):
        return "rounds its inputs, through which no gradient passes"
    if not quantized(module) or absent(module.weight):
        return ""
    trial = copy.deepcopy(module).eval().requires_grad_(False)
    weight, generator = trial.weight, torch.Generator().manual_seed(0)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x, other = (torch.randn(1, 1, trial.in_features, generator=generator).to(weight.device, dtype) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            change = _change(trial, other)
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
        except (NotImplementedError, RuntimeError) as error:
            return f"lets no gradient through to its inputs ({type(error).__name__}: {str(error)[:120]})"
        steps = other, gradients[1]
        changes = change, _change(trial, gradients[1])
    right = all(map(_fits, changes, directions, steps, gradients))
    return "" if right else "gives its inputs a gradient that is not its own"


@torch.no_grad()
def _change(linear: nn.Module, step: Tensor) -> Tensor:
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
    if type(module) is not nn.Linear:
        return "its weight is read by its own class only"
    weight = module.weight
    if blocks_gradients(module):
        return "it rounds its inputs, too, and lets no gradient through"
    try:
        rows = dequantized(weight, slice(0, 1))
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        return f"it cannot be dequantized ({type(error).__name__})"
    if is_subclass(rows) or rows.shape != (min(1, weight.shape[0]), weight.shape[1]):
        return "it cannot be dequantized"
    return ""


@torch.no_grad()
def dequantized(weight: Tensor, rows: slice = slice(None)) -> Tensor:
    """The ``rows`` of a quantized ``weight`` (m, n), as a plain tensor of its dtype."""
    weight = weight.detach()
    try:
        return weight[rows].dequantize().to(weight.dtype)
    except NotImplementedError:  # a layout that cannot be cut
        return weight.dequantize().to(weight.dtype)[rows]


def plain_parts(t: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of which ``t`` consists: itself, or what a tensor class of its own holds."""
    if hasattr(t, "__tensor_flatten__"):
        for part in t.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(t, part), f"{name}.{part}")
    else:
        yield name, t.as_subclass(Tensor)


def row_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows dequantized) of a quantized ``weight`` (m, n), one block after another."""
    m, n = weight.shape
    step = max(1, _BLOCK // max(1, n))
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        yield rows, dequantized(weight, rows)


class QuantizedLowRankLinear(LowRankLinear):
    """A `ttt.nn.LowRankLinear` whose ``weight`` is quantized.

    Rows of no user get the quantized layer's output bit for bit. The gradient at the input is that of the dequantized
    weight; only one block of its rows is in memory at a time.
    """

    def _product(self, x: Tensor, users: Tensor | None) -> Tensor:
        if users is None:
            return nn.functional.linear(x, self.weight, self.bias)
        x = x.contiguous()
        base = isolated_linear(x, self.weight, self.bias)
        return base + ops.low_rank_linear(x, None, None, self.a, self.b, self.rows, users)

    def transposed_product(self, delta: Tensor, users: Tensor | None) -> Tensor:
        base = self._by_blocks(delta)
        if users is None:
            return base
        return base + ops.low_rank_linear(delta.contiguous(), None, None, self.b, self.a, self.rows, users)

    def _by_blocks(self, delta: Tensor) -> Tensor:
        """delta W (..., n) for ``delta`` (..., m); NaN for rows that are not finite, which reach no other row."""
        finite = torch.isfinite(delta).all(-1, keepdim=True)
        delta = torch.where(finite, delta, 0.0)
        found = torch.zeros((*delta.shape[:-1], self.in_features), dtype=self.eta_sum.dtype, device=delta.device)
        for rows, block in row_blocks(self.weight):
            found += delta[..., rows] @ block
        return torch.where(finite, found, torch.nan).to(delta.dtype)

    @property
    def base_weight(self) -> Tensor:
        """(m, n): the weight, dequantized. A new tensor."""
        return dequantized(self.weight)
