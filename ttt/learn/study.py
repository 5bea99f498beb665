"""Study: reading again, between requests, what was said before, until the weights hold it.

Learning while reading takes one small step for each token, which gives an effect at once but does not make the model
answer questions about a sentence that it read once. `study` takes several steps on the same sentences. Each step is one
of Adam (Kingma & Ba, ICLR 2015) on the mean loss, within the soft projection of `ttt.KroneckerFisher`:

    G  = sum_t delta'_t x'_t^T / tokens         x', delta': the projected rows, as in learning while reading
    dW = -lr rms(W) P_out(Adam(G)) P_in         Adam's division mixes the directions again, so P is applied once more

Beside what was said, each step reads some text that the model wrote itself, and is held to what the model predicted
there before (`ttt.learn.rehearsal`): the change that a study makes is the one that disturbs the rest least.

The blocks below the lowest learning layer compute the same in every pass, and for what the model predicted before all
blocks do: they run once for each text (`ttt.learn.blocks`).

The weights themselves are not touched before the end: the change is added to the outputs of the layers by hooks, in
float32. So a study that is interrupted, or that diverges, leaves the model as it was, to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttt.adapt.version import version
from ttt.atomic import whole_write
from ttt.checks import check_real, check_token_ids, check_whole
from ttt.learn import rehearsal
from ttt.learn.blocks import KnownBlocks
from ttt.learn.episodes import Episode, EpisodeLog
from ttt.learn.huggingface import frozen
from ttt.nn import Capturing, Linear, LowRankLinear
from ttt.nn.directions import principal_directions, project_rows
from ttt.per_user.pool import Pool
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
        losses: nats per token in each pass over them, each measured before the pass's steps.
        after: nats per token with what was written; with weights for each user, after the truncation. NaN if nothing
            was studied.
        moved: KL in nats per token from the model before the study in each pass, as the steps of the pass met it: each
            before its update, on four of the texts of the model's own. Empty without rehearsal.
    """

    episodes: int
    losses: list[float]
    after: float = math.nan
    moved: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """The arguments of `ttt.Learner.study`, checked."""

    passes: int
    lr: float
    until: float
    rehearse: float

    def __post_init__(self) -> None:
        check_whole("passes", self.passes, 1)
        if check_real("lr", self.lr, low=0.0) == 0:
            raise ValueError("lr must be above 0, got 0: nothing would be learnt, and all would count as studied")
        check_real("until", self.until, low=0.0)
        check_real("rehearse", self.rehearse, low=0.0, high=1000.0)


class Change:
    """The change of one layer's weights that a study makes: its moments, and the change itself, all (m, n).

    Args:
        layer: whose weights are to change. It is not written.
    """

    def __init__(self, layer: Linear | LowRankLinear) -> None:
        weight = _weight(layer)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.layer, self.steps = layer, 0
        self.unit = float(torch.linalg.vector_norm(weight, dtype=wide)) / max(1, weight.numel()) ** 0.5
        self.value = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    @torch.no_grad()
    def gradient(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The projected gradient (m, n) of the loss whose backward pass left the rows (x, delta)."""
        found = torch.zeros_like(self.value)
        for rows in pairs:
            x, delta = self.layer.applied(*(t.to(self.layer.weight.dtype).contiguous() for t in rows))
            found += delta.to(found.dtype).T @ x.to(found.dtype)
        return found

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
    def fits(self) -> bool:
        """Whether the changed weight is finite in the dtype of the weight."""
        weight = _weight(self.layer)
        return bool(torch.isfinite((weight.to(self.value.dtype) + self.value).to(weight.dtype)).all())

    @torch.no_grad()
    def write(self, layer: Linear) -> None:
        """Add the change to the weight of ``layer``, whose window is empty."""
        layer.weight.copy_(layer.weight.to(self.value.dtype) + self.value)
        layer.step.add_(1)

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook that gives the layer's output the change."""
        return output + nn.functional.linear(args[0], self.value.to(output.dtype))


def _weight(layer: Linear | LowRankLinear) -> Tensor:
    """The weight (m, n) that the layer computes with for all; where it is quantized, a plain copy."""
    return layer.base_weight if isinstance(layer, LowRankLinear) else layer.weight.detach()


@contextlib.contextmanager
def in_effect(changes: Sequence[Change]) -> Iterator[None]:
    """Inside, the layers compute with the ``changes``."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.callback(change.layer.register_forward_hook(change.hook).remove)
        yield


def study_in_steps(learner: Learner, user: str | None, options: StudyOptions) -> Generator[None, None, StudyOutput]:
    """Study what ``user`` said since the last study, in steps; see `ttt.Learner.study_in_steps`.

    Args:
        user: None for one set of weights.
    """
    if learner.episodes is None:
        raise ValueError("study needs a log of what was learnt: ttt.Learner(model, episodes=ttt.EpisodeLog())")
    return _Study(learner, learner.episodes, user, options).steps()


class _Study:
    """One study. What it holds between its steps is beside the model: the changes and their moments."""

    def __init__(self, learner: Learner, log: EpisodeLog, user: str | None, options: StudyOptions) -> None:
        self.learner, self.log, self.user, self.options = learner, log, user, options
        self.changes: list[Change] = []
        self.moved: list[float] = []
        self.blocks: KnownBlocks
        self._began_at: tuple[int, ...] = ()

    def steps(self) -> Generator[None, None, StudyOutput]:
        learner, pool, user = self.learner, self.learner.pool, self.user
        if pool is not None and user not in pool.users and pool.on_miss is None:
            return StudyOutput(0, [])  # who said nothing takes nobody's slot
        with self._using_model():
            new = [episode for episode in self.log.of(user) if not episode.studied]
            self._check_episodes(new)
            if not new:
                return StudyOutput(0, [])
            learner.renew_guard()
            layers = learner.access.layers
            self.blocks = KnownBlocks(learner.model, layers, learner.head.head)
            with self._reading(user, 1):
                self.blocks.check(new[0].ids.to(next(learner.model.parameters()).device))
            self.changes = [Change(layer) for layer in layers]
            self._began_at = self._position()
        texts = (yield from self._own_texts()) if self.options.rehearse else None
        losses = yield from self._learn(new, texts)
        with self._using_model():
            states = [] if pool is None or user is None else _slot_states(pool, user, self.changes)
        after = (yield from self._summed_loss(new)) / _tokens(new)
        with self._using_model():
            if not all(change.fits() for change in self.changes):
                raise FloatingPointError("the study made weights that are not finite; nothing was changed")
            _check(losses[0], after, self.options.lr)
            guard: Any = learner.guard if pool is None else pool.companion
            drift = None if guard is None else guard.require_within(user)
            self._write(states)
            if guard is not None:
                guard.settle(user, drift)
        return StudyOutput(len(new), losses, after, self.moved)

    @contextlib.contextmanager
    def _using_model(self, changed: bool = True) -> Iterator[None]:
        """Inside, a step may use the model, whose layers compute with the changes if ``changed``.

        Raises:
            RuntimeError: if something else has changed what is studied since the first step.
        """
        learner, pool = self.learner, self.learner.pool
        with contextlib.ExitStack() as stack:
            stack.enter_context(learner.access.enter("Learner.study"))
            stack.enter_context(frozen(learner.model))
            if pool is not None:
                stack.enter_context(pool.using([self.user], learns=True))
            if self.changes:
                if self._position() != self._began_at:
                    raise RuntimeError(
                        "something was learnt between two steps of a study, which would be lost; nothing was changed"
                    )
                if changed:
                    stack.enter_context(in_effect(self.changes))
            yield

    def _own_texts(self) -> Generator[None, None, Tensor]:
        """Texts that the model writes; of users, those of the base model, written once in a learner's life."""
        learner, pool = self.learner, self.learner.pool
        if learner.own_texts is not None and pool is not None:
            return learner.own_texts
        drawing = rehearsal.draw_in_steps(learner.model, context=learner.context, seed=learner.config.seed)
        while True:
            with self._using_model(changed=False), self._reading(None, rehearsal.SEQUENCES):
                try:
                    next(drawing)
                except StopIteration as done:
                    learner.own_texts = done.value
                    return done.value
            yield

    def _reading(self, user: str | None, rows: int) -> contextlib.AbstractContextManager[None]:
        """Inside, ``rows`` rows have the weights of ``user``, or the base model's; nothing for one set of weights."""
        pool = self.learner.pool
        return contextlib.nullcontext() if pool is None else pool.reading(user, rows)

    def _position(self) -> tuple[int, ...]:
        """Numbers that change when something is learnt, undone or loaded, and the user's slot."""
        pool, model = self.learner.pool, self.learner.model
        if pool is None:
            return (version(model),)
        assert self.user is not None  # `Learner.study_in_steps` checked it
        return version(model, self.user), int(next(iter(pool.layers.values())).step[pool.slot(self.user)])

    def _check_episodes(self, episodes: Sequence[Episode]) -> None:
        context = self.learner.context
        for episode in episodes:
            check_token_ids("the log's tokens", episode.ids[None], self.learner.model)
            if len(episode.ids) > context + 1:
                raise ValueError(
                    f"the log has an episode of {len(episode.ids)} tokens, but the learner's context is {context}: it "
                    "was filled with a larger one"
                )

    def _learn(self, episodes: Sequence[Episode], texts: Tensor | None) -> Generator[None, None, list[float]]:
        """Let the changes make ``episodes`` probable: nats per token in each pass.

        Args:
            texts: (N, T) int64, of the model's own, for rehearsal; None for none.

        Raises:
            FloatingPointError: if a loss or gradient is not finite, or the loss has grown by more than a nat per token.
        """
        options = self.options
        order, draw, losses = list(episodes), random.Random(self.learner.config.seed), list[float]()
        for _ in range(options.passes):
            draw.shuffle(order)
            total, moved, steps = 0.0, 0.0, range(0, len(order), _BATCH)
            for at in steps:
                batch = order[at : at + _BATCH]
                gradients = [torch.zeros_like(change.value) for change in self.changes]
                nll = yield from self._summed_loss(batch, gradients)
                torch._foreach_div_(gradients, _tokens(batch))
                if texts is not None:
                    moved += yield from self._rehearse(rehearsal.group(texts, self.changes[0].steps), gradients)
                if not math.isfinite(nll) or not all(bool(torch.isfinite(g).all()) for g in gradients):
                    raise FloatingPointError("the study met a loss or gradient that is not finite; nothing was changed")
                for change, gradient in zip(self.changes, gradients, strict=True):
                    change.step(gradient, options.lr)
                total += nll
            if texts is not None:
                self.moved.append(moved / len(steps))
            losses.append(total / _tokens(order))
            _check(losses[0], losses[-1], options.lr)
            if losses[-1] <= options.until:
                break
        return losses

    def _summed_loss(
        self, batch: Sequence[Episode], gradients: Sequence[Tensor] | None = None
    ) -> Generator[None, None, float]:
        """The summed loss of ``batch``; its projected gradient at each change is added to the tensor beside it."""
        layers, total = self.learner.access.layers, 0.0
        device = next(self.learner.model.parameters()).device
        for ids, wanted, lengths in _parts(batch):
            ids, wanted = ids.to(device), wanted.to(device)[:, 1:]
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._using_model())
                stack.enter_context(self._reading(self.user, len(ids)))
                stack.enter_context(torch.set_grad_enabled(gradients is not None))
                capturing = None if gradients is None else stack.enter_context(Capturing(layers))
                head = stack.enter_context(self.learner.head)
                stack.enter_context(self.blocks.reading(ids[:, :-1], [length - 1 for length in lengths]))
                _, scores = head.run({"input_ids": ids[:, :-1], "use_cache": False}, ids[:, 1:])
                total += float(scores.nll.detach()[wanted].sum(dtype=torch.float64))
                if capturing is not None and gradients is not None:
                    scores.backward(wanted, 0.0)
                    for change, gradient, pairs in zip(self.changes, gradients, capturing.renew(), strict=True):
                        gradient += change.gradient(pairs)
            yield
        return total

    def _rehearse(self, ids: Tensor, gradients: Sequence[Tensor]) -> Generator[None, None, float]:
        """KL in nats per token on ``ids`` (B, T) from the model before the study.

        Its gradient, times ``rehearse``, is added to the tensor beside each change.
        """
        model, layers, lengths = self.learner.model, self.learner.access.layers, [ids.shape[1]] * len(ids)
        with self._using_model(changed=False), self._reading(self.user, len(ids)):
            with torch.no_grad(), self.blocks.reading(ids, lengths, every=True):
                before = model(input_ids=ids, use_cache=False).logits
            with in_effect(self.changes), torch.enable_grad(), Capturing(layers) as capturing:
                with self.blocks.reading(ids, lengths):
                    now = model(input_ids=ids, use_cache=False).logits
                found, gradient = rehearsal.divergence(before, now.detach())
                now.backward(gradient.mul_(self.options.rehearse))
                for change, into, pairs in zip(self.changes, gradients, capturing.renew(), strict=True):
                    into += change.gradient(pairs)
        yield
        return found

    def _write(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Put the changes into the weights: with a pool, ``states`` into the user's slot."""
        learner, pool = self.learner, self.learner.pool
        if pool is None:
            with whole_write(learner.layers, "Learner.study"):
                for layer, change in zip(learner.layers, self.changes, strict=True):
                    layer.flush()
                    change.write(layer)
                self.log.mark_studied(self.user)
        elif self.user is not None:
            with SignalsDeferred():
                for each, state in zip(pool.layers.values(), states, strict=True):
                    each.load_slot(pool.slot(self.user), state)
                self.log.mark_studied(self.user)


def _parts(batch: Sequence[Episode]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """``batch`` in parts of at most `_TOKENS` tokens.

    Yields:
        (B, T) int64 tokens; (B, T) bool, those that are learnt; and the lengths of the rows, without padding.
    """
    batch = sorted(batch, key=lambda episode: len(episode.ids))
    while batch:
        # Longest last, so that the width of a part is that of its last episode.
        size = next((n for n in range(len(batch), 1, -1) if n * len(batch[n - 1].ids) <= _TOKENS), 1)
        part, batch = batch[:size], batch[size:]
        width = len(part[-1].ids)
        ids = torch.zeros((size, width), dtype=torch.int64)
        wanted = torch.zeros((size, width), dtype=torch.bool)
        for row, episode in enumerate(part):  # padding comes after all tokens that count, which do not see it
            ids[row, : len(episode.ids)], wanted[row, : len(episode.ids)] = episode.ids, episode.learn
        yield ids, wanted, [len(episode.ids) for episode in part]


def _tokens(episodes: Sequence[Episode]) -> int:
    return sum(int(episode.learn.sum()) for episode in episodes)


def _check(first: float, last: float, lr: float) -> None:
    if not last <= first + _WORSE:
        raise FloatingPointError(
            f"the study diverged with lr={lr:g}: {first:.3g} nats per token became {last:.3g}; nothing was changed"
        )


def _slot_states(pool: Pool, user: str, changes: Sequence[Change]) -> list[dict[str, Tensor]]:
    """The states of the user's slot with ``changes`` added, each of which becomes what is left of it at that rank."""
    slot, found = pool.slot(user), []
    for layer, change in zip(pool.layers.values(), changes, strict=True):
        state, change.value = _slot_state(layer, slot, change)
        layer.check_slot_state(state)
        found.append(state)
    return found


@torch.no_grad()
def _slot_state(layer: LowRankLinear, slot: int, change: Change) -> tuple[dict[str, Tensor], Tensor]:
    """The state of ``slot`` with ``change`` added, as the best matrix of ``rank`` rows, and what is left of the change.

    What the truncation drops is added to ``lost``.
    """
    state = layer.slot_state(slot)
    before = _product(state)
    whole = before + change.value.double()
    right = principal_directions(whole, min(layer.low_rank.rank, *whole.shape))
    scaled = right @ whole.T  # left singular vectors times singular values
    sizes = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    roots = sizes.sqrt()
    dropped = (whole.square().sum() - sizes.square().sum()).clamp_min(0).sqrt()
    dtype = state["a"].dtype
    tiny = torch.finfo(roots.dtype).tiny
    state |= {"a": (roots * right).to(dtype), "b": (scaled / roots.clamp_min(tiny)).to(dtype)}
    state["lost"] = state["lost"] + dropped.to(state["lost"].dtype)
    state |= {"eta_sum": torch.zeros_like(state["eta_sum"]), "step": state["step"] + 1}
    return state, (_product(state) - before).to(change.value.dtype)


def _product(state: dict[str, Tensor]) -> Tensor:
    """B^T A of a slot's state, (m, n) float64."""
    return state["b"].double().T @ state["a"].double()
