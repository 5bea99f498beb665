"""The step eta_t of each token: constant, or relative to the layer's own inputs and gradients.

With g_t = |delta_t| |x_t|, the norm of token t's gradient at the layer, and means over the tokens up to t inclusive:

    constant   eta_t = lr
    energy     eta_t = lr / mean |x|^2       normalised least mean squares (Nagumo & Noda 1967)
    rms        eta_t = lr / sqrt(mean g^2)   RMSProp (Tieleman & Hinton 2012) with one scale for a whole layer

**Clip.** Where g_t is above ``clip`` (for "rms": above ``clip`` sqrt(mean g^2)), eta_t is multiplied by the ratio of
the bound to g_t. The means include the token itself. So the first token has a scale too, and the means do not depend
on how a stream is cut into chunks.

**Burst.** T tokens that are learnt together all have gradients at the weights from before the first of them. In
ordinary text these gradients point in different directions, and the norm of their sum is about sqrt(T) times that of
one. If one byte is repeated T times, they point in the same direction, and the norm of their sum is T times that of
one. To keep such a step from being too long, "rms" bounds:

    |sum_t eta_t delta_t x_t^T|  <=  burst lr sqrt(T)

Where the left side is larger, all T steps are multiplied by the ratio of the right side to the left (gradient clipping,
Pascanu et al. 2013). In ordinary text the left side is about lr sqrt(T), so that a ``burst`` a little above 1 rarely
acts on it. The means do not change. With T = 1 the bound is one on a single token's gradient, as ``clip`` is.

**Users.** In a batch of several users, a token's means are over three kinds of tokens: those of calibration, those that
its user has learnt before, and its user's tokens in the batch up to and including itself. The bound of ``burst`` holds
for each user, with the sum over that user's tokens and T their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.config import TTTConfig

CALIBRATED, STREAM = 0, 1
"""Rows of a layer's ``moments``: sums over the tokens of calibration, and over those learnt since."""


class Rates(NamedTuple):
    """What `rates` returns.

    Attributes:
        eta: (T,), the steps.
        finite: (T,) bool, whether a token can be learnt from.
        grown: (3,) float64, (S, 3) with users: what the tokens add to the moments. None if ``rate`` is "constant".
    """

    eta: Tensor
    finite: Tensor
    grown: Tensor | None


def rates(
    x: Tensor,
    delta: Tensor,
    config: TTTConfig,
    wide: torch.dtype,
    *,
    before: Tensor | None = None,
    users: Tensor | None = None,
    applied: Callable[[Tensor], Tensor] | None = None,
) -> Rates:
    """The steps of T tokens. Nothing is written, and the host waits for the device only if there are ``users``.

    Args:
        x: (T, n), inputs.
        delta: (T, m), gradients of the summed loss at the layer's output.
        config: its ``lr``, ``rate``, ``clip`` and ``burst`` are used.
        wide: the dtype of the computation and of the steps.
        before: (3,) float64, sums of |x|^2 and g^2 over earlier tokens, calibration included, and their number. None
            if ``config.rate`` is "constant".
        users: (T,) int32, the slot of each token; ``before`` is (S, 3) then. Tokens with -1 teach nobody, and their
            steps have no meaning. The bits that a user gets do not depend on tokens of others.
        applied: turns ``x`` into the inputs that updates are made with, whose norms are then used in place of |x|.
            Whether a token is finite is decided by ``x`` itself.
    """
    x_norm, d_norm = (torch.linalg.vector_norm(t, dim=1, dtype=wide) for t in (x, delta))
    norm = d_norm * x_norm
    # The squared norm bounds every entry of the token's squared gradient: a trace cannot overflow either.
    finite = torch.isfinite(norm * norm)
    if applied is not None and (before is not None or config.clip is not None):
        x = applied(x)
        x_norm = torch.linalg.vector_norm(x, dim=1, dtype=wide)
        norm = d_norm * x_norm
    if before is None:
        return Rates(_clipped(torch.full_like(norm, config.lr), norm, config.clip), finite, None)
    squares = torch.stack([x_norm, norm]).double().square_()
    if users is None:
        sums, place = squares.cumsum(1), torch.arange(1, len(norm) + 1, device=norm.device)
        grown = torch.cat([squares.sum(1), squares.new_full((1,), len(norm))])
        earlier = before.unsqueeze(1)
    else:
        sums, place, grown = _by_user(squares, users, len(before))
        earlier = before[users.clamp_min(0).long()].T
    energy, square = (earlier[:2] + sums) / (earlier[2] + place)
    scale = energy if config.rate == "energy" else square.sqrt()
    # The scale is 0 only if the token's x or its gradient is 0.
    eta = torch.where(scale > 0, config.lr / scale, 0.0).to(norm.dtype)
    bound = config.clip if config.clip is None or config.rate == "energy" else config.clip * scale
    eta = _clipped(eta, norm, bound)
    if config.burst is not None and config.rate == "rms" and config.lr > 0:
        size = _sizes(x, delta, x_norm, d_norm, eta / config.lr, users)
        eta = torch.where(size > config.burst, eta * (config.burst / size), eta)
    # Steps of inputs close to 0 may overflow.
    return Rates(eta, finite & torch.isfinite(eta), grown)


def _by_user(squares: Tensor, users: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Running sums of ``squares`` (2, T) over the tokens of each user.

    Returns:
        (2, T), the sums over the tokens of the same user up to and including each; (T,), the number of these tokens;
        (S, 3), the sums over all tokens of each user, and their number.
    """
    place, owner = places(users), torch.where(users < 0, slots, users).long()
    longest = int(place.max()) + 1 if len(place) else 1
    each = squares.new_zeros((longest, slots + 1, 2))
    each[place, owner] = squares.T
    # Sums along the first dimension are made one after the other, whatever the other columns hold: a user's bits do
    # not depend on others.
    running = each.cumsum(0)
    count = torch.bincount(owner, minlength=slots + 1).unsqueeze(1)
    return running[place, owner].T, place + 1, torch.cat([running[-1], count.to(running)], 1)[:slots]


def places(users: Tensor) -> Tensor:
    """The number of tokens of the same user before each token: (T,) -> (T,) int64."""
    order = users.argsort(stable=True)
    ranked = users[order]
    starts = torch.searchsorted(ranked, ranked)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(users), device=users.device) - starts)


def _clipped(eta: Tensor, norm: Tensor, bound: float | Tensor | None) -> Tensor:
    """``eta`` (T,), multiplied by bound / norm where the gradient's ``norm`` (T,) is above ``bound``."""
    return eta if bound is None else torch.where(norm > bound, eta * (bound / norm), eta).to(norm.dtype)


def _sizes(x: Tensor, delta: Tensor, x_norm: Tensor, d_norm: Tensor, weight: Tensor, users: Tensor | None) -> Tensor:
    """|sum_t weight_t delta_t x_t^T| / sqrt(T): (), or with users (T,), of each token's user; 0 for tokens of nobody.

    ``x_norm`` and ``d_norm`` (T,) are the norms of the rows of ``x`` and ``delta``.
    """
    if users is None:
        return _sum_norm(x, delta, x_norm, d_norm, weight) / len(weight) ** 0.5
    # Each user's sum is made of its own rows alone, in products whose shapes and bits do not depend on other users.
    sizes = torch.where(users < 0, 0.0, weight * (x_norm * d_norm))
    owners, counts = users.unique(return_counts=True)
    for user, count in zip(owners.tolist(), counts.tolist(), strict=True):
        if user >= 0 and count > 1:
            own = (users == user).nonzero().flatten()
            sizes[own] = _sum_norm(x[own], delta[own], x_norm[own], d_norm[own], weight[own]) / count**0.5
    return sizes


def _sum_norm(x: Tensor, delta: Tensor, x_norm: Tensor, d_norm: Tensor, weight: Tensor) -> Tensor:
    """|sum_t weight_t delta_t x_t^T|, (), from rows scaled to length 1, so that no product overflows."""
    tiny = torch.finfo(weight.dtype).tiny
    x, delta = (
        rows.to(weight.dtype) / norm.clamp_min(tiny).unsqueeze(1) for rows, norm in ((x, x_norm), (delta, d_norm))
    )
    weight = weight * (x_norm * d_norm)
    rows, n, m = len(weight), x.shape[1], delta.shape[1]
    if rows * (m + n) > m * n:  # the matrix of the sum is less work than the products of all pairs of rows
        return torch.linalg.vector_norm((delta * weight.unsqueeze(1)).T @ x)
    pairs = (x @ x.T) * (delta @ delta.T)
    return (weight @ pairs @ weight).clamp_min(0.0).sqrt()


def count_(stream: Tensor, grown: Tensor, counts: Tensor | None) -> None:
    """Add ``grown`` of `Rates` to the moments ``stream`` in place, only where ``counts`` (bool) is True if it is given.

    The host does not wait for ``counts``.
    """
    stream.add_(grown if counts is None else torch.where(counts, grown, 0.0))
