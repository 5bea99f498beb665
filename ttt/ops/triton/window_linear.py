"""y = x W^T + b - ((x X^T) * eta) D                   x: T x n, W: m x n, X: C x n, D: C x m, eta: C

With few tokens (decoding), time is bound by reading W, which is read once. A small launch computes the coefficients
c = (x X^T) * eta (T x C, float32), and a second one reads W and subtracts c D. One launch could do both, if the
programs that need c waited for those that compute it. But that would rely on the order in which a GPU starts programs,
which nothing guarantees: if the waiting ones filled the GPU first, they would wait forever. So no kernel here waits for
another program.

With many tokens torch's matmul makes the products x W^T and x X^T, and a kernel subtracts the window's part.

Sums are in float32. A row of the window with eta = 0 is masked out of every load, so it may hold NaN. For bfloat16, c
is split into two bfloat16 numbers (relative error 2^-17) for the product with D on tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import begin, let_next_start, operand, overlapping, product, wait_for_previous

FEW_TOKENS = 16


@triton.jit(do_not_specialize=["tokens", "window"])
def _few_coefficients(
    coef, x, win_x, win_eta, tokens, window, n, BT: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Compute c[t, c] = eta_c (x_t . X_c) for BT tokens and one row of the window."""
    begin(PDL)
    c = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    eta = tl.load(win_eta + c)
    live = tl.where(eta != 0, n, 0)  # columns to be read
    acc = tl.zeros((BT, BK), tl.float32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        xc = tl.load(win_x + c * n + k, mask=k < live, other=0).to(tl.float32)
        xt = tl.load(x + t[:, None] * n + k, mask=(t < tokens)[:, None] & (k < live), other=0).to(tl.float32)
        acc += xt * xc
    tl.store(coef + t * window + c, eta * tl.sum(acc, axis=1), mask=t < tokens)


@triton.jit(do_not_specialize=["window"])
def _decode_one(
    y, x, weight, bias, coef, win_delta, win_eta, window, m, n,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[i] for BM rows of W and one token: a matrix-vector product without tensor cores."""
    let_next_start(PDL)
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM, BK), tl.float32)
    last = (n - 1) // BK * BK
    for k0 in range(0, last, BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(weight + i[:, None] * n + k, mask=(i < m)[:, None], other=0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * tl.load(x + k).to(tl.float32)
    k = last + tl.arange(0, BK)
    inside = (i < m)[:, None] & (k < n)
    w = tl.load(weight + i[:, None] * n + k, mask=inside, other=0, eviction_policy="evict_first")
    xt = tl.load(x + k, mask=k < n, other=0)
    wait_for_previous(PDL)  # for the coefficients; W and x were written earlier
    part = tl.zeros((BM,), tl.float32)
    for c0 in range(0, window, BC):
        c = c0 + tl.arange(0, BC).to(tl.int64)
        live = tl.load(win_eta + c, mask=c < window, other=0) != 0
        factor = tl.load(coef + c, mask=live, other=0)
        d = tl.load(win_delta + c * m + i[:, None], mask=live & (i < m)[:, None], other=0, eviction_policy="evict_last")
        part += tl.sum(factor * d.to(tl.float32), axis=1)
    out = tl.sum(acc + w.to(tl.float32) * xt.to(tl.float32), axis=1) - part
    if bias is not None:
        out += tl.load(bias + i, mask=i < m, other=0).to(tl.float32)
    tl.store(y + i, out.to(y.dtype.element_ty), mask=i < m)


@triton.jit(do_not_specialize=["tokens", "window"])
def _decode_few(
    y, x, weight, bias, coef, win_delta, win_eta, tokens, window, m, n,
    BT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[:, i] for BM rows of W and at most BT tokens."""
    let_next_start(PDL)
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    t = tl.arange(0, BT).to(tl.int64)
    acc = tl.zeros((BT, BM), tl.float32)
    last = (n - 1) // BK * BK
    for k0 in range(0, last, BK):
        k = k0 + tl.arange(0, BK)
        xt = tl.load(x + t[:, None] * n + k, mask=(t < tokens)[:, None], other=0)
        w = tl.load(weight + i[:, None] * n + k, mask=(i < m)[:, None], other=0, eviction_policy="evict_first")
        acc = tl.dot(xt.to(OPERAND), tl.trans(w.to(OPERAND)), acc, input_precision="ieee")
    k = last + tl.arange(0, BK)
    inside = (i < m)[:, None] & (k < n)
    w = tl.load(weight + i[:, None] * n + k, mask=inside, other=0, eviction_policy="evict_first")
    xt = tl.load(x + t[:, None] * n + k, mask=(t < tokens)[:, None] & (k < n), other=0)
    wait_for_previous(PDL)  # for the coefficients; W and x were written earlier
    acc -= _window_part(coef, win_delta, win_eta, t, i, tokens, window, m, BC, True, OPERAND)
    acc = tl.dot(xt.to(OPERAND), tl.trans(w.to(OPERAND)), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + i, mask=i < m, other=0).to(tl.float32)
    tl.store(y + t[:, None] * m + i, acc.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (i < m))


@triton.jit
def _window_part(
    c_ptr, win_delta, win_eta, t, i, tokens, window, m, BC: tl.constexpr, SCALED: tl.constexpr, OPERAND: tl.constexpr
):
    """(c D)[t, i] for a BT x BM block. If not ``SCALED``, c is x X^T, and what it holds for empty rows is not used."""
    part = tl.zeros((t.shape[0], i.shape[0]), tl.float32)
    for c0 in range(0, window, BC):
        c = c0 + tl.arange(0, BC).to(tl.int64)
        eta = tl.load(win_eta + c, mask=c < window, other=0)
        live = eta != 0
        factor = tl.load(c_ptr + t[:, None] * window + c, mask=(t < tokens)[:, None] & live, other=0)
        if not SCALED:
            factor *= eta
        d = tl.load(win_delta + c[:, None] * m + i, mask=live[:, None] & (i < m), other=0, eviction_policy="evict_last")
        part = times_rows(factor, d, part, OPERAND)
    return part


@triton.jit
def times_rows(factor, rows, acc, OPERAND: tl.constexpr):
    """acc + factor rows, for a float32 ``factor`` (BT x BC) and ``rows`` (BC x BM) as they are stored."""
    if OPERAND == tl.bfloat16:  # noqa: SIM300
        high = factor.to(tl.bfloat16)
        acc = tl.dot(high, rows, acc)
        acc = tl.dot((factor - high.to(tl.float32)).to(tl.bfloat16), rows, acc)
    else:
        acc = tl.dot(factor, rows.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens", "window"])
def _subtract(
    y, c_ptr, win_delta, win_eta, tokens, window, m, BT: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y <- y - c D on a BT x BM block, with c = (x X^T) * eta, of which ``c_ptr`` holds x X^T."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    mask = (t < tokens)[:, None] & (i < m)
    at = y + t[:, None] * m + i
    part = _window_part(c_ptr, win_delta, win_eta, t, i, tokens, window, m, BC, False, OPERAND)
    tl.store(at, (tl.load(at, mask=mask, other=0).to(tl.float32) - part).to(y.dtype.element_ty), mask=mask)


_BLOCKS = {  # kernel, is the weight float32
    # "one" has loads of 4 MB of a 4096 x 4096 matrix in flight, with 60 registers and one wave. A GPU of 5 TB/s needs
    # about 4 MB in all. A row of 1024 in each of four warps spills on sm_90.
    ("one", False): {"BM": 8, "BK": 512, "num_warps": 8},
    ("one", True): {"BM": 8, "BK": 256, "num_warps": 8},
    # Many small programs: those of the coefficients take some multiprocessors' room while these start, and few large
    # programs would be spread unevenly.
    ("few", False): {"BT": 16, "BM": 16, "BK": 256, "num_warps": 2, "num_stages": 6},
    ("few", True): {"BT": 16, "BM": 16, "BK": 64, "num_warps": 2, "num_stages": 6},
    ("few_coefficients", False): {"BT": 4, "BK": 1024, "num_warps": 4},
    ("few_coefficients", True): {"BT": 4, "BK": 512, "num_warps": 4},
    ("subtract", False): {"BT": 32, "BM": 64, "num_warps": 4, "num_stages": 1},
    ("subtract", True): {"BT": 32, "BM": 64, "num_warps": 4, "num_stages": 1},
}


def window_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    win_x: torch.Tensor,
    win_delta: torch.Tensor,
    win_eta: torch.Tensor,
) -> torch.Tensor:
    (m, n), window = weight.shape, win_eta.numel()
    tokens = x.numel() // n if n else x.shape[:-1].numel()
    few = tokens <= FEW_TOKENS and window > 0 and n > 0
    y = x.new_empty((*x.shape[:-1], m)) if few else torch.nn.functional.linear(x, weight, bias)
    if tokens == 0 or m == 0 or n == 0 or window == 0:
        return y
    wide, dot_type = weight.dtype == torch.float32, operand(weight.dtype)
    if few:
        coef = torch.empty((tokens, window), dtype=torch.float32, device=x.device)
        one, overlap = tokens == 1, overlapping()
        blocks = {"BT": 1, "BK": padded(n, 2048), "num_warps": 8} if one else _BLOCKS["few_coefficients", wide]
        grid = (window, triton.cdiv(tokens, blocks["BT"]))
        _few_coefficients[grid](coef, x, win_x, win_eta, tokens, window, n, **blocks, **overlap)
        blocks = _BLOCKS["one" if one else "few", wide]
        grid = (triton.cdiv(m, blocks["BM"]),)
        if one:
            _decode_one[grid](
                y, x, weight, bias, coef, win_delta, win_eta, window, m, n, BC=padded(window, 128), **blocks, **overlap
            )
        else:
            _decode_few[grid](
                y, x, weight, bias, coef, win_delta, win_eta, tokens, window, m, n, BC=padded(window, 64),
                OPERAND=dot_type, **blocks, **overlap,
            )  # fmt: skip
    else:
        coef = product(x.view(tokens, n), win_x.T)
        blocks = _BLOCKS["subtract", wide]
        grid = (triton.cdiv(m, blocks["BM"]), triton.cdiv(tokens, blocks["BT"]))
        _subtract[grid](
            y, coef, win_delta, win_eta, tokens, window, m, BC=padded(window, 64), OPERAND=dot_type, **blocks
        )
    return y


def padded(size: int, most: int) -> int:
    """The length of a block for ``size`` elements, or for ``most`` of them at a time; at least 16."""
    return min(most, max(16, triton.next_power_of_2(size)))
