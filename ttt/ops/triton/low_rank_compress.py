"""Compress slots to their rank, in a sequence of launches over all K slots (K,), of which -1 stands for none.

With a (S, R, n), b (S, R, m) and the formulas of `ttt.ops.low_rank_compress`:

    E = A X_r^T, X_r X_r^T                          `_cross`
    F = E beta (X_r X_r^T + eps tr/R I)^-1          `_shares`: replay is A <- A - F X_r
    A A^T, B B^T                                    `_gram`: in pieces of columns. Where replay changes A there is
                                                    one more piece: F (X_r X_r^T) F^T - F E^T - E F^T, by `_shares`
    factors of the new rows in the old ones         `_decide`: one program a slot, see `ttt.ops.triton.truncate`
    A_new, B_new in float64                         `_renew`, into scratch memory
    A A^T, A diag(kappa) A^T, and those of B        `_weigh`: of the new rows, if they are pulled to the anchor
    A_new diag(q), B_new diag(p), rounded           `_finish`, into the slot; zeros into the rows that become free
    rows, lost, eta_sum, step                       `_end`

The device decides what each launch has to do for a slot: the host does not wait, and the sequence can be captured in a
CUDA graph. A slot with rows that are not finite stays as it is, counters included, unless it needs neither truncation
nor replay nor pull. Sums are made in float64, in an order that depends only on the shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import padded_rows, signed
from ttt.ops.triton.low_rank_factors import _finish, _renew, _weigh
from ttt.ops.triton.low_rank_gram import _cross, _decide, _gram, _shares, work_of

MOST_ROWS = 1024  # of a slot: `_decide` holds vectors of that length
MOST_PIECES = 8
LEAST_COLUMNS = 1024  # of a piece


@triton.jit(do_not_specialize=["capacity", "rank"])
def _end(rows, eta_sum, lost, step, gone, plan, seen, slots, capacity, rank, PULLS: tl.constexpr):
    """Update the counters of one slot."""
    k = tl.program_id(0).to(tl.int64)
    u, held = work_of(rows, slots, seen, k, capacity, rank, PULLS)
    if u >= 0:
        kept = tl.load(rows + u)
        if held > 0:
            kept = tl.load(plan + k)
        if kept >= 0:
            if held > rank:
                total = tl.load(lost + u).to(tl.float64) + tl.load(gone + k)
                tl.store(lost + u, tl.minimum(total, 3.4028234663852886e38).to(tl.float32))
            tl.store(rows + u, kept)
            tl.store(eta_sum + u, 0.0)
            tl.store(step + u, tl.load(step + u) + 1)


def why_not(a: torch.Tensor, b: torch.Tensor) -> str:
    """The reason why these kernels cannot compress such a pool; empty if they can."""
    capacity = a.shape[1]
    if capacity > MOST_ROWS:
        return f"no Triton kernel for slots of {capacity} rows (at most {MOST_ROWS}); torch decomposes one at a time"
    return "" if a.numel() and b.numel() else "no Triton kernel for empty factors"


def _pieces(columns: int) -> tuple[int, int]:
    """(number of pieces, columns of each), which depend only on the number of columns."""
    width = max(LEAST_COLUMNS, triton.cdiv(triton.cdiv(columns, MOST_PIECES), 64) * 64)
    return triton.cdiv(columns, width), width


# Warps of `_decide`, by the slot's padded rows. A tile has at most 2048 numbers, because registers spill with twice as
# many. ``maxnreg`` is given below because the assembler otherwise aims at 168 registers in one variant of `_decide` and
# one of `_shares`, and spills a little.
_WARPS = {16: 1, 32: 4, 64: 8, 128: 8, 256: 8, 512: 8, 1024: 8}
_PRODUCTS = {"BR": 8, "BK": 64, "num_warps": 4, "num_stages": 1}
_RENEW = {"BI": 16, "BN": 128, "BC": 32, "num_warps": 4, "num_stages": 1}
_WEIGH = {"BI": 8, "BK": 64, "num_warps": 8, "num_stages": 1}
_FINISH = {"BI": 16, "BN": 64, "num_warps": 4, "num_stages": 1}


def low_rank_compress(
    a, b, rows, eta_sum, lost, step, slots, rank, lam, importance_m, importance_n, memory, seen, seed,
    replay_rows, beta, eps,
) -> None:  # fmt: skip
    (_, capacity, n), m, chosen = a.shape, b.shape[2], slots.numel()
    if chosen == 0:
        return
    keep, padded, seed = min(rank, capacity), padded_rows(capacity), signed(seed)
    pulls, replays = lam > 0, replay_rows > 0
    (columns_a, width_a), (columns_b, width_b) = _pieces(n), _pieces(m)
    pieces_a, pieces = columns_a + replays, columns_a + replays + columns_b

    def scratch(*shape: int, dtype=torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=a.device)

    shares, memory_rows, block = None, 0, _PRODUCTS["BR"]
    gram = scratch(chosen, pieces, capacity, capacity)
    if replays:
        memory_rows, padded_replay = memory.shape[0], padded_rows(replay_rows)
        cross = scratch(chosen, capacity + replay_rows, replay_rows)
        shares, middle = (scratch(chosen, capacity, replay_rows) for _ in range(2))
        _cross[(chosen, triton.cdiv(capacity + replay_rows, block), triton.cdiv(replay_rows, block))](
            cross, a, rows, memory, seen, step, slots, capacity, rank, n, replay_rows, memory_rows, seed,
            PULLS=pulls, **_PRODUCTS,
        )  # fmt: skip
        _shares[(chosen,)](
            shares, middle, scratch(chosen, replay_rows, replay_rows), gram, cross, rows, seen, slots,
            capacity, rank, replay_rows, pieces, columns_a, beta, eps, PULLS=pulls,
            BR=32, QP=padded_replay, num_warps={16: 4, 32: 4, 64: 8}[padded_replay], num_stages=1,
            maxnreg=255,
        )  # fmt: skip
    else:
        memory = seen = None
    _gram[(chosen, triton.cdiv(capacity, block) ** 2, columns_a + columns_b)](
        gram, a, b, rows, seen, slots, capacity, rank, m, n, pieces, columns_a, pieces_a - columns_a, width_a, width_b,
        PULLS=pulls, **_PRODUCTS,
    )  # fmt: skip
    factors, gone, plan = scratch(chosen, 2, keep, capacity), scratch(chosen), scratch(chosen, dtype=torch.int32)
    _decide[(chosen,)](
        factors, plan, gone, scratch(chosen, 4 * capacity + 6, capacity), gram, rows, seen, slots, capacity, rank, keep,
        min(m, n), pieces_a, columns_b, PULLS=pulls, RP=padded, BQ=min(padded // 2, 2048 // padded),
        num_warps=_WARPS[padded], num_stages=1, maxnreg=255,
    )  # fmt: skip
    fresh, blocks_a, blocks_b = scratch(chosen, keep * (m + n)), *(triton.cdiv(k, _RENEW["BN"]) for k in (n, m))
    _renew[(chosen, triton.cdiv(keep, _RENEW["BI"]), blocks_a + blocks_b)](
        fresh, factors, plan, a, b, rows, shares, memory, seen, step, slots, capacity, rank, keep, m, n, replay_rows,
        memory_rows, blocks_a, seed, PULLS=pulls, **_RENEW,
    )  # fmt: skip
    plain = weighted = tops = None
    if pulls:
        plain, weighted = (scratch(chosen, columns_a + columns_b, keep, keep) for _ in range(2))
        tops = torch.stack([importance_m.amax(), importance_n.amax()])
        _weigh[(chosen, triton.cdiv(keep, _WEIGH["BI"]) ** 2, columns_a + columns_b)](
            plain, weighted, fresh, plan, rows, slots, importance_m, importance_n, capacity, rank, keep, m, n,
            columns_a, width_a, width_b, **_WEIGH,
        )  # fmt: skip
    else:
        importance_m = importance_n = None
    blocks_a, blocks_b = (triton.cdiv(k, _FINISH["BN"]) for k in (n, m))
    _finish[(chosen, blocks_a + blocks_b)](
        a, b, fresh, plain, weighted, plan, rows, seen, step, eta_sum, slots, importance_m, importance_n, tops,
        capacity, rank, keep, m, n, columns_a, columns_b, blocks_a, seed, lam,
        LARGEST=torch.finfo(a.dtype).max, **_FINISH,
    )  # fmt: skip
    _end[(chosen,)](rows, eta_sum, lost, step, gone, plan, seen, slots, capacity, rank, PULLS=pulls, num_warps=1)
