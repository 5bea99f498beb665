"""Emphasised steps are bounded by the loss of the text that they are taken on.

Steps that are multiplied by an emphasis E (`ttt.Learner.observe`) are far larger than those of a stream. On a text that
is nearly known, or whose tokens all have the same gradient, they would go far past the point where its loss is 0, and
move the weights further than the text is worth. To first order the update of a layer, with the rows x', delta' and the
steps eta of T tokens, lowers the sum L of their losses by::

    d = sum_ij eta_j (delta_i . delta'_j) (x_i . x'_j)

A layer that has the ``share`` 1 / (number of layers) of the decrease multiplies its steps by

    min(1, 2 share L / (E d))

Without the 2 this is the step size of Polyak ("Introduction to Optimization", 1987) for a loss whose least value is 0.
Losses of softmax fall more slowly than their tangent, and what is to be found again under another wording must be
learnt with a margin, hence the 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt.config import TTTConfig

BEYOND = 2.0  # how far a step may go, in units of the one that would bring the loss to 0 if it fell along its tangent


def applies(config: TTTConfig, emphasis: float) -> bool:
    """Whether the steps on a text that is read with ``emphasis`` are bounded."""
    return emphasis > 1.0 and config.rate == "decrease"


def users_decreases(eta: Tensor, gain: Tensor, users: Tensor) -> Tensor:
    """d of the module's docstring for each token's user, of that user's tokens alone: (T,); 0 for tokens of nobody.

    Args:
        eta: (T,), the steps.
        gain: (T,), of their `ttt.nn.rates.Rates`; d is the sum of the products of the two.
        users: (T,) int32, the slot of each token's user, or -1.
    """
    found = torch.zeros_like(eta)
    for user in users.unique().tolist():
        if user >= 0:
            own = (users == user).nonzero().flatten()
            found[own] = (eta[own] * gain[own]).sum()
    return found


def factor(decrease: Tensor, loss: Tensor, share: float) -> Tensor:
    """What multiplies the steps, in [0, 1], of the dtype of ``decrease``.

    It is 0 where the decrease is NaN, as sums that overflow are: nothing bounds such a step.

    Args:
        decrease: E d of the module's docstring, of any shape.
        loss: L, in nats, of that shape.
        share: of the layer.
    """
    largest = BEYOND * share * loss.to(decrease.dtype)
    return torch.where(decrease <= largest, 1.0, largest / decrease).nan_to_num(0.0)
