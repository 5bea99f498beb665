"""For messages: where a model whose output is not finite has weights that are not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ttt.adapt.fit import count_not_finite
from ttt.adapt.sharding import local
from ttt.nn.base import DTYPES

if TYPE_CHECKING:
    from ttt.learn.loop import ObserveOutput


def require_finite(model: nn.Module, logits: Tensor) -> None:
    """Raise FloatingPointError if ``logits`` (..., V) of ``model`` give a row without a distribution."""
    if not bool(logits.detach().logsumexp(-1).isfinite().all()):
        raise FloatingPointError(f"the model's logits are not finite: {where_not_finite(model)}")


def where_not_finite(model: nn.Module) -> str:
    """What to look at in ``model``, whose output is not finite: its first parameter that is not."""
    for name, parameter in model.named_parameters():
        weight = local(parameter)
        if weight.dtype in DTYPES and (wrong := count_not_finite(weight)):
            return (
                f"{wrong} of the {weight.numel()} numbers of {name} are NaN or infinite; repair the model, or load it "
                "again"
            )
    return "its parameters are finite, so look at its inputs, or for an overflow in its dtype"


def warn_if_nothing_was_learnt(model: nn.Module, output: ObserveOutput) -> None:
    """Warn if all chunks that were to be learnt were rejected. To be called by a public method."""
    if output.rejected and not output.learned:
        warnings.warn(
            f"nothing was learnt: of all {output.rejected} chunks the loss or a gradient is not finite; "
            f"{where_not_finite(model)}",
            stacklevel=3,
        )
