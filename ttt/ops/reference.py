"""Every op in plain torch, in any floating dtype including float64: the definition of what the kernels compute.

State changes as the kernels change it. The reference is also the fallback where no kernel applies. Unlike the kernels
it allocates m x n temporaries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ttt.checks import MOST_ROWS
from ttt.ops import log8
from ttt.ops.arguments import CommitArguments
from ttt.ops.dtypes import accumulation
from ttt.ops.gate import closed
from ttt.ops.momentum import coefficients
from ttt.ops.philox import DRAW, INSERT, choose_tokens, philox
from ttt.ops.rounding import momentum_rounding_bits, rounding_bits, stochastic_round_, trace_rounding_bits

MOST_ROWS_SEEN = 1 << 31
"""Rows that a reservoir can count: the product of a random word of 32 bits and the count fits into 63."""
LARGEST_SEEN = MOST_ROWS_SEEN - MOST_ROWS
"""Rows that the samples of a layer count at most between two steps, so that there is room for those of one."""


def count_of(name: str, counter: torch.Tensor, more: int = 0) -> int:
    """The value of a counter of rows, of which ``more`` are to come; csrc/counter_checks.h checks the same.

    Raises:
        ValueError: if it is negative, or would pass `MOST_ROWS_SEEN`.
    """
    value = int(counter)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    if value > MOST_ROWS_SEEN - more:
        raise ValueError(f"{name} must be at most 2^31 after {more} further rows, got {value}")
    return value


def _as_it_is(t: torch.Tensor) -> torch.Tensor:
    return t


def window_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    win_x: torch.Tensor,
    win_delta: torch.Tensor,
    win_eta: torch.Tensor,
) -> torch.Tensor:
    """y = x W^T + b - ((x X^T) * eta) D, rows of the window with eta = 0 being empty."""
    wide = accumulation(x.dtype)
    live = (win_eta != 0).unsqueeze(1)
    wx = win_x.to(wide).masked_fill(~live, 0)
    wd = win_delta.to(wide).masked_fill(~live, 0)
    rows = x.to(wide)
    y = rows @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = y - ((rows @ wx.T) * win_eta.to(wide)) @ wd
    return y.to(x.dtype)


def project_out(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """x' = x - (x U^T) U."""
    wide = accumulation(x.dtype)
    rows, u = x.to(wide), basis.to(wide)
    return (rows - (rows @ u.T) @ u).to(x.dtype)


def window_append(
    win_x: torch.Tensor,
    win_delta: torch.Tensor,
    win_eta: torch.Tensor,
    win_trace: torch.Tensor | None,
    x: torch.Tensor,
    delta: torch.Tensor,
    eta: torch.Tensor,
    trace_delta: torch.Tensor | None,
    at: int = 0,
    counters: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> None:
    """Write B rows into the window, which is emptied first if it was full; see `ttt.ops.window_append`."""
    rows, window = x.shape[0], win_eta.shape[0]
    if rows == 0 or closed(gate):
        return
    if counters is not None:
        held, full = counters[:2].tolist()
        if held < 0:
            raise ValueError(f"counters must hold a number of rows of at least 0, got {held}")
        if held > window:
            raise ValueError(f"counters must hold at most the {window} rows of the window, got {held}")
        at = 0 if full else held
        if at + rows > window:
            raise ValueError(f"counters says that {at} of {window} rows are in use: {rows} more do not fit")
        if full:
            win_eta.zero_()
            if tokens is not None:
                tokens += held
        counters[0] = at + rows
        counters[1] = at + 2 * rows > window
    to = slice(at, at + rows)
    win_x[to], win_delta[to], win_eta[to] = x, delta, eta
    if win_trace is not None:
        win_trace[to] = delta if trace_delta is None else trace_delta


def replay_rows(
    memory: torch.Tensor,
    seen: torch.Tensor | None,
    step: torch.Tensor,
    rows: int,
    seed: int,
    beta: float,
    eps: float,
    wide: torch.dtype,
    total: Callable[[torch.Tensor], torch.Tensor] = _as_it_is,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The replay rows X_r (R x n) and V = beta (X_r X_r^T + eps tr/R I)^-1 X_r (R x n), both of dtype ``wide``.

    tr is the trace of X_r X_r^T, so that eps has no unit. X_r is drawn from the memory; without ``seen`` it is the
    memory. ``total`` is as for `commit`.
    """
    if seen is not None:
        memory = memory[reservoir_draw(seen, step, memory.shape[0], rows, seed).clamp_min(0)]
    xr = memory.to(wide)
    rows64 = xr.to(torch.float64)
    gram = total(rows64 @ rows64.T)
    # If all rows are zeros, V is zero with any ridge.
    ridge = eps * gram.diagonal().mean()
    ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    gram = gram + ridge * torch.eye(rows, dtype=gram.dtype, device=gram.device)
    return xr, (beta * torch.linalg.solve(gram, rows64)).to(wide)


def commit(*args, total: Callable[[torch.Tensor], torch.Tensor] = _as_it_is) -> None:
    """Write T tokens and R replay rows into W and F; see `ttt.ops.commit` for the formula.

    ``total`` completes a sum over the n inputs, where these are spread over several processes.
    """
    c = CommitArguments(*args)
    if closed(c.gate):
        return
    filled = 0
    if c.replay_rows and c.memory is not None:
        filled = len(c.memory) if c.seen is None else min(count_of("seen", c.seen), len(c.memory))
    weight, trace, step, seed = c.weight, c.trace, c.step, c.seed
    wide = accumulation(weight.dtype)
    tokens, n = c.x.shape
    w = weight.to(wide, copy=True)  # a copy even in float32: SI needs the weights from before the update
    xw, dw, ew = c.x.to(wide), c.delta.to(wide), c.eta.to(wide)
    sum_eta = ew.sum()
    drift = None if c.anchor is None else w - c.anchor.to(wide)
    g = (dw * ew.unsqueeze(1)).T @ xw
    gain, at = 1.0, drift
    if c.momentum is not None:
        keep, share, carry, gain = coefficients(c.mu, tokens)
        old = c.momentum.to(wide, copy=True)
        stochastic_round_(c.momentum, keep * old + share * g, momentum_rounding_bits(*weight.shape, step, seed))
        g = carry * old + gain * g
        at = drift if drift is None else drift - carry * old
    if filled > 0:
        xr, v = replay_rows(c.memory, c.seen, step, c.replay_rows, seed, c.beta, c.eps, wide, total)
        e = total(xr @ at.T - gain * (((xr @ xw.T) * ew) @ dw))
        g = g + e.T @ v
    pull = 0.0
    if c.lam > 0:
        pull = c.lam * sum_eta * _values(c.importance, n, wide)
    if c.decay > 0:
        pull = pull + c.decay * sum_eta
    if c.lam > 0 or c.decay > 0:
        g = g + pull * drift
    stochastic_round_(weight, w - g / (1 + pull), rounding_bits(*weight.shape, step, seed))
    if trace is not None and tokens:
        td = c.traced_delta.to(wide)
        decay = c.gamma ** torch.arange(tokens - 1, -1, -1, device=xw.device, dtype=wide).unsqueeze(1)
        count = 1
        if c.trace_every > 1:
            token, size = choose_tokens(tokens, c.trace_every, step, seed)
            td, xw, decay, count = td[token], xw[token], decay[token], size.unsqueeze(1)
        if c.kind == "fisher":
            s = (td * td * decay * count).T @ (xw * xw)
        elif c.kind == "mas":
            s = (td.abs() * decay * count).T @ xw.abs()
        else:
            s = -((td * count).T @ xw) * (weight.to(wide) - w)
        value = c.gamma**tokens * _values(trace, n, wide) + s
        bits = trace_rounding_bits(*weight.shape, step, seed)
        if log8.is_packed(trace):
            trace.copy_(log8.encode(value, bits))
        else:
            stochastic_round_(trace, value, bits)
    step += 1


def _values(state: torch.Tensor, n: int, wide: torch.dtype) -> torch.Tensor:
    return log8.decode(state, n).to(wide) if log8.is_packed(state) else state.to(wide)


def reservoir_draw(seen: torch.Tensor, step: torch.Tensor, capacity: int, rows: int, seed: int) -> torch.Tensor:
    """Indices (int64, rows) of memory rows, uniform with replacement; -1 where the memory is empty."""
    r = torch.arange(rows, device=seen.device)
    words = torch.stack(philox(r // 4, 0, step, DRAW, seed), dim=-1)
    word = words[r, r % 4]
    filled = seen.clamp_max(capacity)
    return torch.where(filled > 0, (word * filled) >> 32, -1)


def reservoir_insert(
    memory: torch.Tensor, seen: torch.Tensor, x: torch.Tensor, seed: int, gate: torch.Tensor | None = None
) -> None:
    """Algorithm R (Vitter 1985): row s goes to slot s while there is room, then to a random slot of [0, s]."""
    if closed(gate):
        return
    capacity, rows = memory.shape[0], x.shape[0]
    s = count_of("seen", seen, rows) + torch.arange(rows, device=x.device)
    word = philox(s, 0, 0, INSERT, seed)[0]
    slot = torch.where(s < capacity, s, (word * (s + 1)) >> 32)
    for t in (slot < capacity).nonzero().flatten().tolist():  # in order: a later row replaces an earlier one
        memory[int(slot[t])] = x[t].to(memory.dtype)
    seen += rows
