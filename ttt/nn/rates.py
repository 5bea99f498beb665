"""The step eta_t of each token: constant, or relative to the layer's own inputs and gradients.

With g_t = |delta_t| |x_t|, the norm of token t's gradient at the layer, and means over the tokens up to t inclusive:

    constant   eta_t = lr
    energy     eta_t = lr / mean |x|^2       normalised least mean squares (Nagumo & Noda 1967)
    rms        eta_t = lr / sqrt(mean g^2)   RMSProp (Tieleman & Hinton 2012) with one scale for a whole layer
    decrease   eta_t = lr share / mean s^2   s_t^2 = (delta_t . delta'_t) (x_t . x'_t)

**Decrease.** An update by -eta delta'_t x'_t^T changes token t's own loss by -eta s_t^2 to first order, where x' and
delta' are the rows that updates are made with (`ttt.nn.kronecker`; without a soft projection s_t is g_t). So ``lr`` is
that decrease in nats, of a typical token, summed over the layers of a model, of which each has the ``share`` 1 / their
number. If inputs, gradients or outputs of a layer are in other units (x to c x with W to W / c), the update is in those
units, too: the same ``lr`` is right for models whose weights, activations and gradients have other scales. It takes a
loss that is a negative log likelihood, summed over tokens; with a loss in other units ``lr`` is in those. As a
safeguard, no token moves a weight matrix by more than a hundredth of its norm from before any learning (the layer-wise
trust ratio of You et al., "Large Batch Training of Convolutional Networks", 2017). Language models use less than a
tenth of that.

**Clip.** Where g_t is above ``clip`` (for "rms": above ``clip`` sqrt(mean g^2)), eta_t is multiplied by the ratio of
the bound to g_t. For "decrease" s_t stands for g_t, here and below. The means include the token itself. So the first
token has a scale too, and the means do not depend on how a stream is cut into chunks.

**Burst.** T tokens that are learnt together all have gradients at the weights from before the first of them. In
ordinary text these gradients point in different directions, and the norm of their sum is about sqrt(T) times that of
one. If one byte is repeated T times, they point in the same direction, and the norm of their sum is T times that of
one. To keep such a step from being too long, "rms" bounds:

    |sum_t eta_t delta_t x_t^T|  <=  burst lr sqrt(T)

and "decrease", with w_t = eta_t sqrt(mean s^2) / (lr share):

    sum_ij w_i w_j (delta_i . delta'_j) (x_i . x'_j)  <=  burst^2 T

Where the left side is larger, all T steps are multiplied by the ratio of the right side to the left (gradient clipping,
Pascanu et al. 2013). In ordinary text the two sides are about equal for burst = 1, so that a ``burst`` a little above 1
rarely acts on it. The means do not change. With T = 1 the bound is one on a single token's gradient, as ``clip`` is.

**Feedback.** Last, the steps are multiplied by a factor that follows whether earlier ones helped (`ttt.nn.feedback`).

**Users.** In a batch of several users, a token's means are over three kinds of tokens: those of calibration, those that
its user has learnt before, and its user's tokens in the batch up to and including itself. The bound of ``burst`` holds
for each user, with the sum over that user's tokens and T their number.

**Layers.** The steps of several layers of one shape can be computed at once. Their rows then have a leading dimension,
L, and rows of zeros after the tokens of a layer that has fewer than the others: no sum or mean changes with these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.config import TTTConfig
from ttt.nn.feedback import Followed, bilinear, factor, next_agreement
from ttt.nn.parallel import UNSHARDED, Sharding
from ttt.ops import cpu

CALIBRATED, STREAM = 0, 1
"""Rows of a layer's ``moments``: sums over the tokens of calibration, and over those learnt since."""


_SEVERAL = 16  # rows of each of several layers from which on their products are made layer by layer

Rows = tuple[Tensor, Tensor]
"""Inputs (T, n) and gradients (T, m)."""


class Rates(NamedTuple):
    """What `rates` returns.

    For L layers at once all of them have a leading dimension of L.

    Attributes:
        eta: (T,), the steps.
        finite: (T,) bool, whether a token can be learnt from.
        grown: (3,) float64, (S, 3) with users: what the tokens add to the moments. None if ``rate`` is "constant".
        weight: (T,), the steps in units of a typical token's, as `ttt.nn.feedback` defines them; None without feedback.
        agreement: (1,) float64, from which the feedback's factor in ``eta`` was made; likewise.
        gain: (T,), sum_i (delta_i . delta'_j) (x_i . x'_j) for each token j, over all tokens i, with users over those
            of j's user: by how much a step of 1 on j lowers their loss to first order. None unless asked for.
    """

    eta: Tensor
    finite: Tensor
    grown: Tensor | None
    weight: Tensor | None = None
    agreement: Tensor | None = None
    gain: Tensor | None = None


class Sizes(NamedTuple):
    """How large the inputs and gradients of T tokens are, in the unit of a rate; see `token_sizes`.

    Attributes:
        x, delta: (T,), for "decrease" the roots of x . x' and delta . delta'; otherwise the norms of x' and delta'.
        norm: (T,), their products: s_t or g_t.
        squares: (2, T) float64: the squares of ``x`` and of ``norm``.

    For L layers at once T is L, T.
    """

    x: Tensor
    delta: Tensor
    norm: Tensor
    squares: Tensor


def token_sizes(
    x: Tensor,
    delta: Tensor,
    applied: Rows,
    rate: str,
    wide: torch.dtype = torch.float64,
    sharding: Sharding = UNSHARDED,
) -> Sizes:
    """The sizes of tokens with inputs ``x`` (T, n) and gradients ``delta`` (T, m), computed in ``wide``.

    For L layers at once all rows have a leading dimension of L.

    Args:
        applied: the rows x' (T, n) and delta' (T, m) that updates are made with.
        rate: as in a `ttt.TTTConfig`.
        sharding: of the layer.
    """
    sizes = []
    for rows, others, side in zip((x, delta), applied, (sharding.input, sharding.output), strict=True):
        if rate == "decrease" and others is not rows:
            sizes.append(side.sum(_dots(rows, others, wide)).clamp_min(0.0).sqrt())
        else:
            sizes.append(side.norms(others, wide))
    norm = sizes[0] * sizes[1]
    return Sizes(sizes[0], sizes[1], norm, torch.stack([sizes[0], norm]).double().square_())


def _dots(rows: Tensor, others: Tensor, wide: torch.dtype) -> Tensor:
    """The products of each of ``rows`` (..., n) with that of ``others`` in its place: (...)."""
    if wide == torch.float32 and rows.dtype == others.dtype and cpu.takes(rows, others):
        return cpu.row_dots(rows, others)
    return (rows.to(wide) * others.to(wide)).sum(-1)


def rates(
    x: Tensor,
    delta: Tensor,
    config: TTTConfig,
    wide: torch.dtype,
    *,
    before: Tensor | None = None,
    users: Tensor | None = None,
    applied: Callable[[Tensor, Tensor], Rows] | None = None,
    share: float = 1.0,
    limit: float | Tensor | None = None,
    latest: Followed | None = None,
    sharding: Sharding = UNSHARDED,
    counts: Tensor | None = None,
    gains: bool = False,
) -> Rates:
    """The steps of T tokens. Nothing is written, and the host waits for the device only if there are ``users``.

    With ``counts`` they are those of L layers: all tensors then have a leading dimension of L.

    Args:
        x: (T, n), inputs.
        delta: (T, m), gradients of the summed loss at the layer's output.
        config: its ``lr``, ``rate``, ``clip`` and ``burst`` are used.
        wide: the dtype of the computation and of the steps.
        before: (3,) float64, sums of |x|^2 and g^2 over earlier tokens, calibration included, and their number. None
            if ``config.rate`` is "constant".
        users: (T,) int32, the slot of each token; ``before`` is (S, 3) then. Tokens with -1 teach nobody, and their
            steps have no meaning. The bits that a user gets do not depend on tokens of others.
        applied: turns ``x`` and ``delta`` into the rows x' (T, n) and delta' (T, m) that updates are made with, whose
            norms are then used; None: ``x`` and ``delta`` themselves. These decide whether a token is finite.
        share: of this layer in the decrease, if ``config.rate`` is "decrease".
        limit: the largest norm of one token's update, (1,) of each of L layers; None for no limit.
        latest: the layer's latest update, for `ttt.nn.feedback`; None for no feedback. Not with ``users``.
        sharding: of the layer. Not with ``users`` or ``counts``.
        counts: (L, 1) int64, how many tokens each of L layers has; its other rows, the last ones, are 0. None for one
            layer. Not with ``users``.
        gains: whether ``gain`` is wanted; for the rate "decrease" only.
    """
    given = changed = (x, delta)
    sizes = token_sizes(x, delta, given, config.rate, wide, sharding)
    # The squared norm bounds every entry of the token's squared gradient: a trace cannot overflow either.
    finite = torch.isfinite(sizes.norm * sizes.norm)
    if applied is not None and (before is not None or config.clip is not None):
        changed = applied(x, delta)
        sizes = token_sizes(x, delta, changed, config.rate, wide, sharding)
    norm, squares = sizes.norm, sizes.squares
    if before is None:
        return Rates(_clipped(torch.full_like(norm, config.lr), norm, config.clip), finite, None)
    if users is None:
        tokens = norm.shape[-1]
        sums, place = squares.cumsum(-1), torch.arange(1, tokens + 1, device=norm.device)
        number = squares.new_full((1,), tokens) if counts is None else counts.to(squares.dtype)
        grown = torch.cat([squares.sum(-1).movedim(0, -1), number], -1)
        earlier = before.movedim(-1, 0).unsqueeze(-1)
    else:
        sums, place, grown = _by_user(squares, users, len(before))
        earlier = before[users.clamp_min(0).long()].T
    energy, square = (earlier[:2] + sums) / (earlier[2] + place)
    root = square.sqrt()
    # `unit` makes eta / unit the weight of a gradient in which those of typical tokens have length 1.
    unit = {"energy": config.lr, "rms": config.lr, "decrease": config.lr * share / root}[config.rate]
    scale = energy if config.rate == "energy" else root
    # The scale is 0 only if the token's x or its gradient is 0.
    eta = torch.where(scale > 0, unit / scale, 0.0).to(norm.dtype)
    bound = config.clip if config.clip is None or config.rate == "energy" else config.clip * scale
    eta = _clipped(eta, norm, bound)
    # For "rms" both factors of a gradient are those of the update.
    rows = changed if config.rate == "rms" else given
    relative = None
    if (config.burst is not None or latest is not None) and config.rate != "energy" and config.lr > 0:
        relative = torch.where(root > 0, eta / unit, 0.0).to(norm.dtype)
    bursts = config.burst is not None and relative is not None
    size, gain = _compared(rows, changed, sizes, relative if bursts else None, users, sharding, counts, gains)
    if config.burst is not None and relative is not None and size is not None:
        shrunk = torch.where(size > config.burst, config.burst / size, 1.0)
        eta, relative = eta * shrunk, relative * shrunk
    agreement = None
    if latest is not None and relative is not None:
        agreement = next_agreement(latest, *rows, relative, sharding, counts)
        eta = eta * factor(agreement, config.feedback).to(eta.dtype)
    if limit is not None:
        if changed is not given:  # the norms of the update's rows, which are not the sizes of "decrease"
            norm = sharding.input.norms(changed[0], wide) * sharding.output.norms(changed[1], wide)
        eta = _clipped(eta, eta * norm, limit)
    # Steps of inputs close to 0 may overflow.
    return Rates(eta, finite & torch.isfinite(eta), grown, None if agreement is None else relative, agreement, gain)


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
    """``eta`` (T,), multiplied by bound / norm where the gradient's ``norm`` (T,) is above ``bound``; or (L, T)."""
    return eta if bound is None else torch.where(norm > bound, eta * (bound / norm), eta).to(norm.dtype)


def _compared(
    rows: Rows,
    applied: Rows,
    sizes: Sizes,
    weight: Tensor | None,
    users: Tensor | None,
    sharding: Sharding,
    counts: Tensor | None,
    gains: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What comes of comparing all pairs of tokens.

    Returns:
        With ``weight`` (T,) the length of the sum of T weighted gradients, divided by sqrt(T), see `_compare`: (1,),
        (L, 1) with counts; with users (T,), of each token's user, and 0 for tokens of nobody. None without.
        ``gain`` of the `Rates`, of tokens of nobody 0; None unless ``gains``.
    """
    if users is None:
        length, gain = _compare(rows, applied, sizes.x, sizes.delta, weight, gains, sharding)
        if length is not None:
            length = length / (len(sizes.norm) ** 0.5 if counts is None else counts.to(length.dtype).sqrt())
        return length, gain
    # Each user's sum is made of its own rows alone, in products whose shapes and bits do not depend on other users.
    lengths = None if weight is None else torch.where(users < 0, 0.0, weight * sizes.norm)
    gain = torch.where(users < 0, 0.0, sizes.norm.square()) if gains else None
    if lengths is None and gain is None:
        return None, None
    owners, counts = users.unique(return_counts=True)
    for user, count in zip(owners.tolist(), counts.tolist(), strict=True):
        if user >= 0 and count > 1:
            # Where all tokens are of one user, their rows are not copied.
            own: Tensor | slice = slice(None) if count == len(users) else (users == user).nonzero().flatten()
            mine = (rows[0][own], rows[1][own])
            changed = mine if applied is rows else (applied[0][own], applied[1][own])
            part = None if weight is None else weight[own]
            length, each = _compare(mine, changed, sizes.x[own], sizes.delta[own], part, gains)
            if lengths is not None and length is not None:
                lengths[own] = length / count**0.5
            if gain is not None and each is not None:
                gain[own] = each
    return lengths, gain


def _compare(
    rows: Rows,
    applied: Rows,
    x_size: Tensor,
    delta_size: Tensor,
    weight: Tensor | None,
    gains: bool,
    sharding: Sharding = UNSHARDED,
) -> tuple[Tensor | None, Tensor | None]:
    """The root of sum_ij w_i w_j (delta_i . delta'_j) (x_i . x'_j), (1,), with w = ``weight``; of L layers (L, 1).

    With x' = x and delta' = delta it is |sum_t w_t delta_t x_t^T|. The rows are divided by their sizes first, so that
    no product overflows.

    Returns:
        That, or None without ``weight``; ``gain`` of the `Rates`, or None unless ``gains``.
    """
    if weight is None and not gains:
        return None, None
    norm, wide = x_size * delta_size, x_size.dtype
    tiny = torch.finfo(wide).tiny
    # A row that the update leaves nothing of is orthogonal to what it leaves of the others.
    scales = [torch.where(size >= tiny, size, torch.inf).unsqueeze(-1) for size in (x_size, delta_size)]
    weight = None if weight is None else weight * norm
    # Processes that hold parts of different sizes must go the same way.
    count = norm.shape[-1]
    n, m = (side.size(part.shape[-1]) for side, part in zip((sharding.input, sharding.output), rows, strict=True))
    whole = weight is not None and not gains and count * (m + n) > m * n
    # The rows of many layers that have a few each are multiplied at once instead.
    several = norm.ndim == 1 or count >= _SEVERAL
    if not whole and several and wide == torch.float32 and not sharding and cpu.takes(*rows, *applied):
        # Where the norms of both rows of a product are finite in float32, so is the product.
        x_pairs, delta_pairs = (
            cpu.row_products(one, other) / scale / scale.mT
            for one, other, scale in zip(rows, applied, scales, strict=True)
        )
        pairs = x_pairs * delta_pairs
    else:
        x, delta = _scaled(rows, scales)
        x2, delta2 = (x, delta) if applied is rows else _scaled(applied, scales)
        if whole:
            # The matrix of the sum is less work than the products of all pairs of rows.
            assert weight is not None
            total = (delta * weight.unsqueeze(-1)).mT @ x
            if applied is rows:
                return sharding.norm(total, total.dtype).unsqueeze(-1), None
            both = total * ((delta2 * weight.unsqueeze(-1)).mT @ x2)
            return sharding.sum(both.sum((-2, -1))).clamp_min(0.0).sqrt().unsqueeze(-1), None
        pairs = sharding.input.sum(x @ x2.mT) * sharding.output.sum(delta @ delta2.mT)
    gain = norm * (norm.unsqueeze(-2) @ pairs).squeeze(-2) if gains else None
    return None if weight is None else bilinear(weight, pairs, weight).clamp_min(0.0).sqrt(), gain


def _scaled(rows: Rows, scales: list[Tensor]) -> list[Tensor]:
    """``rows``, divided by ``scales`` in their dtype."""
    return [part.to(scale.dtype) / scale for part, scale in zip(rows, scales, strict=True)]


def count_(stream: Tensor, grown: Tensor, counts: Tensor | None) -> None:
    """Add ``grown`` of `Rates` to the moments ``stream`` in place, only where ``counts`` (bool) is True if it is given.

    The host does not wait for ``counts``.
    """
    stream.add_(grown if counts is None else torch.where(counts, grown, 0.0))
