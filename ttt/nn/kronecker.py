"""Soft projection: updates are damped along the directions that matter to what the model knows.

With A the second moment of a layer's inputs and B that of the loss gradients at its outputs, both over tokens of text
that the model knows, a token's row (x, delta) enters the update as::

    x'     = (a / (A + eps_A))^p x          a: the mean of the smaller eigenvalues of A, plus eps_A; likewise b
    delta' = (b / (B + eps_B))^p delta

The Kronecker product of A and B approximates the Fisher information of the weights (K-FAC: Martens & Grosse, ICML
2015). p = 1 gives the natural gradient up to a factor; on the side of the inputs it is the closed form with which MEMIT
writes facts (Meng et al., ICLR 2023). Of A and B only k principal directions u_i with eigenvalues l_i are kept; all
others count as their mean. Then

    x' = x - U^T U x,    row i of U:  u_i sqrt(1 - (a / (l_i + eps_A))^p)

which is what `ttt.ops.project_out` computes; it costs as much as leaving k directions alone. Where l_i is far above a,
the direction is left alone; where l_i is about a, x' is x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttt import ops
from ttt.nn.gaussian import Gaussian
from ttt.nn.parallel import UNSHARDED, WHOLE, Sharding, Side
from ttt.nn.rates import token_sizes

if TYPE_CHECKING:
    from ttt.config import TTTConfig
    from ttt.nn.base import Adapted

SIDES = ("input", "output")
MOMENTS = tuple(f"{side}_{what}" for side in SIDES for what in ("factor", "sums"))
"""Buffers of `ttt.nn.Linear` that hold A and B; see `layout`."""

_ROWS = 256  # Rows that are joined with a second moment at a time.
_SAMPLE = 1024  # Tokens of a calibration from which the scale of the step is measured.


def second_moment(factor: Tensor, sums: Tensor, side: Side = WHOLE) -> Gaussian:
    """A second moment about 0 as a `Gaussian` of mean 0, which can be joined with others.

    Args:
        factor: (r, n), rows that are orthogonal; factor^T factor is the sum of x x^T in their span.
        sums: (2,) float64: the number of rows x, and their summed squared length outside that span.
        side: of the layer that the rows belong to.
    """
    return Gaussian(factor.new_zeros(factor.shape[1]), factor, sums, side)


def with_rows(moment: Gaussian, rows: Tensor, count: float | None = None) -> Gaussian:
    """``moment`` joined with ``rows`` (N, n), which stand for ``count`` rows (default: N). Nothing is written."""
    if not len(rows):
        return moment
    each = (len(rows) if count is None else count) / len(rows)
    for part in rows.double().split(_ROWS):
        sums = torch.tensor([len(part) * each, 0], dtype=torch.float64, device=rows.device)
        moment = moment.joined(second_moment(part * each**0.5, sums, moment.side))
    return moment


class _SecondMoment:
    """The second moment of the rows that a calibration sees at one side of a layer.

    Args:
        kept: number of directions that are kept.
        part: n, of a row, or of this process's part of it.
        side: which side it is.
    """

    def __init__(self, kept: int, part: int, device: torch.device, side: Side = WHOLE) -> None:
        self.kept, self._count, self._side = kept, 0, side
        zeros = torch.zeros(2, dtype=torch.float64, device=device)
        self._joined = second_moment(torch.zeros((kept, part), dtype=torch.float64, device=device), zeros, side)
        size = side.size(part)
        # To join rows takes the eigenvectors of a matrix of kept + _ROWS each time. Up to about twice that size, adding
        # up the whole matrix, whose eigenvectors are needed once, is less work; and nothing is lost on the way.
        self._whole = zeros.new_zeros((size, size)) if size <= 2 * (kept + _ROWS) else None

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` (N, n)."""
        if self._whole is None:
            self._joined = with_rows(self._joined, rows)
            return
        rows = self._side.gather(rows).double()
        self._whole.addmm_(rows.T, rows)
        self._count += len(rows)

    def result(self) -> Gaussian:
        """As `second_moment`."""
        if self._whole is None:
            return self._joined
        values, vectors = (self._side.same(t) for t in torch.linalg.eigh(self._whole))
        values.clamp_min_(0)
        factor = vectors[:, -self.kept :].flip(1).T * values[-self.kept :].flip(0).sqrt().unsqueeze(1)
        rest = values[: -self.kept].sum()
        sums = torch.stack([rest.new_tensor(float(self._count)), rest])
        return second_moment(self._side.part(factor), sums, self._side)


def soft_directions(moment: Gaussian, count: int, power: float, damping: float) -> Tensor:
    """U of the module's docstring, (count, n) float64, for a second moment; zeros if it is that of no rows.

    Args:
        count: k.
        power: p > 0.
        damping: eps, in units of the mean eigenvalue.
    """
    factor, (rows, rest) = moment.factor.double(), moment.moments
    found = factor.new_zeros((count, factor.shape[1]))
    n, count = moment.side.size(factor.shape[1]), min(count, len(factor))
    energy = moment.side.sum(factor.square().sum(1))
    if not count or not float(rows) or not float(energy[0]):
        return found
    rows = rows.clamp_min(1)
    # Everything outside the first k directions: in the others of the factor, and outside its span.
    tail = (energy[count:].sum() + rest) / (rows * max(1, n - count))
    eps = damping * (energy.sum() + rest) / (rows * n)
    top = energy[:count] / rows
    kept = ((tail + eps) / (top + eps).clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    units = factor[:count] / energy[:count].sqrt().clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)
    found[:count] = units * (1 - kept**power).sqrt().unsqueeze(1)
    return found


def layout(
    config: TTTConfig, m: int, n: int, wide: torch.dtype, sharding: Sharding = UNSHARDED
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the buffers `MOMENTS`: ``factor`` (2 k, size) and ``sums`` (2,) float64 of either side.

    Twice the directions that are used are kept, so that the leading ones stay exact as rows are added.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, side, part in zip(SIDES, (sharding.input, sharding.output), (n, m), strict=True):
        found[f"{name}_factor"] = ((_sketch_rows(config, side.size(part)), part), wide)
        found[f"{name}_sums"] = ((2,), torch.float64)
    return found


def _sketch_rows(config: TTTConfig, size: int) -> int:
    return min(2 * config.kronecker, size)


class Calibration:
    """What calibration collects for the soft projection of one layer: A, B, and a sample of tokens.

    Args:
        layer: a layer whose configuration has a `ttt.KroneckerFisher`. It is not written until `write`.
    """

    def __init__(self, layer: Adapted) -> None:
        self.layer = layer
        device, config = layer.weight.device, layer.config
        sides = (layer.sharding.input, layer.in_features), (layer.sharding.output, layer.out_features)
        self._moments = [
            _SecondMoment(_sketch_rows(config, side.size(part)), part, device, side) for side, part in sides
        ]
        self.sample = [
            torch.zeros((_SAMPLE, size), dtype=layer.weight.dtype, device=device)
            for size in (layer.in_features, layer.out_features)
        ]
        self.seen = torch.zeros((1,), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, delta: Tensor) -> None:
        """Add tokens: inputs ``x`` (T, n) and gradients ``delta`` (T, m) of the weight's dtype."""
        before = self.seen.clone()
        for at, rows in enumerate((x, delta)):
            self._moments[at].add(rows)
            self.seen.copy_(before)  # the same tokens are kept on both sides
            ops.reservoir_insert(self.sample[at], self.seen, rows.contiguous(), seed=self.layer.seed)

    @torch.no_grad()
    def write(self) -> Tensor | None:
        """Write the directions, and A and B if the layer has buffers for them.

        Returns:
            (3,) float64: the moments of `ttt.nn.rates` of all tokens, in which the soft projection is in effect,
            estimated from the sample; None if the configuration's rate is "constant".
        """
        layer, moments = self.layer, [moment.result() for moment in self._moments]
        set_directions(layer, *moments)
        for side, moment in zip(SIDES, moments, strict=True):
            if getattr(layer, f"{side}_factor", None) is not None:
                layer.unshare(f"{side}_factor", f"{side}_sums", copy=False)
                getattr(layer, f"{side}_factor").copy_(moment.factor)
                getattr(layer, f"{side}_sums").copy_(moment.moments)
        if layer.config.rate == "constant":
            return None
        tokens = int(self.seen)
        x, delta = (rows[: min(tokens, _SAMPLE)] for rows in self.sample)
        applied, rate = layer.applied(x, delta), layer.config.rate
        squares = token_sizes(x, delta, applied, rate, sharding=layer.sharding).squares
        return torch.cat([squares.mean(1) * tokens, squares.new_tensor([tokens])])


@torch.no_grad()
def set_directions(layer: Adapted, inputs: Gaussian, outputs: Gaussian) -> None:
    """Write ``layer.basis`` and ``layer.output_basis`` for the second moments A and B."""
    config = layer.config
    layer.unshare("basis", "output_basis", copy=False)
    for buffer, moment in ((layer.basis, inputs), (layer.output_basis, outputs)):
        if buffer is not None:  # of a side with a single number there is no direction to damp
            buffer.copy_(soft_directions(moment, len(buffer), config.kronecker_power, config.kronecker_damping))
