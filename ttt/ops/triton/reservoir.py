"""The replay memory: insertion by Algorithm R (Vitter 1985), and the draw of replay rows.

Row number s, counted from 0, goes to row s of the memory while s < K, then to row floor(u (s + 1)) with u uniform in
[0, 1); if that is not below K, it is dropped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.gate import advance
from ttt.ops.triton.common import GATED, INSERT, begin, draw, overlapping, signed


@triton.jit
def _slots(s, capacity, seed):
    word, _, _, _ = tl.philox(seed, s.to(tl.uint32), 0, 0, INSERT)
    return tl.where(s < capacity, s, (word.to(tl.int64) * (s + 1)) >> 32)


@triton.jit
def _copy_row(memory, x, slot, t, n, BN: tl.constexpr):
    for j0 in range(0, n, BN):
        j = j0 + tl.arange(0, BN)
        tl.store(memory + slot * n + j, tl.load(x + t * n + j, mask=j < n, other=0), mask=j < n)


@triton.jit(do_not_specialize=["capacity", "tokens", "seed"], **GATED)
def _insert(
    memory, seen, x, gate, memory_d, d, capacity, tokens, n, m, seed: tl.int64,
    BT: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """memory[slot(seen + t)] = x[t] for t = program id, unless a later row of x takes the same slot.

    The same for memory_d (K x m) and d, unless they are None.
    """
    begin(PDL)
    if gate is not None:
        if tl.load(gate) == 0:
            return
    t = tl.program_id(0).to(tl.int64)
    first = tl.load(seen)
    slot = _slots(first + t, capacity, seed)
    if (slot >= 0) & (slot < capacity):  # a negative counter cannot be refused without waiting for the device
        later = 0
        for u0 in range(t + 1, tokens, BT):
            u = u0 + tl.arange(0, BT)
            later += tl.sum(((_slots(first + u, capacity, seed) == slot) & (u < tokens)).to(tl.int32))
        if later == 0:
            _copy_row(memory, x, slot, t, n, BN)
            if d is not None:
                _copy_row(memory_d, d, slot, t, m, BN)


@triton.jit(do_not_specialize=["capacity", "rows", "seed"])
def _draw(index, seen, step, capacity, rows, seed: tl.int64, BR: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    tl.store(index + r, draw(r, seen, step, capacity, seed), mask=r < rows)


def reservoir_insert(
    memory: torch.Tensor,
    seen: torch.Tensor,
    x: torch.Tensor,
    seed: int,
    gate: torch.Tensor | None = None,
    memory_d: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
) -> None:
    (capacity, n), tokens = memory.shape, x.shape[0]
    if tokens:
        _insert[(tokens,)](
            memory, seen, x, gate, memory_d, d, capacity, tokens, n, 0 if d is None else d.shape[1], signed(seed),
            BT=128, BN=1024, num_warps=4, **overlapping(),
        )  # fmt: skip
    advance(seen, tokens, gate)


def reservoir_draw(seen: torch.Tensor, step: torch.Tensor, capacity: int, rows: int, seed: int) -> torch.Tensor:
    index = torch.empty((rows,), dtype=torch.int64, device=seen.device)
    if rows:
        _draw[(triton.cdiv(rows, 128),)](index, seen, step, capacity, rows, signed(seed), BR=128, num_warps=4)
    return index
