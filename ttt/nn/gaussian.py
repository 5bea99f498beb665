"""A low-rank Gaussian of a layer's inputs, kept up to date as rows come: replay draws from it and keeps no row.

It is probabilistic PCA (Tipping & Bishop, "Probabilistic Principal Component Analysis", 1999), maintained by
incremental PCA (Ross et al., "Incremental Learning for Robust Visual Tracking", 2008). Each layer has two: ``past``,
from which rows are drawn, and ``present``, of the rows committed since the last consolidation, which then joins it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttt.ops.philox import normals

if TYPE_CHECKING:
    from ttt.nn.base import Layout
    from ttt.nn.linear import Linear

_FIELDS = ("mean", "factor", "moments")
PAST = tuple(f"past_{field}" for field in _FIELDS)
PRESENT = tuple(f"present_{field}" for field in _FIELDS)
_ROWS = 256  # taken at once: their products with each other are made


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """N rows, by their mean, their scatter sum (x - mean)(x - mean)^T in its k principal directions, and its trace in
    the others.

    ``mean`` (n,); ``factor`` (k, n), its rows orthogonal, the largest first, and factor^T factor the scatter in their
    span; ``moments`` (2,) float64: N, and the rest of the trace. While N <= k + 1 nothing is lost, and the span of the
    rows could be told from it.
    """

    mean: Tensor
    factor: Tensor
    moments: Tensor

    def joined(self, other: Gaussian) -> Gaussian:
        """Of the rows of both, with as many directions as this one; those of ``other`` need not be orthogonal.

        N, the mean and the trace of the scatter are exactly those of all rows. What is lost is in which of the other
        directions the rest of the trace lies. All is computed in float64; nothing is written.
        """
        (own, rest), (count, more) = self.moments, other.moments
        total = (own + count).clamp_min(1)
        shift = other.mean.double() - self.mean.double()
        between = shift * (own * count / total).sqrt()
        rows = torch.cat([self.factor.double(), other.factor.double(), between.unsqueeze(0)])
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # rising; of the small matrix, not of n x n
        k = len(self.factor)
        return Gaussian(
            (self.mean.double() + shift * (count / total)).to(self.mean.dtype),
            (vectors[:, -k:].flip(1).T @ rows).to(self.factor.dtype),
            torch.stack([own + count, rest + more + values[:-k].clamp_min(0).sum()]),
        )

    def with_rows(self, x: Tensor) -> Gaussian:
        """Of its own rows and those of ``x`` (T, n)."""
        joined = self
        for part in x.double().split(_ROWS):
            if len(part):
                mean = part.mean(0)
                moments = torch.tensor([len(part), 0], dtype=torch.float64, device=x.device)
                joined = joined.joined(Gaussian(mean, part - mean, moments))
        return joined

    def draw(self, rows: int, step: Tensor, seed: int) -> Tensor:
        """(rows, n) float64, from N(mean, U (L - s I) U^T + s I): L the variances in the principal directions U, s the
        mean variance in the others. Zeros while N = 0."""
        (k, n), (count, rest) = self.factor.shape, self.moments
        count = count.clamp_min(1)
        noise = rest / (count * max(1, n - k))
        factor = self.factor.double()
        scatter = factor.square().sum(1)
        spread = ((scatter / count - noise).clamp_min(0) / scatter.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        z = normals(rows, k + n, step, seed)
        return self.mean.double() + (z[:, :k] * spread) @ factor + noise.sqrt() * z[:, k:]


def layout(n: int, dtype: torch.dtype, rank: int, rows: int) -> Layout:
    """The buffers of both Gaussians of inputs (n,); None each where no ``rows`` are to be drawn."""
    fields = {"mean": ((n,), dtype), "factor": ((rank, n), dtype), "moments": ((2,), torch.float64)}
    return {f"{which}_{name}": fields[name] if rows else None for which in ("past", "present") for name in _FIELDS}


def of_layer(layer: Linear, names: tuple[str, ...] = PAST) -> Gaussian | None:
    """The live buffers; None for a layer without."""
    return None if layer.past_mean is None else Gaussian(*(getattr(layer, name) for name in names))


def absorb(layer: Linear, x: Tensor) -> None:
    """The rows of ``x`` enter the present."""
    present = of_layer(layer, PRESENT)
    if present is not None:
        _write(layer, PRESENT, present.with_rows(x))


def write_past(layer: Linear, past: Gaussian | None) -> None:
    """Make ``past`` what rows are drawn from. Buffers shared with other models are replaced first."""
    if past is not None:
        layer.own(*PAST, copy=False)
        _write(layer, PAST, past)


def consolidate(layer: Linear) -> None:
    """The present joins the past, and begins anew."""
    past, present = of_layer(layer), of_layer(layer, PRESENT)
    if past is not None and present is not None:
        write_past(layer, past.joined(present))
        for name in PRESENT:
            getattr(layer, name).zero_()


def _write(layer: Linear, names: tuple[str, ...], values: Gaussian) -> None:
    for name, field in zip(names, _FIELDS, strict=True):
        getattr(layer, name).copy_(getattr(values, field))
