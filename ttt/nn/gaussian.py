"""A low-rank Gaussian of a layer's inputs, updated as rows come, from which replay draws rows without keeping any.

The model is probabilistic PCA (Tipping & Bishop, "Probabilistic Principal Component Analysis", 1999), maintained by
incremental PCA (Ross et al., "Incremental Learning for Robust Visual Tracking", 2008). A layer has two: ``past``, from
which rows are drawn, and ``present``, of the rows committed since the last consolidation, which is then merged into
``past``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ttt.nn.parallel import WHOLE, Side
from ttt.ops.philox import normals

FIELDS = ("mean", "factor", "moments")
PAST = tuple(f"past_{field}" for field in FIELDS)
PRESENT = tuple(f"present_{field}" for field in FIELDS)
_ROWS = 256  # Rows added at a time: a matrix of the products of all pairs of them is made.


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The mean of N rows, and their scatter S = sum (x - mean)(x - mean)^T in k principal directions and beside them.

    Attributes:
        mean: (n,).
        factor: (k, n). Its rows are orthogonal, the longest first; factor^T factor is S in the span of its rows.
        moments: (2,) float64: N, and the trace of S outside that span.
        side: of the layer that the rows belong to; n is this process's part of it.

    While N <= k + 1 the factor holds all of S, so the span of the rows can be told from it.
    """

    mean: Tensor
    factor: Tensor
    moments: Tensor
    side: Side = WHOLE

    def joined(self, other: Gaussian) -> Gaussian:
        """The Gaussian of the rows of both, with as many directions as this one. Nothing is written.

        N, the mean and the trace of the scatter are exactly those of all rows. Lost is only in which of the other
        directions the rest of the trace lies. The rows of ``other.factor`` need not be orthogonal. All is computed in
        float64.
        """
        (own, rest), (count, more) = self.moments, other.moments
        total = (own + count).clamp_min(1)
        shift = other.mean.double() - self.mean.double()
        between = shift * (own * count / total).sqrt()
        rows = torch.cat([self.factor.double(), other.factor.double(), between.unsqueeze(0)])
        found = torch.linalg.eigh(self.side.sum(rows @ rows.T))  # ascending; the matrix is small, not n x n
        values, vectors = (self.side.same(t) for t in found)
        k = len(self.factor)
        return Gaussian(
            (self.mean.double() + shift * (count / total)).to(self.mean.dtype),
            (vectors[:, -k:].flip(1).T @ rows).to(self.factor.dtype),
            torch.stack([own + count, rest + more + values[:-k].clamp_min(0).sum()]),
            self.side,
        )

    def with_rows(self, x: Tensor) -> Gaussian:
        """The Gaussian of this one's rows and those of ``x`` (T, n). Nothing is written."""
        joined = self
        for part in x.double().split(_ROWS):
            if len(part):
                mean = part.mean(0)
                moments = torch.tensor([len(part), 0], dtype=torch.float64, device=x.device)
                joined = joined.joined(Gaussian(mean, part - mean, moments, self.side))
        return joined

    def draw(self, rows: int, step: Tensor, seed: int) -> Tensor:
        """Random rows (rows, n) float64 from N(mean, U^T (L - s I) U + s I); zeros while N = 0.

        The rows of U are the principal directions and L is the diagonal matrix of the variances in them; s is the mean
        variance in the other directions. ``step`` (1,) int64 and ``seed`` determine the draws.
        """
        (k, part), (count, rest) = self.factor.shape, self.moments
        n, count = self.side.size(part), count.clamp_min(1)
        noise = rest / (count * max(1, n - k))
        factor = self.factor.double()
        scatter = self.side.sum(factor.square().sum(1))
        spread = ((scatter / count - noise).clamp_min(0) / scatter.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        z = normals(rows, k + n, step, seed)
        return self.mean.double() + (z[:, :k] * spread) @ factor + noise.sqrt() * self.side.part(z[:, k:])


def buffer_layout(n: int, dtype: torch.dtype, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the buffers that hold ``past`` and ``present`` of inputs (n,), by name."""
    fields = {"mean": ((n,), dtype), "factor": ((rank, n), dtype), "moments": ((2,), torch.float64)}
    return {f"{which}_{name}": fields[name] for which in ("past", "present") for name in FIELDS}
