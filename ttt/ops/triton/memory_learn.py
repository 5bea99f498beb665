"""What memories learn from a text: a program goes through the chunks of one head of one sequence.

`ttt.ops.sequence.dual_form` has the formulas and the names of their parts; `ttt.ops.triton.memory` describes the whole.
Before each chunk, the weights and the momentum are stored for `ttt.ops.triton.memory_read`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt.ops.triton.memory_model import gelu, loss_gradient
from ttt.ops.triton.memory_parts import (
    changed_bias,
    dot,
    factors_of,
    load,
    load_bias,
    store,
    store_bias,
)
from ttt.ops.triton.tokens import chunk, chunks_of, columns, numbers, store_columns, text


@triton.jit
def _copy(into, into_bias, slot, weight, bias, place, inputs, outputs, i, o):
    """Copies a block of the weights and biases of head ``place`` to those of ``slot``."""
    store(into, load(weight, place, inputs, outputs, i, o), slot, inputs, outputs, i, o)
    store_bias(into_bias, load_bias(bias, place, outputs, o), slot, outputs, o)


@triton.jit
def _change(
    x, row, heads, here, d, factors, slot, before, before_bias, before_velocity, before_velocity_bias,
    place, weight, bias, velocity, velocity_bias, inputs, outputs, first, blocks, o, biases,
    B: tl.constexpr, GATED: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """Changes the outputs ``o`` of a layer for ``blocks`` blocks of B inputs, and its biases if told to.

    ``x`` points to the inputs of the chunk's tokens, and d are columns. What was there before is stored in ``slot``.
    """
    for block in range(blocks):
        i = first + block * B + tl.arange(0, B)
        turned = tl.trans(columns(x, row, heads, here, inputs, i))
        w = load(weight, place, inputs, outputs, i, o)
        store(before, w, slot, inputs, outputs, i, o)
        columns_of_weight = d
        if GATED:
            w *= factors[6]
        if GATED or MOVING:
            columns_of_weight = factors[5][None, :] * d
        if MOVING:
            w += factors[7] * load(velocity, place, inputs, outputs, i, o)
        store(weight, w - dot(columns_of_weight, turned), place, inputs, outputs, i, o)
        if MOVING:
            tl.debug_barrier()  # the momentum has been read
            m = load(velocity, place, inputs, outputs, i, o)
            store(before_velocity, m, slot, inputs, outputs, i, o)
            m = factors[4] * m - dot(factors[3][None, :] * d, turned)
            store(velocity, m, place, inputs, outputs, i, o)
    if biases:
        b = load_bias(bias, place, outputs, o)
        mb = tl.zeros_like(b)
        store_bias(before_bias, b, slot, outputs, o)
        if MOVING:
            mb = load_bias(velocity_bias, place, outputs, o)
            store_bias(before_velocity_bias, mb, slot, outputs, o)
        b, mb = changed_bias(d, b, mb, factors)
        store_bias(bias, b, place, outputs, o)
        if MOVING:
            store_bias(velocity_bias, mb, place, outputs, o)


_SIZES = ["tokens", "heads", "mini_batch", "first", "part", "wide_blocks", "blocks"]


@triton.jit(do_not_specialize=_SIZES[:-1])
def learn_one(
    gradient, before, before_bias, before_velocity, before_velocity_bias,
    k, v, rate, gate, momentum, norm_weight, norm_bias,
    weight, bias, start, start_bias, velocity, velocity_bias,
    begins, position, tokens, heads, mini_batch, first, part, eps: tl.float32, wide_blocks,
    width: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One layer. ``gradient`` becomes the gradients times the rates."""
    GATED: tl.constexpr = gate is not None
    MOVING: tl.constexpr = momentum is not None
    place = tl.program_id(0).to(tl.int64)
    head, begin, end, held = text(place, begins, position, tokens, heads)
    i = tl.arange(0, BD)
    chunks = chunks_of(end - begin, held, mini_batch, C)
    last = tl.minimum(first + part, chunks)
    for n in range(first, last):
        row, here, some, fresh = chunk(n, begin, end, held, mini_batch, heads, head, C)
        slot = place * part + (n - first)
        tl.debug_barrier()  # what other threads have stored is there
        if fresh:
            _copy(start, start_bias, place, weight, bias, place, width, width, i, i)
            tl.debug_barrier()
        kt = columns(k, row, heads, here, width, i)
        z = dot(load(start, place, width, width, i, i), kt) + load_bias(start_bias, place, width, i)[:, None]
        d = loss_gradient(z, kt, columns(v, row, heads, here, width, i), norm_weight, norm_bias, head, width, eps, i)
        d = tl.where(here[None, :], d * numbers(rate, row, heads, here, 0.0)[None, :], 0.0)
        store_columns(gradient, d, row, heads, here, width, i)
        tl.debug_barrier()
        factors = factors_of(gate, momentum, row, heads, here, some, C)
        _change(
            k, row, heads, here, d, factors, slot, before, before_bias, before_velocity, before_velocity_bias,
            place, weight, bias, velocity, velocity_bias, width, width, 0, wide_blocks, i, True, B, GATED, MOVING,
        )  # fmt: skip
    tl.debug_barrier()
    if (first < chunks) & (last == chunks) & ((held + end - begin) % mini_batch == 0):
        _copy(start, start_bias, place, weight, bias, place, width, width, i, i)


@triton.jit(do_not_specialize=_SIZES)
def learn_two(
    gradient, inner_gradient, inner,
    before_1, before_bias_1, before_2, before_bias_2,
    before_velocity_1, before_velocity_bias_1, before_velocity_2, before_velocity_bias_2,
    k, v, rate, gate, momentum, norm_weight, norm_bias,
    weight_1, bias_1, weight_2, bias_2, start_1, start_bias_1, start_2, start_bias_2,
    velocity_1, velocity_bias_1, velocity_2, velocity_bias_2,
    begins, position, tokens, heads, mini_batch, first, part, eps: tl.float32, wide_blocks, blocks,
    width: tl.constexpr, middle: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Two layers, whose weights stay in memory, which the caches hold: they do not fit into registers.

    The program goes through blocks of the columns between the layers, twice for each chunk: for the gradient of the
    loss, and then to change both layers.
    """
    GATED: tl.constexpr = gate is not None
    MOVING: tl.constexpr = momentum is not None
    place = tl.program_id(0).to(tl.int64)
    head, begin, end, held = text(place, begins, position, tokens, heads)
    i = tl.arange(0, BD)
    chunks = chunks_of(end - begin, held, mini_batch, C)
    last = tl.minimum(first + part, chunks)
    for n in range(first, last):
        row, here, some, fresh = chunk(n, begin, end, held, mini_batch, heads, head, C)
        slot = place * part + (n - first)
        tl.debug_barrier()  # what other threads have stored is there
        z = tl.zeros((BD, C), tl.float32)
        for block in range(blocks):
            f = block * B + tl.arange(0, B)
            if fresh:
                _copy(start_1, start_bias_1, place, weight_1, bias_1, place, width, middle, i, f)
                _copy(start_2, start_bias_2, place, weight_2, bias_2, place, middle, width, f, i)
            tl.debug_barrier()
            x = dot(load(start_1, place, width, middle, i, f), columns(k, row, heads, here, width, i))
            x, slope = gelu(x + load_bias(start_bias_1, place, middle, f)[:, None])
            store_columns(inner, x, row, heads, here, middle, f)
            store_columns(inner_gradient, slope, row, heads, here, middle, f)
            z += dot(load(start_2, place, middle, width, f, i), x)
        z += load_bias(start_bias_2, place, width, i)[:, None]
        kt = columns(k, row, heads, here, width, i)
        d = loss_gradient(z, kt, columns(v, row, heads, here, width, i), norm_weight, norm_bias, head, width, eps, i)
        d = tl.where(here[None, :], d * numbers(rate, row, heads, here, 0.0)[None, :], 0.0)
        store_columns(gradient, d, row, heads, here, width, i)
        factors = factors_of(gate, momentum, row, heads, here, some, C)
        tl.debug_barrier()
        for block in range(blocks):
            f = block * B + tl.arange(0, B)
            d = columns(gradient, row, heads, here, width, i)  # read anew: there are no registers to hold it
            d1 = dot(tl.trans(load(start_2, place, middle, width, f, i)), d)
            d1 *= columns(inner_gradient, row, heads, here, middle, f)  # the slopes
            tl.debug_barrier()  # all have read the slopes before any writes over them
            store_columns(inner_gradient, d1, row, heads, here, middle, f)
            _change(
                k, row, heads, here, d1, factors,
                slot, before_1, before_bias_1, before_velocity_1, before_velocity_bias_1,
                place, weight_1, bias_1, velocity_1, velocity_bias_1, width, middle, 0, wide_blocks, f, True,
                B, GATED, MOVING,
            )  # fmt: skip
            _change(
                inner, row, heads, here, d, factors,
                slot, before_2, before_bias_2, before_velocity_2, before_velocity_bias_2,
                place, weight_2, bias_2, velocity_2, velocity_bias_2, middle, width, block * B, 1, i, block == 0,
                B, GATED, MOVING,
            )  # fmt: skip
    tl.debug_barrier()
    if (first < chunks) & (last == chunks) & ((held + end - begin) % mini_batch == 0):
        for block in range(blocks):
            f = block * B + tl.arange(0, B)
            _copy(start_1, start_bias_1, place, weight_1, bias_1, place, width, middle, i, f)
            _copy(start_2, start_bias_2, place, weight_2, bias_2, place, middle, width, f, i)
