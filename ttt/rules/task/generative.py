"""Generative replay: inputs are drawn from a Gaussian mixture fitted to past inputs; no sample is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ttt.adapt.fork import fork
from ttt.checks import check_number, check_whole
from ttt.rules.task.base import Batch, Rule
from ttt.rules.task.distillation import SeenOutputs, distillation


class GaussianMixture:
    """A mixture of low-rank Gaussians over inputs of any shape. Each `fit` adds components; labels are not used.

    Component k is N(mu_k, U_k U_k^T + s_k I) with U_k of ``rank`` columns: the principal directions of the inputs
    nearest to mu_k (k-means, started far apart as in k-means++), scaled by their deviations; s_k is the mean variance
    in the other directions. Components are drawn in proportion to the inputs they stand for.

    Args:
        components: largest number that each fit adds.
        rank: columns of U_k, >= 0.
        least: smallest number of inputs that a component stands for, >= 2; a smaller cluster joins the nearest one. The
            mean of a single input would be that input.
        seed: of k-means and the draws.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, components: int = 8, *, rank: int = 8, least: int = 4, seed: int = 0) -> None:
        self.components = check_whole("components", components, 1)
        self.rank = check_whole("rank", rank, 0)
        self.least = check_whole("least", least, 2)
        self.generator = torch.Generator().manual_seed(seed)
        self.shape: torch.Size | None = None
        self.means: list[Tensor] = []  # (n,)
        self.factors: list[Tensor] = []  # (n, rank)
        self.noise: list[float] = []
        self.counts: list[int] = []

    def __len__(self) -> int:
        return len(self.means)

    def check(self, x: Tensor) -> None:
        """Raise unless `fit` takes ``x`` (N, ...).

        Raises:
            ValueError: for inputs of another shape than before, fewer than ``least``, of whole numbers, or not finite.
        """
        if len(x) < self.least or (self.shape is not None and x.shape[1:] != self.shape):
            shape = "" if self.shape is None else f" of shape {tuple(self.shape)}"
            raise ValueError(f"x must be at least {self.least} inputs{shape}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be of a floating-point type, got {x.dtype}")
        if not bool(x.isfinite().all()):
            raise ValueError("x must be finite, got inputs with infinity or NaN")

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Add components for ``x`` (N, ...).

        Raises:
            ValueError: as `check`; nothing has changed then.
        """
        self.check(x)
        self.shape = x.shape[1:]
        rows = x.detach().flatten(1)
        nearest = self._k_means(rows, min(self.components, len(rows) // self.least))
        for c in nearest.unique().tolist():
            mine = rows[nearest == c]
            mean = mine.mean(0)
            variance, directions = self._principal(mine - mean)
            r = min(self.rank, len(variance))
            left = max(rows.shape[1] - r, 1)
            self.means.append(mean)
            self.factors.append(directions[:, :r] * variance[:r].sqrt())
            self.noise.append(float(variance[r:].sum()) / left)
            self.counts.append(len(mine))

    @staticmethod
    def _principal(centred: Tensor) -> tuple[Tensor, Tensor]:
        """Principal variances in falling order, and their directions (n, k), of centred rows (N, n)."""
        _, s, v = torch.linalg.svd(centred, full_matrices=False)
        return s.square() / max(1, len(centred) - 1), v.T

    def _k_means(self, rows: Tensor, k: int, rounds: int = 20) -> Tensor:
        """The cluster of each row, (N,); every cluster has at least ``least`` rows."""
        first = int(torch.randint(len(rows), (1,), generator=self.generator))
        centres = rows[first : first + 1]
        while len(centres) < k:
            far = torch.cdist(rows, centres).amin(1).square().cpu()
            far = far + far.max() * 1e-6 + 1e-12
            pick = int(torch.multinomial(far, 1, generator=self.generator))
            centres = torch.cat([centres, rows[pick : pick + 1]])
        for _ in range(rounds):
            nearest = torch.cdist(rows, centres).argmin(1)
            centres = torch.stack([rows[nearest == c].mean(0) if bool((nearest == c).any()) else centres[c]
                                   for c in range(k)])  # fmt: skip
        distance = torch.cdist(rows, centres)
        while True:
            counts = torch.bincount(distance.argmin(1), minlength=k)
            small = [c for c in range(k) if 0 < counts[c] < self.least]
            if not small:
                return distance.argmin(1)
            distance[:, min(small, key=counts.tolist().__getitem__)] = torch.inf

    @torch.no_grad()
    def sample(self, rows: int) -> Tensor:
        """Draw inputs, (rows, ...).

        Raises:
            RuntimeError: before the first `fit`.
        """
        if self.shape is None:
            raise RuntimeError("call fit() before sample()")
        weights = torch.tensor(self.counts, dtype=torch.float64)
        chosen = torch.multinomial(weights, rows, replacement=True, generator=self.generator)
        like = self.means[0]
        x = torch.randn((rows, len(like)), generator=self.generator).to(like)
        for c in chosen.unique().tolist():
            mine = chosen == c
            factor = self.factors[c]
            z = torch.randn((int(mine.sum()), factor.shape[1]), generator=self.generator).to(like)
            x[mine] = self.means[c] + z @ factor.T + x[mine] * self.noise[c] ** 0.5
        return x.view(rows, *self.shape)

    def tensors(self) -> list[Tensor]:
        """What is held, for counting bytes."""
        return self.means + self.factors


class GenerativeReplay(Rule):
    """Generative replay: every step also learns from inputs drawn from a mixture fitted to earlier tasks.

    Shin et al., 2017, with soft targets as in van de Ven & Tolias, 2018. On drawn inputs x_g the targets are the
    outputs f* of the model at the end of the last task, in eval mode:

        loss += weight T^2 sum_g KL(softmax(f*(x_g) / T) || softmax(f(x_g) / T))

    head by head where there are heads. Without heads the softmax of f runs over all outputs, and that of f* over those
    that earlier tasks taught: an input of the past belongs to no class that came later. No sample and no label is kept.

    Args:
        components, rank: of the mixture; ``components`` are added by each task.
        rows: inputs drawn for each step.
        weight: of a generated input against a new one, >= 0.
        temperature: T > 0.
        low, high: generated inputs are clamped to this range; None for no bound.
        seed: of the mixture.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        *,
        components: int = 8,
        rank: int = 8,
        rows: int = 32,
        weight: float = 1.0,
        temperature: float = 2.0,
        low: float | None = None,
        high: float | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = check_whole("rows", rows, 1)
        self.weight = check_number("weight", weight, 0.0)
        self.temperature = check_number("temperature", temperature, 0.0, above=True)
        self.low, self.high = low, high
        self.generator = GaussianMixture(components, rank=rank, seed=seed)
        self.seen = SeenOutputs()
        self.teacher: nn.Module | None = None

    @torch.no_grad()
    def draw(self) -> tuple[Batch, Tensor]:
        """Generated inputs, labelled by the old model; and its logits (N, K) for them.

        Raises:
            RuntimeError: before the first task has ended.
        """
        if self.teacher is None:
            raise RuntimeError("there is no earlier task to draw from")
        x = self.generator.sample(self.rows)
        if self.low is not None or self.high is not None:
            x = x.clamp(self.low, self.high)
        logits = self.forward(self.teacher, Batch(x, x.new_zeros(len(x), dtype=torch.int64)))
        return Batch(x, logits.argmax(-1)), logits

    def term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        drawn, target = self.draw()
        said = self.forward(self.model, drawn)
        groups = self.seen.groups
        if not self.seen.heads:
            later = torch.ones(target.shape[-1], dtype=torch.bool, device=target.device)
            later[groups[0]] = False
            target = target.masked_fill(later, -torch.inf)
            groups = [torch.arange(target.shape[-1], device=target.device)]
        return self.weight * distillation(said, target, self.temperature, groups)

    def check_end(self, batches: Sequence[Batch]) -> None:
        self.generator.check(torch.cat([batch.x for batch in batches]))

    def end_task(self, batches: Sequence[Batch]) -> None:
        self.seen.add(batches)
        self.generator.fit(torch.cat([batch.x for batch in batches]))
        self.teacher = fork(self.model).eval()

    def tensors(self) -> Iterable[Tensor]:
        held = [] if self.teacher is None else [p.detach() for p in self.teacher.parameters()]
        return held + self.generator.tensors()
