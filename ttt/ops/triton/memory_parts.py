"""What the kernels of memories share: their factors, and a layer's weights, outputs and changes.

`ttt.ops.sequence.dual_form` has the formulas and the names of their parts. Everything is turned here: each column is a
token, and a layer's outputs are W^T h. So the warps share the rows of all products, of which weights have more than 16.
Products have float32 operands, in three passes of tf32 on tensor cores: the weights must not lose what they learn to
rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.tokens import numbers


@triton.jit
def dot(a, b):
    """a b in float32."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def places(inputs, outputs, i, o):
    """Where the inputs ``i`` of the outputs ``o`` of a layer's weight are, turned, and which there are."""
    at = i[None, :] * outputs + o[:, None]
    return at, (o < outputs)[:, None] & (i < inputs)[None, :]


@triton.jit
def load(weight, place, inputs, outputs, i, o):
    """W^T of the inputs ``i`` and the outputs ``o`` of a layer of head ``place``."""
    at, inside = places(inputs, outputs, i, o)
    return tl.load(weight + place * inputs * outputs + at, mask=inside, other=0)


@triton.jit
def store(weight, w, place, inputs, outputs, i, o):
    """Writes what `load` reads."""
    at, inside = places(inputs, outputs, i, o)
    tl.store(weight + place * inputs * outputs + at, w, mask=inside)


@triton.jit
def load_bias(bias, place, outputs, o):
    """The bias of the outputs ``o`` of a layer of head ``place``."""
    return tl.load(bias + place * outputs + o, mask=o < outputs, other=0)


@triton.jit
def store_bias(bias, b, place, outputs, o):
    """Writes what `load_bias` reads."""
    tl.store(bias + place * outputs + o, b, mask=o < outputs)


@triton.jit
def factors_of(gate, momentum, row, step, here, some, C: tl.constexpr):
    """What the gates and momenta of ``some`` tokens amount to: see `ttt.ops.sequence.dual_form.Factors`.

    In this order: P^T / r, a', m', the factors of the gradients in the last momentum, and of the first momentum in it;
    and those of the last token in the first three. Without gates and momenta only the first is used.
    """
    c = tl.arange(0, C)
    upper, above = c[:, None] <= c[None, :], c[:, None] < c[None, :]
    seen = tl.where(upper, 1.0, 0.0)
    kept = tl.full((C,), 1.0, tl.float32)
    moved = tl.zeros((C,), tl.float32)
    newest = tl.zeros((C,), tl.float32)
    left = 0.0
    last = c == some - 1
    if gate is not None:
        a = numbers(gate, row, step, here, 1.0)
        kept = tl.cumprod(a, 0)
        seen = tl.where(upper, tl.cumprod(tl.where(above, a[None, :], 1.0), 1), 0.0)
    if momentum is not None:
        m = numbers(momentum, row, step, here, 0.0)
        carried = tl.cumprod(m, 0)
        momenta = tl.where(upper, tl.cumprod(tl.where(above, m[None, :], 1.0), 1), 0.0)
        moved = tl.sum(carried[:, None] * seen, 0)
        seen = dot(momenta, seen)
        newest = tl.sum(tl.where(last[None, :], momenta, 0.0), 1)
        left = tl.sum(tl.where(last, carried, 0.0), 0)
    last_seen = tl.sum(tl.where(last[None, :], seen, 0.0), 1)
    last_kept = tl.sum(tl.where(last, kept, 0.0), 0)
    last_moved = tl.sum(tl.where(last, moved, 0.0), 0)
    return seen, kept, moved, newest, left, last_seen, last_kept, last_moved


@triton.jit
def by_weights(h, w, m, factors, GATED: tl.constexpr, MOVING: tl.constexpr):
    """The outputs of a layer for inputs h by the weights and the momentum before these tokens, without the biases."""
    z = dot(w, h)
    if GATED:
        z *= factors[1][None, :]
    if MOVING:
        z += factors[2][None, :] * dot(m, h)
    return z


@triton.jit
def by_bias(b, mb, factors):
    """What the bias and its momentum add to the outputs."""
    return factors[1][None, :] * b[:, None] + factors[2][None, :] * mb[:, None]


@triton.jit
def changed_bias(d, b, mb, factors):
    """The bias of a layer and its momentum after the columns d of these tokens."""
    b = factors[6] * b + factors[7] * mb - tl.sum(factors[5][None, :] * d, 1)
    return b, factors[4] * mb - tl.sum(factors[3][None, :] * d, 1)
