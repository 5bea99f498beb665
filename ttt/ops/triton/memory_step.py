"""Memories that learn, for one token of each sequence: TTT-Linear, TTT-MLP and Titans        q, k, v: D, weights: I x O

A program reads and changes the state of one head of one sequence. `ttt.ops.sequence.dual_form` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ttt.ops.triton.memory_model import gelu, loss_gradient, read
from ttt.ops.triton.memory_parts import load, places, store

MOST_WIDE = 128
"""The widest head of a token: wider weights of one layer do not fit into registers."""
BLOCK = 32
"""Columns between two layers that are read and changed at once."""


@triton.jit
def _numbers(pointer, at, n, i):
    """Numbers ``i`` of the ``n`` from ``at`` on, as float32."""
    return tl.load(pointer + at + i, mask=i < n, other=0).to(tl.float32)


@triton.jit
def _first(weight, start, held, place, inputs, outputs, i, o):
    """The weights that the mini-batch began with: the present ones if it has ``held`` no tokens, else ``start``."""
    at, _ = places(inputs, outputs, i, o)
    at += place * inputs * outputs
    begins = (o < tl.where(held == 0, outputs, 0))[:, None] & (i < inputs)[None, :]
    goes_on = (o < tl.where(held == 0, 0, outputs))[:, None] & (i < inputs)[None, :]
    return tl.load(start + at, mask=goes_on, other=tl.load(weight + at, mask=begins, other=0))


@triton.jit
def _first_bias(bias, start_bias, held, at, n, j):
    """The bias that the mini-batch began with: see `_first`."""
    return tl.where(held == 0, _numbers(bias, at, n, j), _numbers(start_bias, at, n, j))


@triton.jit
def _change_weight(x, d, a, mu, weight, start, velocity, ends, place, inputs, outputs, i, j):
    """Changes a block of a weight by the outer product of x and d, and returns it."""
    w = load(weight, place, inputs, outputs, i, j)
    step = -d[:, None] * x[None, :]
    if velocity is not None:
        step += mu * load(velocity, place, inputs, outputs, i, j)
        store(velocity, step, place, inputs, outputs, i, j)
    w = a * w + step
    store(weight, w, place, inputs, outputs, i, j)
    if ends:
        store(start, w, place, inputs, outputs, i, j)
    return w


@triton.jit
def _change_bias(d, a, mu, bias, start_bias, velocity_bias, ends, at, n, j):
    """Changes a bias, and returns it."""
    step = -d
    if velocity_bias is not None:
        step += mu * _numbers(velocity_bias, at, n, j)
        tl.store(velocity_bias + at + j, step, mask=j < n)
    b = a * _numbers(bias, at, n, j) + step
    tl.store(bias + at + j, b, mask=j < n)
    if ends:
        tl.store(start_bias + at + j, b, mask=j < n)
    return b


@triton.jit
def _gradient(z, kt, vt, rate, norm_weight, norm_bias, head, width, eps, i):
    """The loss's gradient by the outputs z of one token, times its rate."""
    d = loss_gradient(z[:, None], kt[:, None], vt[:, None], norm_weight, norm_bias, head, width, eps, i)
    return rate * tl.sum(d, 1)


@triton.jit(do_not_specialize=["heads", "mini_batch", "blocks"])
def _memory_token(
    out, q, k, v, rate, gate, momentum, norm_weight, norm_bias, position,
    weight_1, bias_1, weight_2, bias_2, start_1, start_bias_1, start_2, start_bias_2,
    velocity_1, velocity_bias_1, velocity_2, velocity_bias_2,
    heads, mini_batch, scale: tl.float32, eps: tl.float32, blocks, width: tl.constexpr, middle: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """One token of one head: its output, and its state, which is changed in place. ``middle``: 0 for one layer."""
    place = tl.program_id(0).to(tl.int64)
    head = place % heads
    held = tl.load(position + place // heads)  # tokens of the present mini-batch so far
    ends = held + 1 >= mini_batch
    i = tl.arange(0, BD)
    at = place * width
    qt, kt, vt = scale * _numbers(q, at, width, i), _numbers(k, at, width, i), _numbers(v, at, width, i)
    eta, a, mu = tl.load(rate + place), 1.0, 0.0
    if gate is not None:
        a = tl.load(gate + place)
    if momentum is not None:
        mu = tl.load(momentum + place)
    if weight_2 is None:
        w = _first(weight_1, start_1, held, place, width, width, i, i)
        z = tl.sum(w * kt[None, :], 1) + _first_bias(bias_1, start_bias_1, held, at, width, i)
        d = _gradient(z, kt, vt, eta, norm_weight, norm_bias, head, width, eps, i)
        tl.debug_barrier()  # all have read the state before any changes it
        w = _change_weight(kt, d, a, mu, weight_1, start_1, velocity_1, ends, place, width, width, i, i)
        z = tl.sum(w * qt[None, :], 1)
        z += _change_bias(d, a, mu, bias_1, start_bias_1, velocity_bias_1, ends, at, width, i)
    else:
        z = _first_bias(bias_2, start_bias_2, held, at, width, i)
        for block in range(blocks):
            f = block * BF + tl.arange(0, BF)
            w = _first(weight_1, start_1, held, place, width, middle, i, f)
            x = tl.sum(w * kt[None, :], 1) + _first_bias(bias_1, start_bias_1, held, place * middle, middle, f)
            x, slope = gelu(x)
            w = _first(weight_2, start_2, held, place, middle, width, f, i)
            z += tl.sum(w * x[None, :], 1)
        d = _gradient(z, kt, vt, eta, norm_weight, norm_bias, head, width, eps, i)
        tl.debug_barrier()
        z = tl.zeros((BD,), tl.float32)
        for block in range(blocks):
            f = block * BF + tl.arange(0, BF)
            w = _first(weight_1, start_1, held, place, width, middle, i, f)
            x = tl.sum(w * kt[None, :], 1) + _first_bias(bias_1, start_bias_1, held, place * middle, middle, f)
            x, slope = gelu(x)
            w = _first(weight_2, start_2, held, place, middle, width, f, i)
            d1 = tl.sum(w * d[:, None], 0) * slope
            tl.debug_barrier()
            w = _change_weight(kt, d1, a, mu, weight_1, start_1, velocity_1, ends, place, width, middle, i, f)
            h = tl.sum(w * qt[None, :], 1)
            h += _change_bias(d1, a, mu, bias_1, start_bias_1, velocity_bias_1, ends, place * middle, middle, f)
            h, slope = gelu(h)
            w = _change_weight(x, d, a, mu, weight_2, start_2, velocity_2, ends, place, middle, width, f, i)
            z += tl.sum(w * h[None, :], 1)
        z += _change_bias(d, a, mu, bias_2, start_bias_2, velocity_bias_2, ends, at, width, i)
    o = tl.sum(read(z[:, None], qt[:, None], norm_weight, norm_bias, head, width, eps, i), 1)
    tl.store(out + at + i, o.to(out.dtype.element_ty), mask=i < width)


def why_not(weights: Sequence[torch.Tensor]) -> str:
    """Empty if a token can be read with memories of these ``weights``, else why not."""
    layers, width = len(weights) // 2, weights[-1].shape[-1]
    if layers > 2:
        return f"no Triton kernel for tokens and memories of {layers} layers"
    return f"no Triton kernel for tokens and heads wider than {MOST_WIDE}, got {width}" if width > MOST_WIDE else ""


def memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    gate: torch.Tensor | None,
    momentum: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    weights: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    velocity: Sequence[torch.Tensor],
    position: torch.Tensor,
    mini_batch: int,
    scale: float,
) -> torch.Tensor:
    """The outputs; ``weights``, ``start`` and ``velocity`` become those after the token, in place."""
    batch, heads, width = q.shape
    out, deep = torch.empty_like(v), len(weights) > 2
    middle = weights[0].shape[-1] if deep else 0
    layers = []
    for tensors in (weights, start, velocity):
        layers += [*tensors, *[None] * (4 - len(tensors))]
    block = triton.next_power_of_2(width)
    if batch * heads:
        _memory_token[(batch * heads,)](
            out, q, k, v, rate, gate, momentum, norm_weight, norm_bias, position, *layers,
            heads, mini_batch, scale, eps, triton.cdiv(middle, BLOCK), width, middle, BD=block, BF=BLOCK,
            num_warps=4 if block <= 64 else 8 if deep or not velocity else 16, num_stages=1,
        )  # fmt: skip
    return out
