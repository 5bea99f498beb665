"""The step of each token: constant, or in units that the layer's own inputs and gradients give.

With g_t = |delta_t| |x_t|, the norm of a token's gradient at the layer, and means over the rows up to and including t::

    constant   eta_t = lr
    energy     eta_t = lr / mean |x|^2       normalised least mean squares (Nagumo & Noda 1967)
    rms        eta_t = lr / sqrt(mean g^2)   RMSProp (Tieleman & Hinton 2012) with one scale for a whole layer

Where g_t is above ``clip``, for "rms" above ``clip`` sqrt(mean g^2), eta_t is smaller by their ratio. A token counts in
its own mean, so that the first has a scale, and the means do not depend on how a stream is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.config import TTTConfig

CALIBRATED, STREAM = 0, 1  # rows of a layer's moments


class Rates(NamedTuple):
    """``eta`` (T,) steps; ``finite`` (T,) bool, whether a token can be learnt from; ``grown`` (3,) float64 or None,
    what the tokens add to the moments."""

    eta: Tensor
    finite: Tensor
    grown: Tensor | None


def rates(
    x: Tensor,
    delta: Tensor,
    config: TTTConfig,
    wide: torch.dtype,
    *,
    moments: Tensor | None = None,
    applied: Callable[[Tensor], Tensor] | None = None,
) -> Rates:
    """The steps of T tokens, computed in ``wide``. Nothing is written, and the host waits for nothing.

    Args:
        x: (T, n).
        delta: (T, m).
        moments: (2, 3) float64, sums of |x|^2 and g^2 and the rows summed: at calibration, and since. None if
            ``config.rate`` is "constant".
        applied: makes of ``x`` the inputs that updates are made with; norms are of those.
    """
    x_norm, d_norm = (torch.linalg.vector_norm(t, dim=1, dtype=wide) for t in (x, delta))
    norm = d_norm * x_norm
    # The squared norm bounds every entry of the token's squared gradient: a trace cannot overflow either.
    finite = torch.isfinite(norm * norm)
    if applied is not None and (moments is not None or config.clip is not None):
        x_norm = torch.linalg.vector_norm(applied(x), dim=1, dtype=wide)
        norm = d_norm * x_norm
    if moments is None:
        return Rates(_clipped(torch.full_like(norm, config.lr), norm, config.clip), finite, None)
    squares = torch.stack([x_norm, norm]).double().square_()
    before = moments.sum(0)
    rows = before[2] + torch.arange(1, len(norm) + 1, device=norm.device)
    energy, square = (before[:2].unsqueeze(1) + squares.cumsum(1)) / rows
    scale = energy if config.rate == "energy" else square.sqrt()
    # A scale of 0 means that the row's x, or its gradient, is 0.
    eta = torch.where(scale > 0, config.lr / scale, 0.0).to(norm.dtype)
    bound = config.clip if config.clip is None or config.rate == "energy" else config.clip * scale
    eta = _clipped(eta, norm, bound)
    grown = torch.cat([squares.sum(1), rows.new_full((1,), len(norm))])
    return Rates(eta, finite & torch.isfinite(eta), grown)  # inputs that are hardly there have steps without bound


def _clipped(eta: Tensor, norm: Tensor, bound: float | Tensor | None) -> Tensor:
    return eta if bound is None else torch.where(norm > bound, eta * (bound / norm), eta).to(norm.dtype)


def count_(moments: Tensor, grown: Tensor, gate: Tensor | None) -> None:
    """Add ``grown`` of `steps` to the stream's moments, unless ``gate`` holds 0, which the device decides by itself."""
    moments[STREAM].add_(grown if gate is None else torch.where(gate != 0, grown, 0.0))
