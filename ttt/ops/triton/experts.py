"""Outputs of many layers in one launch, each for rows of its own, and the gradients at their inputs.

Of layer e with W: m x n, X: C x n, D: C x m and eta: C, for its own rows of x and delta:

    y  = x W^T - ((x X^T) * eta) D
    dx = delta W - ((delta D^T) * eta) X

The experts of a mixture get a few rows each, and to launch kernels for each of them takes longer than what they
compute. The tensors of the layers are where they are: the kernel gets a table of their addresses. A program makes one
block of columns for all rows of one layer, so each W is read once if it has at most BT rows. Every program computes the
coefficients of the window, x X^T, which take as long as twice as many columns: a launch of their own would take longer.

Sums are in float32. A row of the window with eta = 0 is masked out of every load, so it may hold NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import operand
from ttt.ops.triton.window_linear import padded, times_rows


@triton.jit
def _at(address, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor of numbers of ``kind`` at the address that is stored at ``address``."""
    found = tl.load(address).to(tl.pointer_type(kind))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit(do_not_specialize=["window"])
def _experts(
    y, x, table, first, window, outputs, inputs,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """BM columns of y, for all rows of one layer. ``TRANSPOSED``: y is dx, and x is delta."""
    e = tl.program_id(1)
    begin, end = tl.load(first + e), tl.load(first + e + 1)
    weight = _at(table + e * 4, x.dtype.element_ty, ALIGNED)
    own = _at(table + e * 4 + (2 if TRANSPOSED else 1), x.dtype.element_ty, ALIGNED)
    other = _at(table + e * 4 + (1 if TRANSPOSED else 2), x.dtype.element_ty, ALIGNED)
    win_eta = _at(table + e * 4 + 3, tl.float32, False)
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    for t0 in range(begin, end, BT):
        t = t0 + tl.arange(0, BT)
        acc = tl.zeros((BT, BM), tl.float32)
        for c0 in range(0, window, BC):
            c = c0 + tl.arange(0, BC).to(tl.int64)
            eta = tl.load(win_eta + c, mask=c < window, other=0)
            # Compared with columns, so that a row's mask is known to be the same for neighbours, which wide loads need.
            read, live = tl.where(eta != 0, inputs, 0), eta != 0
            factor = tl.zeros((BT, BC), tl.float32)
            for k0 in range(0, inputs, BK):
                k = k0 + tl.arange(0, BK)
                rows = tl.load(x + t[:, None] * inputs + k, mask=(t < end)[:, None] & (k < inputs), other=0)
                held = tl.load(own + c[:, None] * inputs + k, mask=k < read[:, None], other=0)
                factor = tl.dot(rows.to(OPERAND), tl.trans(held.to(OPERAND)), factor, input_precision="ieee")
            d = tl.load(other + c[:, None] * outputs + i, mask=live[:, None] & (i < outputs), other=0)
            acc = times_rows(-factor * eta, d, acc, OPERAND)
        for k0 in range(0, inputs, BK):
            k = k0 + tl.arange(0, BK)
            rows = tl.load(x + t[:, None] * inputs + k, mask=(t < end)[:, None] & (k < inputs), other=0).to(OPERAND)
            if TRANSPOSED:
                inside = (k < inputs)[:, None] & (i < outputs)
                w = tl.load(weight + k.to(tl.int64)[:, None] * outputs + i, mask=inside, other=0)
                acc = tl.dot(rows, w.to(OPERAND), acc, input_precision="ieee")
            else:
                inside = (i < outputs)[:, None] & (k < inputs)
                w = tl.load(weight + i[:, None] * inputs + k, mask=inside, other=0)
                acc = tl.dot(rows, tl.trans(w.to(OPERAND)), acc, input_precision="ieee")
        inside = (t < end)[:, None] & (i < outputs)
        tl.store(y + t[:, None] * outputs + i, acc.to(y.dtype.element_ty), mask=inside)


_BLOCKS = {  # is the weight float32
    False: {"BT": 16, "BM": 32, "BK": 64, "num_warps": 4, "num_stages": 3},
    True: {"BT": 16, "BM": 32, "BK": 16, "num_warps": 4, "num_stages": 3},
}


MOST_ROWS = 64
"""Rows of one layer up to which it is read by few programs; with more, matrix products of its own are faster."""


def experts(
    x: torch.Tensor, held: Sequence[Sequence[torch.Tensor]], counts: Sequence[int], transposed: bool
) -> torch.Tensor:
    """What layers without a bias give for their rows, or, ``transposed``, the gradients at their inputs.

    Args:
        x: (R, n) inputs, or (R, m) gradients at the outputs: rows of all layers, one layer after the other.
        held: weight (m, n), win_x (C, n), win_delta (C, m) and win_eta (C,) of each of the layers, contiguous; the
            first three in the dtype of ``x``, the last one in float32.
        counts: the number of rows of each layer.

    Returns:
        (R, m) or, ``transposed``, (R, n).
    """
    weight, _, _, win_eta = held[0]
    window, outputs = win_eta.numel(), weight.shape[1 if transposed else 0]
    rows, inputs = x.shape
    y = x.new_empty((rows, outputs))
    if not rows or not outputs:
        return y
    addresses = [t.data_ptr() for tensors in held for t in tensors]
    first = itertools.accumulate(counts, initial=0)
    numbers = torch.tensor([*addresses, *first], dtype=torch.int64, device=x.device)  # one copy for both
    wide = x.dtype == torch.float32
    blocks = _BLOCKS[wide]
    _experts[triton.cdiv(outputs, blocks["BM"]), len(held)](
        y, x, numbers[: len(addresses)], numbers[len(addresses) :], window, outputs, inputs, TRANSPOSED=transposed,
        ALIGNED=not any(address % 16 for address in addresses), BC=padded(window, 32 if wide else 64),
        OPERAND=operand(x.dtype), **blocks,
    )  # fmt: skip
    return y
