"""Shared by the kernels: the random streams of `ttt.ops.philox` and `ttt.ops.rounding`, and operand types."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ttt.ops import philox, rounding

DRAW = tl.constexpr(philox.DRAW)
INSERT = tl.constexpr(philox.INSERT)
ROUND = tl.constexpr(philox.ROUND)
TOKEN = tl.constexpr(philox.TOKEN)
WEYL = tl.constexpr(rounding.WEYL)
MIX_0, MIX_1 = (tl.constexpr(c) for c in rounding.MIX)

INTERPRETED = triton.knobs.runtime.interpret

GATED = {"do_not_specialize_on_alignment": ["gate"]}
"""For kernels with a gate, of which they load one number: a gate at any address needs the same variant."""

_OPERAND = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def operand(dtype: torch.dtype) -> tl.dtype:
    """The operand type of tl.dot for values of ``dtype``: the same type or a wider one."""
    # The interpreter multiplies the bit patterns of bfloat16 numbers as if they were integers.
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else _OPERAND[dtype]


def signed(seed: int) -> int:
    """The 64-bit seed as a signed number, for arguments of kernels that are annotated as ``tl.int64``.

    Without the annotation its type would depend on its value, and a seed of another type would need another variant of
    the kernel. Loading that while a CUDA graph is captured breaks the capture.
    """
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right in float32, by torch's matmul."""
    if left.dtype == torch.float32:
        return left @ right
    if INTERPRETED:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def padded_rows(rows: int) -> int:
    """The rows of a tl.dot operand that can hold ``rows`` rows."""
    return max(16, triton.next_power_of_2(rows))


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.version.cuda is not None else (0, 0)


def capability() -> tuple[int, int]:
    """The compute capability of the current NVIDIA GPU; (0, 0) for other GPUs, and (9, 0) where there is no GPU."""
    return _capability(torch.cuda.current_device()) if torch.cuda.is_available() else (9, 0)


def overlapping() -> dict[str, bool]:
    """The options of a launch whose kernel calls `begin`.

    On GPUs of compute capability 9.0 or later its start overlaps with the end of the launch before it (CUDA's
    programmatic dependent launch).
    """
    return {"PDL": True, "launch_pdl": True} if capability() >= (9, 0) and not INTERPRETED else {"PDL": False}


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors() -> int:
    """Multiprocessors of the current GPU; where there is none, those of an H100 or H200."""
    return _multiprocessors(torch.cuda.current_device()) if torch.cuda.is_available() else 132


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait until the launches before this one have ended and their results can be read, and let the next one start."""
    wait_for_previous(PDL)
    let_next_start(PDL)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the launches before this one have ended and their results can be read.

    A kernel may read before this what launches before the previous one wrote, if the previous one calls `begin` first.
    """
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let programs of the next launch start as soon as there is room beside those of this one."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _word_of(k, step, STREAM: tl.constexpr, seed):
    """Word k % 4 (int64) of the counter (k // 4, 0, step)."""
    w0, w1, w2, w3 = tl.philox(seed, (k // 4).to(tl.uint32), k.to(tl.uint32) * 0, step, STREAM)
    return tl.where(k % 4 == 0, w0, tl.where(k % 4 == 1, w1, tl.where(k % 4 == 2, w2, w3))).to(tl.int64)


@triton.jit
def draw(r, seen_ptr, step_ptr, capacity, seed):
    """The memory rows (int64) drawn for replay rows ``r`` (int32); -1 while the memory is empty.

    If ``seen_ptr`` is None, replay row r is row r of the memory.
    """
    if seen_ptr is None:
        index = r.to(tl.int64)
    else:
        filled = tl.minimum(tl.load(seen_ptr), capacity)
        word = _word_of(r, tl.load(step_ptr).to(tl.uint32), DRAW, seed)
        index = tl.where(filled > 0, (word * filled) >> 32, -1)
    return index


@triton.jit
def choose_token(k, tokens, every, step_ptr, seed):
    """The token (int64) that stands for group ``k`` (int32) of ``every`` tokens in the trace, and the group's size."""
    size = tl.minimum(tokens - k * every, every)
    word = _word_of(k, tl.load(step_ptr).to(tl.uint32), TOKEN, seed)
    return (k * every).to(tl.int64) + ((word * size) >> 32), size


@triton.jit
def _mix(x, key):
    """Hash each word x (uint32) with its key, as `ttt.ops.rounding.mix`."""
    x ^= x >> 16
    x *= MIX_0
    x ^= (x >> 15) ^ key
    x *= MIX_1
    return x ^ (x >> 16)


@triton.jit
def rounding_words(i, pair, step, seed):
    """uint32 words (BM x BP) for rows ``i`` (BM) and columns 2 ``pair``, 2 ``pair`` + 1 (BP)."""
    s0, s1, s2, s3 = tl.philox(seed, step * 0, step * 0, step, ROUND)
    row = i.to(tl.uint32) * WEYL
    first, second = _mix(row + s0, s1), _mix(row + s2, s3)
    return _mix((pair.to(tl.uint32) * WEYL)[None, :] + first[:, None], second[:, None])


@triton.jit
def weight_bits(words):
    """16 bits (BM x BN) for the elements of a weight, from `rounding_words`."""
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def momentum_bits(i, pair, step, seed):
    """16 bits (BM x BN) for the elements of a momentum: the bits of the other pair of each four columns."""
    return weight_bits(rounding_words(i, pair ^ 1, step, seed))


@triton.jit
def trace_bits(words):
    """The bits of the other column of each pair: `ttt.ops.rounding` says why."""
    return tl.interleave(words >> 16, words & 0xFFFF)
