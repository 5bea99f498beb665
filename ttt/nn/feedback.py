"""Feedback: the steps of a layer shrink while they undo each other.

No one size of the steps is right for every text. In a text without anything to learn, each step undoes a part of the
one before it, and smaller steps lose less. So every layer measures the agreement of new gradients with its latest
update. With the T tokens i of a step and the last C tokens j that the layer has learnt from::

    h   = 1/C sum_ij w_i w_j (delta_i . delta'_j) (x_i . x'_j)                        at most 1 in size
    a   <- rho^(T/C) a + (1 - rho) h                                                  rho = 3/4
    eta <- eta max(1/20, exp(kappa min(0, a + 1/50)))

where w_j is the step of token j over that of a typical token, divided by the root mean square s of the sizes of the
tokens' gradients (`ttt.nn.rates`), so that a typical row has length 1. h is the derivative of the loss of the new
tokens by the size of the latest update, with the sign of a gain: it is negative where the latest update would have
harmed them less if it had been smaller (hypergradient descent: Almeida et al., 1998; Baydin et al., "Online Learning
Rate Adaptation with Hypergradient Descent", ICLR 2018). Of a text from which something can be learnt, h is about 0 in
the mean, with both signs; so a mean over about four windows counts, and only if it is clearly below 0. h is a sum
over tokens: tokens that come one by one change a about as much as in one step.

The tokens j are those whose rows the window's buffers hold. Of a capturable layer whose steps do not divide C these may
be fewer than C.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ttt.nn.parallel import UNSHARDED, Sharding
from ttt.ops import cpu

BUFFERS = ("agreement", "win_weight")
"""Buffers of `ttt.nn.Linear` that hold the feedback."""

KEPT, BELOW, SMALLEST = 0.75, 0.02, 0.05  # rho; how far below 0 the mean must be; the smallest factor


class Latest(NamedTuple):
    """The latest update of a layer, and the agreement so far; for L layers at once with a leading dimension of L.

    Attributes:
        x, delta: (C, n) and (C, m), the rows x' and delta' of the last C tokens learnt, in any order.
        weight: (C,), w of each; 0 for rows that hold no token.
        agreement: (1,) float64: a.
    """

    x: Tensor
    delta: Tensor
    weight: Tensor
    agreement: Tensor

    def pairs(self, x: Tensor, delta: Tensor, wide: torch.dtype, sharding: Sharding = UNSHARDED) -> Tensor:
        """(T, C): (delta_i . delta'_j) (x_i . x'_j) for ``x`` (T, n) and ``delta`` (T, m)."""
        parts = (x, self.x), (delta, self.delta)
        if x.ndim == 2 and wide == torch.float32 and not sharding and all(cpu.takes(*part) for part in parts):
            inputs, outputs = (cpu.row_products(*part) for part in parts)
            return inputs * outputs
        inputs = sharding.input.sum((x @ self.x.mT).to(wide))
        return inputs * sharding.output.sum((delta @ self.delta.mT).to(wide))


class Followed(Protocol):
    """What `Latest` offers, however its rows are held."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def agreement(self) -> Tensor: ...

    def pairs(self, x: Tensor, delta: Tensor, wide: torch.dtype, sharding: Sharding = UNSHARDED) -> Tensor: ...


def bilinear(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """(1,): left . matrix right, for ``left`` (T,), ``matrix`` (T, C) and ``right`` (C,); of L of each (L, 1)."""
    return (left.unsqueeze(-2) @ (matrix @ right.unsqueeze(-1))).squeeze(-1)


def next_agreement(
    latest: Followed,
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    sharding: Sharding = UNSHARDED,
    counts: Tensor | None = None,
) -> Tensor:
    """a after tokens with the inputs ``x`` (T, n), gradients ``delta`` (T, m) and ``weight`` (T,): (1,) float64.

    Nothing is written, and the host does not wait. Rows whose products overflow count as 0. ``sharding`` is that of the
    layer, and ``counts`` as in `ttt.nn.rates.rates`.
    """
    wide, window = weight.dtype, latest.weight.shape[-1]
    found = bilinear(weight, latest.pairs(x, delta, wide, sharding), latest.weight.to(wide)).double() / window
    found = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1.0, 1.0)
    tokens = len(x) if counts is None else counts.double()
    return latest.agreement * KEPT ** (tokens / window) + (1 - KEPT) * found


def factor(agreement: Tensor, kappa: float) -> Tensor:
    """What multiplies the steps at an ``agreement`` (1,): (1,) float64 in [1/20, 1]; (L, 1) for (L, 1)."""
    return (kappa * (agreement + BELOW).clamp_max(0.0)).exp().clamp_min(SMALLEST)
