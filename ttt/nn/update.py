"""`Update`: what a layer can learn from one backward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ttt.ops.schema import need


def versions(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Changes when one of ``tensors`` is written or replaced; of tensors of inference mode, when it is replaced."""
    return tuple(None if t is None else (id(t), 0 if t.is_inference() else t._version) for t in tensors)


@dataclasses.dataclass
class Update:
    """What one layer can learn from one backward pass of T rows.

    Attributes:
        x: (T, n), inputs, in the dtype of the weight.
        delta: (T, m), gradients of the summed loss at the layer's output, in the same dtype.
        eta: (T,), steps; float32 (float64 for float64 weights).
        trace_delta: (T, m), the gradients that the trace uses (MAS); None: ``delta``.
        finite: () bool, whether all of it can be learnt from.
        moments: (3,) float64, what the rows add to the layer's ``moments``; None if ``rate`` is "constant".
        weight: (T,), of the dtype of ``eta``: the rows' ``win_weight``; None without feedback (`ttt.nn.feedback`).
        agreement: (1,) float64, the layer's ``agreement`` once the rows are learnt; likewise.
        gain: (T,), of the dtype of ``eta``: of the `ttt.nn.rates.Rates`; None unless the steps are bounded by the loss
            (`ttt.nn.own_loss`). `ttt.nn.Linear.learn` does not use it.
        applied: x' (T, n) and delta' (T, m), like ``x`` and ``delta``: the rows that the update is made with
            (`ttt.nn.Linear.applied`). None, or where ``made_of`` has changed since: they are made of ``x`` and
            ``delta`` when they are learnt.
        made_of: `versions` of ``x``, ``delta`` and the layer's directions that ``applied`` was made of.
    """

    x: Tensor
    delta: Tensor
    eta: Tensor
    trace_delta: Tensor | None
    finite: Tensor
    moments: Tensor | None = None
    weight: Tensor | None = None
    agreement: Tensor | None = None
    gain: Tensor | None = None
    applied: tuple[Tensor, Tensor] | None = None
    made_of: tuple[Any, ...] = ()

    def check_fits(self, weight: Tensor, sum_dtype: torch.dtype) -> None:
        """Check shapes, dtypes, devices and strides against a layer's ``weight`` (m, n) and the dtype of its steps.

        Raises:
            ValueError, TypeError: if a tensor does not fit; the error names it.
        """
        (m, n), rows, dtype = weight.shape, self.x.shape[0], (weight.dtype,)
        need("eta", self.eta, (rows,), (sum_dtype,), weight)
        need("x", self.x, (rows, n), dtype, weight)
        need("delta", self.delta, (rows, m), dtype, weight)
        if self.applied is not None:
            need("applied[0]", self.applied[0], (rows, n), dtype, weight)
            need("applied[1]", self.applied[1], (rows, m), dtype, weight)
        if self.trace_delta is not None:
            need("trace_delta", self.trace_delta, (rows, m), dtype, weight)
        if self.moments is not None:
            need("moments", self.moments, (3,), (torch.float64,), weight)
        if self.weight is not None:
            need("weight", self.weight, (rows,), (sum_dtype,), weight)
        if self.agreement is not None:
            need("agreement", self.agreement, (1,), (torch.float64,), weight)
