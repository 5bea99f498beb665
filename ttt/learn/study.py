"""Study: reading again, between requests, what was said before, until the weights hold it.

Learning while reading takes one small step for each token, which gives an effect at once but does not make the model
answer questions about a sentence that it read once. `study` takes several steps on the same sentences. Each step is one
of Adam (Kingma & Ba, ICLR 2015) on the mean loss, within the soft projection of `ttt.KroneckerFisher`:

    G  = sum_t delta'_t x'_t^T / tokens         x', delta': the projected rows, as in learning while reading
    dW = -lr rms(W) P_out(Adam(G)) P_in         Adam's division mixes the directions again, so P is applied once more

The weights themselves are not touched before the end: the change is added to the outputs of the layers by hooks, in
float32. So a study that is interrupted, or that diverges, leaves the model as it was, to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttt.atomic import whole_write
from ttt.checks import check_real, check_whole
from ttt.learn.episodes import Episode
from ttt.nn import Capturing, Linear, LowRankLinear
from ttt.nn.directions import project_rows
from ttt.signals import SignalsDeferred

if TYPE_CHECKING:
    from ttt.learn.learner import Learner

_BATCH, _TOKENS = 32, 1024  # episodes of one step; tokens of one forward pass, with padding
_BETAS, _EPS = (0.9, 0.99), 1e-9
_WORSE = 1.0  # nats per token above the first pass, from which a study is given up


@dataclasses.dataclass(frozen=True)
class StudyOutput:
    """What `ttt.Learner.study` did.

    Attributes:
        episodes: number of episodes that were studied.
        losses: nats per token in each pass over them, each measured before the pass's step.
    """

    episodes: int
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """The arguments of `ttt.Learner.study`, checked."""

    passes: int
    lr: float
    until: float

    def __post_init__(self) -> None:
        check_whole("passes", self.passes, 1)
        check_real("lr", self.lr, low=0.0)
        check_real("until", self.until, low=0.0)


class Change:
    """The change of one layer's weights that a study makes: its moments, and the change itself, all (m, n).

    Args:
        layer: whose weights are to change. It is not written.
    """

    def __init__(self, layer: Linear | LowRankLinear) -> None:
        weight = layer.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.layer, self.steps = layer, 0
        self.unit = float(torch.linalg.vector_norm(weight, dtype=wide)) / max(1, weight.numel()) ** 0.5
        self.value = torch.zeros_like(weight, dtype=wide)
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    @torch.no_grad()
    def gradient(self, pairs: Sequence[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
        """The projected gradient of the mean loss of ``tokens`` tokens, from their rows (x, delta)."""
        found = torch.zeros_like(self.value)
        for rows in pairs:
            x, delta = self.layer.applied(*(t.to(self.layer.weight.dtype).contiguous() for t in rows))
            found += delta.to(found.dtype).T @ x.to(found.dtype)
        return found / tokens

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        """One step of Adam with the projected ``gradient`` (m, n)."""
        self.steps += 1
        self.mean.lerp_(gradient, 1 - _BETAS[0])
        self.square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        mean, square = (t / (1 - b**self.steps) for t, b in zip((self.mean, self.square), _BETAS, strict=True))
        # Gradients of a small loss are small, too: eps is in their own unit, so that it does not depend on it.
        step = mean / (square.sqrt() + _EPS * square.mean().sqrt()).clamp_min(torch.finfo(square.dtype).tiny)
        self.value -= lr * self.unit * self._projected(step)

    def _projected(self, matrix: Tensor) -> Tensor:
        inputs, outputs = (
            None if basis is None else basis.to(matrix.dtype) for basis in (self.layer.basis, self.layer.output_basis)
        )
        return project_rows(project_rows(matrix, inputs).T.contiguous(), outputs).T.contiguous()

    @torch.no_grad()
    def write(self, layer: Linear) -> None:
        """Add the change to the weight of ``layer``, whose window is empty."""
        layer.weight.copy_(layer.weight.to(self.value.dtype) + self.value)
        layer.step.add_(1)

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook that gives the layer's output the change."""
        return output + nn.functional.linear(args[0], self.value.to(output.dtype))


@contextlib.contextmanager
def in_effect(changes: Sequence[Change]) -> Iterator[None]:
    """Inside, the layers compute with the ``changes``."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.callback(change.layer.register_forward_hook(change.hook).remove)
        yield


def study(learner: Learner, user: Hashable, options: StudyOptions) -> StudyOutput:
    """Study what ``user`` said since the last study; see `ttt.Learner.study`.

    Args:
        user: None for one set of weights.
    """
    log, pool, seed = learner.episodes, learner.pool, learner.config.seed
    if log is None:
        raise ValueError("study needs a log of what was learnt: ttt.Learner(model, episodes=ttt.EpisodeLog())")
    with contextlib.nullcontext() if pool is None else pool.using([user]):
        new = [episode for episode in log.of(user) if not episode.studied]
        if not new:
            return StudyOutput(0, [])
        changes, losses = _found(learner, user, new, options)
        if pool is None:
            with whole_write(learner.layers, "Learner.study"):
                for layer, change in zip(learner.layers, changes, strict=True):
                    layer.flush()
                    change.write(layer)
                log.mark_studied(user)
        else:
            slot, owned = pool.slot(user), list(pool.layers.values())
            states = [_slot_state(each, slot, change, seed) for each, change in zip(owned, changes, strict=True)]
            for each, state in zip(owned, states, strict=True):
                each.check_slot_state(state)
            with SignalsDeferred():
                for each, state in zip(owned, states, strict=True):
                    each.load_slot(slot, state)
                log.mark_studied(user)
        return StudyOutput(len(new), losses)


def _found(
    learner: Learner, user: Hashable, episodes: Sequence[Episode], options: StudyOptions
) -> tuple[list[Change], list[float]]:
    """The changes of the layers that make ``episodes`` probable, and nats per token in each pass. Nothing is written.

    Raises:
        FloatingPointError: if a loss or gradient is not finite, or the loss has grown by more than a nat per token.
    """
    order, draw = list(episodes), random.Random(learner.config.seed)
    changes, losses = [Change(layer) for layer in learner.access.layers], list[float]()
    with in_effect(changes):
        for _ in range(options.passes):
            draw.shuffle(order)
            total, tokens = 0.0, 0
            for at in range(0, len(order), _BATCH):
                batch = order[at : at + _BATCH]
                count = sum(int(episode.learn.sum()) for episode in batch)
                nll, captured = _gradients(learner, user, batch)
                gradients = [change.gradient(rows, count) for change, rows in zip(changes, captured, strict=True)]
                if not math.isfinite(nll) or not all(bool(torch.isfinite(g).all()) for g in gradients):
                    raise FloatingPointError("the study met a loss or gradient that is not finite; nothing was changed")
                for change, gradient in zip(changes, gradients, strict=True):
                    change.step(gradient, options.lr)
                total, tokens = total + nll, tokens + count
            losses.append(total / tokens)
            if losses[-1] > losses[0] + _WORSE:
                raise FloatingPointError(
                    f"the study diverged with lr={options.lr:g}: {losses[0]:.3g} nats per token became "
                    f"{losses[-1]:.3g}; nothing was changed"
                )
            if losses[-1] <= options.until:
                break
    return changes, losses


def _gradients(
    learner: Learner, user: Hashable, batch: Sequence[Episode]
) -> tuple[float, list[list[tuple[Tensor, Tensor]]]]:
    """The summed loss of ``batch``, and the rows (x, delta) that its backward passes leave at each layer."""
    layers, pool = learner.access.layers, learner.pool
    device = next(learner.model.parameters()).device
    batch = sorted(batch, key=lambda episode: len(episode.ids))
    total, found = 0.0, [list[tuple[Tensor, Tensor]]() for _ in layers]
    while batch:
        # Longest last, so that the width of a part is that of its last episode.
        size = next((n for n in range(len(batch), 1, -1) if n * len(batch[n - 1].ids) <= _TOKENS), 1)
        part, batch = batch[:size], batch[size:]
        width = len(part[-1].ids)
        ids = torch.zeros((size, width), dtype=torch.int64)
        wanted = torch.zeros((size, width), dtype=torch.bool)
        for row, episode in enumerate(part):  # padding comes after all tokens that count, which do not see it
            ids[row, : len(episode.ids)], wanted[row, : len(episode.ids)] = episode.ids, episode.learn
        ids, wanted = ids.to(device), wanted.to(device)[:, 1:]
        users = contextlib.nullcontext() if pool is None else pool.reading(user, size)
        with torch.enable_grad(), Capturing(layers) as capturing, users, learner.head as head:
            _, scores = head.run({"input_ids": ids[:, :-1], "use_cache": False}, ids[:, 1:])
            total += float(scores.nll.detach()[wanted].sum(dtype=torch.float64))
            scores.backward(wanted, 0.0)
            for pairs, new in zip(found, capturing.renew(), strict=True):
                pairs.extend(new)
    return total, found


@torch.no_grad()
def _slot_state(layer: LowRankLinear, slot: int, change: Change, seed: int) -> dict[str, Tensor]:
    """The state of ``slot`` with ``change`` added: the best matrix of ``rank`` rows; the rest is added to ``lost``."""
    state = layer.slot_state(slot)
    whole = change.value.double() + state["b"].double().T @ state["a"].double()
    left, sizes, right = _leading(whole, min(layer.low_rank.rank, *whole.shape), seed)
    roots = sizes.sqrt().unsqueeze(1)
    dropped = (whole.square().sum() - sizes.square().sum()).clamp_min(0).sqrt()
    dtype = state["a"].dtype
    state |= {"a": (roots * right).to(dtype), "b": (roots * left).to(dtype)}
    state["lost"] = state["lost"] + dropped.to(state["lost"].dtype)
    return state | {"eta_sum": torch.zeros_like(state["eta_sum"]), "step": state["step"] + 1}


def _leading(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors (rank, m) and (rank, n) of ``matrix`` (m, n), with their singular values (rank,).

    By subspace iteration (Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4).
    """
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    count = min(rank + 16, *matrix.shape)
    start = torch.randn((matrix.shape[1], count), dtype=matrix.dtype, device=matrix.device, generator=generator)
    space = torch.linalg.qr(matrix @ start)[0]
    for _ in range(4):
        space = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ space)[0])[0]
    left, sizes, right = torch.linalg.svd(space.T @ matrix, full_matrices=False)
    return (space @ left[:, :rank]).T, sizes[:rank], right[:rank]
