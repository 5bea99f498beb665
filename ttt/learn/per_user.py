"""Reading and learning with weights of each user's own, in batches in which every sequence belongs to a user."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ttt.learn.huggingface import cache_of, cached, changed, detached
from ttt.learn.loop import ObserveOutput
from ttt.learn.slot_undo import whole_user_write
from ttt.learn.step import refuse_other_updates
from ttt.learn.text import Span, Text
from ttt.nn import Capturing, LowRankLinear, own_loss
from ttt.nn.rates import Rates
from ttt.per_user.names import check_user_list
from ttt.per_user.pool import Pool

if TYPE_CHECKING:
    from ttt.learn.learner import Learner


def check_users(users: Sequence[str | None], batch: int) -> None:
    """Raise TypeError or ValueError unless there is one of ``users`` for each of ``batch`` sequences."""
    check_user_list(users)
    if len(users) != batch:
        raise ValueError(f"users must have an entry for each of the {batch} rows, got {len(users)}")


class LayerUpdate(NamedTuple):
    """What one layer learns from T tokens: the rows ``x`` (T, n) and ``delta`` (T, m) of the update, and ``steps``.

    ``lowers`` (T,) is by how much these steps lower the loss of each token's user (`ttt.nn.own_loss`); None where the
    steps are not bounded.
    """

    layer: LowRankLinear
    x: Tensor
    delta: Tensor
    steps: Rates
    lowers: Tensor | None = None


class PerUserWeights:
    """The strategy of a `ttt.Learner` whose users have weights of their own (`ttt.learn.loop.Strategy`).

    What a user gets and learns depends on their own sequences only. So the words that the gradient of the loss leaves
    out are chosen for each token by itself (``apart`` of `ttt.learn.head.input_gradient`), and each user's chunk is
    rejected or learnt by itself. A rejected user goes on with a cache of zeros, and nobody's context begins anew.

    Args:
        learner: whose model reads.
        pool: its users.
        text: what is read.
        users: the user of each of the B sequences, or None.
        slots: (B,) int32, their slots; -1 for None.
        learn: False to score only.
    """

    def __init__(
        self,
        learner: Learner,
        pool: Pool,
        text: Text,
        users: Sequence[str | None],
        slots: Tensor,
        learn: bool,
    ) -> None:
        self.learner, self.pool, self.slots = learner, pool, slots
        self.text = text.restricted(slots >= 0)
        self.layers = list(pool.layers.values())
        self.users = list(dict.fromkeys(u for u in users if u is not None))
        self.learns = learn and learner.config.lr > 0 and bool(self.users)
        self._teaches: list[bool] | None = None  # for each column, where only some tokens teach
        if self.learns and text.wanted is not None:
            assert self.text.wanted is not None
            self._teaches = self.text.wanted.any(0).tolist()
        self.cache: Any = None
        self.learned = dict.fromkeys(self.users, 0)
        self.rejected = dict.fromkeys(self.users, 0)
        self.rolled_back: Counter[str] = Counter()

    def read(self, span: Span) -> tuple[Tensor, bool]:
        """See `ttt.learn.loop.Strategy`."""
        model, text, columns = self.learner.model, self.text, span.columns
        learns = self.learns and (self._teaches is None or any(self._teaches[columns]))
        inputs = span.inputs() | cached(model, self.cache if span.start else None)
        capturing: Any = Capturing(self.layers) if learns else contextlib.nullcontext()
        with torch.set_grad_enabled(learns), capturing, self.learner.head as head:
            out, scores = head.run(inputs, span.targets)
            if learns:
                assert text.wanted is not None
                scores.backward(text.wanted[:, columns], self.learner.config.head_mass, apart=True)
                captured = capturing.renew()
        self.cache = detached(cache_of(out))
        if learns:
            pairs = zip(self.layers, captured, strict=True)
            updates = [self.update(layer, rows, columns) for layer, rows in pairs if rows]
            for user in self.learn(updates, columns, scores.nll.detach()):
                _blank(self.cache, self.slots == self.pool.slot(user))
        return scores.nll, True

    def update(self, layer: LowRankLinear, pairs: list[tuple[Tensor, Tensor]], columns: slice) -> LayerUpdate:
        """What ``layer`` can learn from the (x, delta) ``pairs`` that the chunk in ``columns`` of the text left at it.

        Nothing is written.
        """
        bounded = own_loss.applies(layer.config, self.text.emphasis)
        return _update(layer, pairs, self.owners(columns)[1], bounded)

    def owners(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Of the tokens in ``columns`` of all sequences, (T,) int32 each: whose they are, and whom they teach."""
        assert self.text.wanted is not None
        wanted = self.text.wanted[:, columns]
        owners = self.slots.repeat_interleave(wanted.shape[1])
        return owners, torch.where(wanted.flatten(), owners, -1)

    def learn(self, updates: list[LayerUpdate], columns: slice, nll: Tensor) -> list[str]:
        """Let users learn ``updates`` from the chunk in ``columns`` of the text, with its scores ``nll`` (B, L).

        Returns:
            The users whose chunk is not finite. They do not change.
        """
        rejected = self._count(self._learn(updates, columns, nll), columns)
        if self.pool.companion is not None:
            self.rolled_back.update(self.pool.companion.check_due())
        return rejected

    def output(self, nll: Tensor) -> ObserveOutput:
        """What was found, with the scores ``nll`` (B, T - 1)."""
        rejected = {user: count for user, count in self.rejected.items() if count}
        learned = sum(self.learned.values())
        return ObserveOutput(
            nll, self.text.scored, learned, sum(rejected.values()), self.rolled_back.total(), rejected_users=rejected,
            rolled_back_users=dict(self.rolled_back),
        )  # fmt: skip

    def _learn(self, updates: list[LayerUpdate], columns: slice, nll: Tensor) -> Tensor:
        """`learn`, which returns the slots, (S,) bool, of users whose chunk is not finite."""
        assert self.text.wanted is not None
        wanted, (owners, users) = self.text.wanted[:, columns], self.owners(columns)
        finite = torch.isfinite(torch.where(wanted, nll, 0.0)).flatten()
        for update in updates:
            finite = finite & (update.steps.finite.to(finite.device) | (users < 0))
        access = self.learner.access
        refuse_other_updates(access.replicas, [(update.layer, update) for update in updates])
        bad = ~access.agreed(~self._by_slot(owners, ~finite))
        users = torch.where(bad[users.clamp_min(0).long()], -1, users)
        if updates:
            guards = self.pool.companion
            with whole_user_write([update.layer for update in updates], users, guards):
                factors = None if guards is None else guards.pace(self.slots, nll, wanted, bad)
                slots, emphasis = users.clamp_min(0).long(), self.text.emphasis
                paces = None if factors is None else factors[slots]
                losses = None if updates[0].lowers is None else self._losses(nll, wanted)[slots]
                for layer, x, delta, steps, lowers in updates:
                    eta = steps.eta if paces is None else steps.eta * paces
                    eta = eta if emphasis == 1.0 else eta * emphasis
                    if lowers is not None and losses is not None:
                        lowers = lowers if paces is None else lowers * paces
                        eta = eta * own_loss.factor(lowers * emphasis, losses, layer.share)
                    layer.learn(x, delta, eta, users)
                    layer.count(steps.grown, ~bad)
        return bad

    def _losses(self, nll: Tensor, wanted: Tensor) -> Tensor:
        """(S,): the sums of the ``wanted`` of the losses ``nll`` (B, L) of each user, made of their own rows alone."""
        found = nll.new_zeros(self.pool.slots)
        for slot in self.slots.unique().tolist():
            if slot >= 0:
                own = self.slots == slot
                found[slot] = nll[own][wanted[own]].sum()
        return found

    def _count(self, bad: Tensor, columns: slice) -> list[str]:
        """Count each user's chunk as learnt or rejected, ``bad`` (S,) being the rejected slots: who was rejected."""
        assert self.text.wanted is not None
        taught = self._by_slot(self.slots, self.text.wanted[:, columns].sum(1))
        slots = [self.pool.slot(user) for user in self.users]
        found = []
        for user, is_bad, has_learnt in zip(self.users, *torch.stack([bad, taught])[:, slots].tolist(), strict=True):
            if is_bad:
                self.rejected[user] += 1
                found.append(user)
            elif has_learnt:
                self.learned[user] += 1
        return found

    def _by_slot(self, owners: Tensor, values: Tensor) -> Tensor:
        """(S,) bool: the slots that own one of ``values`` (N,) that is not 0; ``owners`` (N,) are slots, or -1."""
        sums = torch.zeros(self.pool.slots + 1, dtype=torch.int64, device=owners.device)
        return sums.index_add_(0, owners.long() + 1, values.long())[1:] > 0


def _update(layer: LowRankLinear, pairs: list[tuple[Tensor, Tensor]], users: Tensor, bounded: bool) -> LayerUpdate:
    """What ``layer`` can learn from the (x, delta) ``pairs`` of a backward pass on tokens of ``users`` (T,)."""
    x, delta = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if len(x) != len(users):
        raise ValueError(
            f"{layer.name} saw {len(x)} rows of {len(users)} tokens: users need every token seen once; leave it out of "
            "target_modules"
        )
    x, delta = (t.to(layer.weight.dtype).contiguous() for t in (x, delta))
    changed, damped, steps = layer.steps(x, delta, users, gains=bounded)
    lowers = None if steps.gain is None else own_loss.users_decreases(steps.eta, steps.gain, users)
    return LayerUpdate(layer, changed, damped, steps, lowers)


def _blank(cache: Any, sequences: Tensor) -> None:
    """Zero what the cache holds of ``sequences`` (B,) bool, so that values that are not finite are not read again."""

    def blanked(t: Tensor) -> Tensor:
        if not t.ndim or t.shape[0] != len(sequences):
            return t
        return torch.where(sequences.view(-1, *[1] * (t.ndim - 1)), torch.zeros_like(t), t)

    changed(cache, blanked)
