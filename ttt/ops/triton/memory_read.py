"""What memories answer to a text, after `ttt.ops.triton.memory_learn`: a program for each chunk of a head.

`ttt.ops.sequence.dual_form` has the formulas and the names of their parts; `ttt.ops.triton.memory` describes the whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.memory_model import gelu, read
from ttt.ops.triton.memory_parts import by_bias, by_weights, dot, factors_of, load, load_bias
from ttt.ops.triton.tokens import chunk, columns, store_columns, text

_SIZES = ["tokens", "heads", "mini_batch", "first", "part", "blocks"]


@triton.jit(do_not_specialize=_SIZES[:-1])
def read_one(
    out, gradient, before, before_bias, before_velocity, before_velocity_bias,
    q, k, gate, momentum, norm_weight, norm_bias,
    begins, position, tokens, heads, mini_batch, first, part, scale: tl.float32, eps: tl.float32,
    width: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The outputs of one layer."""
    GATED: tl.constexpr = gate is not None
    MOVING: tl.constexpr = momentum is not None
    place = tl.program_id(1).to(tl.int64)
    head, begin, end, held = text(place, begins, position, tokens, heads)
    row, here, some, _ = chunk(first + tl.program_id(0), begin, end, held, mini_batch, heads, head, C)
    i = tl.arange(0, BD)
    slot = place * part + tl.program_id(0)
    if some > 0:
        qt = scale * columns(q, row, heads, here, width, i)
        factors = factors_of(gate, momentum, row, heads, here, some, C)
        match = dot(tl.trans(columns(k, row, heads, here, width, i)), qt)
        w, b = load(before, slot, width, width, i, i), load_bias(before_bias, slot, width, i)
        m, mb = w, tl.zeros((BD,), tl.float32)
        if MOVING:
            m = load(before_velocity, slot, width, width, i, i)
            mb = load_bias(before_velocity_bias, slot, width, i)
        z = by_weights(qt, w, m, factors, GATED, MOVING) + by_bias(b, mb, factors)
        z -= dot(columns(gradient, row, heads, here, width, i), (match + 1.0) * factors[0])
        o = read(z, qt, norm_weight, norm_bias, head, width, eps, i)
        store_columns(out, o, row, heads, here, width, i)


@triton.jit(do_not_specialize=_SIZES)
def read_two(
    out, gradient, inner_gradient, inner,
    before_1, before_bias_1, before_2, before_bias_2,
    before_velocity_1, before_velocity_bias_1, before_velocity_2, before_velocity_bias_2,
    q, k, gate, momentum, norm_weight, norm_bias,
    begins, position, tokens, heads, mini_batch, first, part, scale: tl.float32, eps: tl.float32, blocks,
    width: tl.constexpr, middle: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The outputs of two layers, through blocks of the columns between them."""
    GATED: tl.constexpr = gate is not None
    MOVING: tl.constexpr = momentum is not None
    place = tl.program_id(1).to(tl.int64)
    head, begin, end, held = text(place, begins, position, tokens, heads)
    row, here, some, _ = chunk(first + tl.program_id(0), begin, end, held, mini_batch, heads, head, C)
    i = tl.arange(0, BD)
    slot = place * part + tl.program_id(0)
    if some > 0:
        qt = scale * columns(q, row, heads, here, width, i)
        factors = factors_of(gate, momentum, row, heads, here, some, C)
        like = (dot(tl.trans(columns(k, row, heads, here, width, i)), qt) + 1.0) * factors[0]
        mb = tl.zeros((BD,), tl.float32)
        if MOVING:
            mb = load_bias(before_velocity_bias_2, slot, width, i)
        z = by_bias(load_bias(before_bias_2, slot, width, i), mb, factors)
        match = tl.full((C, C), 1.0, tl.float32)
        for block in range(blocks):
            f = block * B + tl.arange(0, B)
            w = load(before_1, slot, width, middle, i, f)
            m, moving = w, tl.zeros((B,), tl.float32)
            if MOVING:
                m = load(before_velocity_1, slot, width, middle, i, f)
                moving = load_bias(before_velocity_bias_1, slot, middle, f)
            h = by_weights(qt, w, m, factors, GATED, MOVING)
            h += by_bias(load_bias(before_bias_1, slot, middle, f), moving, factors)
            h, _slope = gelu(h - dot(columns(inner_gradient, row, heads, here, middle, f), like))
            match += dot(tl.trans(columns(inner, row, heads, here, middle, f)), h)
            w = load(before_2, slot, middle, width, f, i)
            m = w
            if MOVING:
                m = load(before_velocity_2, slot, middle, width, f, i)
            z += by_weights(h, w, m, factors, GATED, MOVING)
        z -= dot(columns(gradient, row, heads, here, width, i), match * factors[0])
        o = read(z, qt, norm_weight, norm_bias, head, width, eps, i)
        store_columns(out, o, row, heads, here, width, i)
