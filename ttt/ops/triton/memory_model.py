"""The model that a memory is: GELU and inner norm, as in `ttt.ops.sequence.dual_form`, in float32.

Each column is a token. Columns are padded to a whole block of rows; ``width`` counts the rows ``i`` that there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

_C = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_A = tl.constexpr(0.044715)


@triton.jit
def gelu(z):
    """GELU by the tanh formula, and its derivative.

    With u = c (z + a z^3) and s = 1 / (1 + exp(-2 u)), (1 + tanh u) / 2 is s. So gelu(z) = z s, and the derivative is
    s + 2 z s (1 - s) c (1 + 3 a z^2).
    """
    square = z * z
    e = tl.exp(z * (square * _A + 1.0) * (-2.0 * _C))
    s = 1.0 / (1.0 + e)
    rest = tl.where(z > 0, e * s, 1.0 - s)  # 1 - s, which would lose its digits near s = 1
    return z * s, s + z * s * rest * (square * (3.0 * _A) + 1.0) * (2.0 * _C)


@triton.jit
def _standardised(z, width, eps, inside):
    """z less the mean of each column, divided by its deviation, and the inverse of that, a row."""
    centred = tl.where(inside, z - tl.sum(z, 0, keep_dims=True) / width, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0, keep_dims=True) / width + eps)
    return centred * inverse, inverse


@triton.jit
def read(z, q, norm_weight, norm_bias, head, width, eps, i):
    """The outputs for the last layer's outputs z: q + LN(z) with a norm, else z."""
    if norm_weight is not None:
        plain, _ = _standardised(z, width, eps, (i < width)[:, None])
        weight = tl.load(norm_weight + head * width + i, mask=i < width, other=0)[:, None]
        z = q + plain * weight + tl.load(norm_bias + head * width + i, mask=i < width, other=0)[:, None]
    return z


@triton.jit
def _normed_gradient(z, k, v, norm_weight, norm_bias, head, width, eps, i):
    inside = (i < width)[:, None]
    plain, inverse = _standardised(z, width, eps, inside)
    weight = tl.load(norm_weight + head * width + i, mask=i < width, other=0)[:, None]
    bias = tl.load(norm_bias + head * width + i, mask=i < width, other=0)[:, None]
    d = (plain * weight + bias + k - v) * weight
    along = tl.sum(d * plain, 0, keep_dims=True) / width
    return tl.where(inside, (d - tl.sum(d, 0, keep_dims=True) / width - plain * along) * inverse, 0.0)


@triton.jit
def loss_gradient(z, k, v, norm_weight, norm_bias, head, width, eps, i):
    """The gradient of |f(k) - v|^2 / 2 by the last layer's outputs z; zeros below the last row."""
    if norm_weight is None:
        return z - v
    else:  # Triton compiles what stands behind a return
        return _normed_gradient(z, k, v, norm_weight, norm_bias, head, width, eps, i)
