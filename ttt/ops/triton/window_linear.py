"""y = x W^T + b - ((x X^T) * eta) D                   x: T x n, W: m x n, X: C x n, D: C x m, eta: C

A few tokens (decoding) are bound by the bytes of W, which is streamed once; many tokens are left to
torch's matmul, whose result then loses the window's part. Either way the coefficients
c = (x X^T) * eta (T x C, float32) are made first by a skinny kernel. Sums are made in float32. A row of
the window with eta = 0 is masked out of every load, so it may hold anything, NaN included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ttt.ops.triton.common import operand

FEW_TOKENS = 16


@triton.jit(do_not_specialize=["window"])
def _coefficient(c_ptr, x, win_x, win_eta, window, n, BK: tl.constexpr):
    """c[t, c] = eta_c (x_t . X_c), one number for each program (c, t)."""
    c, t = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    eta = tl.load(win_eta + c)
    live = tl.where(eta != 0, n, 0)  # columns to be read
    acc = tl.zeros((BK,), tl.float32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        xt = tl.load(x + t * n + k, mask=k < n, other=0).to(tl.float32)
        acc += xt * tl.load(win_x + c * n + k, mask=k < live, other=0).to(tl.float32)
    tl.store(c_ptr + t * window + c, eta * tl.sum(acc))


@triton.jit(do_not_specialize=["tokens", "window"])
def _coefficients(
    c_ptr, x, win_x, win_eta, tokens, window, n,
    BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The same as a matrix product, for many tokens: a BT x BC block of c for each program."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    eta = tl.load(win_eta + c, mask=c < window, other=0)
    acc = tl.zeros((BT, BC), tl.float32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        xt = tl.load(x + t[:, None] * n + k, mask=(t < tokens)[:, None] & (k < n), other=0)
        xc = tl.load(win_x + c[:, None] * n + k, mask=(eta != 0)[:, None] & (k < n), other=0)
        acc = tl.dot(xt.to(OPERAND), tl.trans(xc.to(OPERAND)), acc, input_precision="ieee")
    tl.store(c_ptr + t[:, None] * window + c, acc * eta, mask=(t < tokens)[:, None] & (c < window))


@triton.jit
def _window_part(c_ptr, win_delta, win_eta, t, i, tokens, window, m, BC: tl.constexpr):
    """(c D)[t, i] for a BT x BM block."""
    part = tl.zeros((t.shape[0], i.shape[0]), tl.float32)
    for c0 in range(0, window, BC):
        c = c0 + tl.arange(0, BC).to(tl.int64)
        live = tl.load(win_eta + c, mask=c < window, other=0) != 0
        coef = tl.load(c_ptr + t[:, None] * window + c, mask=(t < tokens)[:, None] & live, other=0)
        d = tl.load(win_delta + c[:, None] * m + i, mask=live[:, None] & (i < m), other=0)
        part = tl.dot(coef, d.to(tl.float32), part, input_precision="ieee")
    return part


@triton.jit(do_not_specialize=["window"])
def _decode_one(
    y, x, weight, bias, c_ptr, win_delta, win_eta, window, m, n,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[i] for BM rows of W and one token: a matrix-vector product without tensor cores."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM, BK), tl.float32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(weight + i[:, None] * n + k, mask=(i < m)[:, None] & (k < n), other=0).to(tl.float32)
        acc += w * tl.load(x + k, mask=k < n, other=0).to(tl.float32)
    out = tl.sum(acc, axis=1)
    if bias is not None:
        out += tl.load(bias + i, mask=i < m, other=0).to(tl.float32)
    for c0 in range(0, window, BC):
        c = c0 + tl.arange(0, BC).to(tl.int64)
        live = tl.load(win_eta + c, mask=c < window, other=0) != 0
        coef = tl.load(c_ptr + c, mask=live, other=0)
        d = tl.load(win_delta + c * m + i[:, None], mask=live & (i < m)[:, None], other=0).to(tl.float32)
        out -= tl.sum(coef * d, axis=1)
    tl.store(y + i, out.to(y.dtype.element_ty), mask=i < m)


@triton.jit(do_not_specialize=["tokens", "window"])
def _decode_few(
    y, x, weight, bias, c_ptr, win_delta, win_eta, tokens, window, m, n,
    BT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y[:, i] for BM rows of W and at most BT tokens."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    t = tl.arange(0, BT).to(tl.int64)
    acc = tl.zeros((BT, BM), tl.float32)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        xt = tl.load(x + t[:, None] * n + k, mask=(t < tokens)[:, None] & (k < n), other=0)
        w = tl.load(weight + i[:, None] * n + k, mask=(i < m)[:, None] & (k < n), other=0)
        acc = tl.dot(xt.to(OPERAND), tl.trans(w.to(OPERAND)), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + i, mask=i < m, other=0).to(tl.float32)
    acc -= _window_part(c_ptr, win_delta, win_eta, t, i, tokens, window, m, BC)
    tl.store(y + t[:, None] * m + i, acc.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (i < m))


@triton.jit(do_not_specialize=["tokens", "window"])
def _subtract(
    y, c_ptr, win_delta, win_eta, tokens, window, m, BT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """y <- y - c D on a BT x BM block."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    mask = (t < tokens)[:, None] & (i < m)
    at = y + t[:, None] * m + i
    part = _window_part(c_ptr, win_delta, win_eta, t, i, tokens, window, m, BC)
    tl.store(at, (tl.load(at, mask=mask, other=0).to(tl.float32) - part).to(y.dtype.element_ty), mask=mask)


_BLOCKS = {  # kernel, is the weight float32
    ("one", False): {"BM": 8, "BK": 512, "BC": 16, "num_warps": 4},
    ("one", True): {"BM": 8, "BK": 256, "BC": 16, "num_warps": 4},
    ("few", False): {"BT": 16, "BM": 32, "BK": 128, "BC": 16, "num_warps": 4, "num_stages": 4},
    ("few", True): {"BT": 16, "BM": 32, "BK": 64, "BC": 16, "num_warps": 4, "num_stages": 3},
    ("coefficients", False): {"BT": 16, "BC": 16, "BK": 256, "num_warps": 4, "num_stages": 3},
    ("coefficients", True): {"BT": 16, "BC": 16, "BK": 64, "num_warps": 4, "num_stages": 3},
    ("subtract", False): {"BT": 32, "BM": 64, "BC": 16, "num_warps": 4, "num_stages": 2},
    ("subtract", True): {"BT": 32, "BM": 64, "BC": 16, "num_warps": 4, "num_stages": 2},
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
    few = tokens <= FEW_TOKENS
    y = x.new_empty((*x.shape[:-1], m)) if few else torch.nn.functional.linear(x, weight, bias)
    if tokens == 0 or m == 0 or (window == 0 and not few):
        return y
    wide, dot_type = weight.dtype == torch.float32, operand(weight.dtype)
    coef = torch.empty((tokens, window), dtype=torch.float32, device=x.device)
    if window and few:
        _coefficient[(window, tokens)](coef, x, win_x, win_eta, window, n, BK=1024, num_warps=4)
    elif window:
        blocks = _BLOCKS["coefficients", wide]
        grid = (triton.cdiv(tokens, blocks["BT"]), triton.cdiv(window, blocks["BC"]))
        _coefficients[grid](coef, x, win_x, win_eta, tokens, window, n, OPERAND=dot_type, **blocks)
    if tokens == 1:
        blocks = _BLOCKS["one", wide]
        grid = (triton.cdiv(m, blocks["BM"]),)
        _decode_one[grid](y, x, weight, bias, coef, win_delta, win_eta, window, m, n, **blocks)
    elif few:
        blocks = _BLOCKS["few", wide]
        grid = (triton.cdiv(m, blocks["BM"]),)
        _decode_few[grid](
            y, x, weight, bias, coef, win_delta, win_eta, tokens, window, m, n, OPERAND=dot_type, **blocks
        )
    else:
        blocks = _BLOCKS["subtract", wide]
        grid = (triton.cdiv(m, blocks["BM"]), triton.cdiv(tokens, blocks["BT"]))
        _subtract[grid](y, coef, win_delta, win_eta, tokens, window, m, **blocks)
    return y
