"""How the kernels of sequence ops find their tokens in tensors (B, T, H, D), packed or not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bounds(begins, sequence, tokens):
    """The first token of a sequence, and the one behind its last."""
    if begins is None:
        begin = sequence * tokens
        end = begin + tokens
    else:
        begin = tl.load(begins + sequence)
        end = tl.load(begins + sequence + 1)
    return begin, end


@triton.jit
def rows(pointer, row, here, width, i):
    """Rows ``row`` of a matrix ``width`` wide, columns ``i``, as float32; zeros where not ``here``."""
    inside = here[:, None] & (i < width)[None, :]
    return tl.load(pointer + row[:, None] * width + i[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def columns(pointer, row, step, here, width, i):
    """Rows ``row``, ``row + step``, ... of a matrix ``width`` wide, turned to columns: those that are ``here``.

    ``row`` is one 64-bit number, and what is added to it 32 bits wide: addresses take fewer registers so.
    """
    at = tl.arange(0, here.shape[0])[None, :] * step * width + i[:, None]
    inside = here[None, :] & (i < width)[:, None]
    return tl.load(pointer + row * width + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_columns(pointer, values, row, step, here, width, i):
    """Writes what `columns` reads."""
    at = tl.arange(0, here.shape[0])[None, :] * step * width + i[:, None]
    inside = here[None, :] & (i < width)[:, None]
    tl.store(pointer + row * width + at, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def numbers(pointer, row, step, here, other):
    """One number for each of the rows of `columns`, and ``other`` for those that are not ``here``."""
    return tl.load(pointer + row + tl.arange(0, here.shape[0]) * step, mask=here, other=other)


@triton.jit
def chunks_of(tokens, held, mini_batch, C: tl.constexpr):
    """Into how many chunks `chunk` divides ``tokens`` tokens."""
    every, all_tokens = (mini_batch + C - 1) // C, held + tokens
    count = all_tokens // mini_batch * every + (all_tokens % mini_batch + C - 1) // C - held // C
    return tl.where(tokens > 0, count, 0)


@triton.jit
def text(place, begins, position, tokens, heads):
    """Of head ``place`` of all sequences': its number, its text's ends, and how far its mini-batch is before that."""
    sequence = place // heads
    begin, end = bounds(begins, sequence, tokens)
    return place % heads, begin, end, tl.load(position + sequence)


@triton.jit
def chunk(n, begin, end, held, mini_batch, heads, head, C: tl.constexpr):
    """The tokens of chunk ``n`` of a text from ``begin`` to ``end``.

    A chunk lies in one mini-batch, and begins a multiple of C tokens after the mini-batch does; or with the text, whose
    first token comes ``held`` tokens after its mini-batch began.

    Returns:
        The row of its first token in a tensor (tokens, heads), which of C tokens there are, how many, and whether a
        mini-batch begins with it.
    """
    every, at = (mini_batch + C - 1) // C, held // C + n
    first = at // every * mini_batch + at % every * C - held
    last = tl.minimum(first + C, (at // every + 1) * mini_batch - held)
    t = tl.maximum(first, 0) + begin
    some = tl.minimum(begin + last, end) - t
    return t * heads + head, tl.arange(0, C) < some, some, (at % every == 0) & (first >= 0)
