"""`UserGuards`: limits what learning makes each user's weights forget, measured on inputs that the model knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable

import torch
from torch import Tensor, nn

from ttt.checks import check_token_ids, check_type
from ttt.nn.low_rank import PER_ROW
from ttt.per_user.pacing import MOST_CHECKS, GuardSettings, clipped, pace
from ttt.per_user.pool import pool_of
from ttt.per_user.user_state import GUARDS, State
from ttt.steps import finish

_PROGRESS = ("strength", "level", "tokens", "since")


@dataclasses.dataclass(frozen=True)
class UserGuardCheck:
    """One measurement of a user's drift.

    Attributes:
        user: whose weights were measured.
        tokens: tokens that the user has learnt.
        drift: loss on the held-back inputs divided by the base model's loss on them, minus 1; before any rollback.
        strength: the factor by which the user's configured protection is multiplied from then on.
        rolled_back: whether the user's weights were rolled back to their last good state.
    """

    user: str
    tokens: int
    drift: float
    strength: float
    rolled_back: bool


@dataclasses.dataclass
class _Guarded:
    """What is kept for a user in a slot."""

    slot: int
    strength: float
    level: float  # running level of the loss on the user's own tokens, nats per token
    tokens: int
    since: int  # tokens learnt since the last check
    good: State  # weights, and log of what they learnt, at the last check within the threshold
    good_at: int = 0  # value of tokens then
    era: object = None  # of the log in it


class UserGuards(GuardSettings):
    """One guard for each user of a model; all users share the held-back inputs:

        guards = UserGuards(model, [held_back_ids])
        learner.observe(ids, users=["alice", "bob"])

    Each user's guard has the formulas of `ttt.Guard`, which explains them, and its own drift, strength and level.
    Whenever a user has learnt ``every`` tokens, the drift of that user's weights is measured: the loss on the held-back
    inputs divided by the base model's loss on them, minus 1. From it follows the strength s of the user's protection:

        s <- min(cap, max(1, s strengthen^e))        e = min(1/2, max(-1/16, drift / threshold - 1))

    If the drift is above ``bound``, e is 1/2, and the user's weights are rolled back to those of the last check within
    ``threshold``, bit for bit, and so is the log of what the user said, if there is one (`ttt.EpisodeLog`). A study
    that would take the drift above ``bound`` is refused. When the user's slot is compressed, the penalty is s times the
    configured one, and so is the strength of replay, up to 1. If neither is configured, ``lr`` is divided by s instead.
    s begins at strengthen^(3/2). The steps of a user's chunk with the mean loss l are multiplied by
    min(1, (surprise L / l)^4), where L is the running level of that user's loss.

    What a guard does to a user depends on that user's own tokens only. A user is checked before being evicted. Strength
    and level are part of the state that `ttt.Pool.export` returns, as ``"ttt.guard.progress"``.

    The guard keeps one copy of the state of every user in a slot. While strengths differ from 1, slots are compressed
    by calls from Python, one for each distinct strength, which is slower than the single call without guards.

    Args:
        model: adapted with ``TTTConfig(per_user=...)``; a causal language model of Hugging Face transformers.
        batches: held-back inputs, each (B, T) int64 tokens that the model knows, T >= 2. A check costs a forward pass
            on them.
        threshold: drift at which the strength stays the same.
        bound: drift above which the weights are rolled back. Default: 1.5 ``threshold``.
        every: number of tokens that a user learns between two checks; None to check where `check` is called only.
        strengthen: base of the power by which a check multiplies the strength.
        cap: largest strength.
        surprise: steps are made smaller at losses above ``surprise`` times the running level. Infinity: never.

    Raises:
        ValueError: for a value out of range, or if the model has guards or users in slots already.

    Attributes:
        history: list of the newest `UserGuardCheck`, at most 10,000, of the users who have a slot.
        reference: nats per token of the base model on the held-back inputs.
    """

    prefix = GUARDS

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor],
        *,
        threshold: float = 0.01,
        bound: float | None = None,
        every: int | None = 2048,
        strengthen: float = 4.0,
        cap: float = 256.0,
        surprise: float = 2.5,
    ) -> None:
        super().__init__(threshold, bound, every, strengthen, cap, surprise)
        self.model, self.pool = model, pool_of(model)
        self.batches = list(check_type("batches", batches, Iterable, "a list of (B, T) int64 tokens"))
        if not self.batches:
            raise ValueError("batches must hold at least one batch of tokens, got none")
        for ids in self.batches:
            if check_token_ids("each of batches", ids, model).shape[1] < 2:
                raise ValueError(f"each of batches must have at least 2 tokens a row, got {tuple(ids.shape)}")
        if self.pool.companion is not None:
            raise ValueError("model has guards for its users already")
        if self.pool.users:
            raise ValueError(f"guards must be made before users learn: {list(self.pool.users)} have slots already")
        config = self.pool.config
        self._scales_steps = config.ewc_lambda == 0 and config.replay_rows == 0
        self.history: list[UserGuardCheck] = []
        self._users: dict[str, _Guarded] = {}
        self.reference, self._measured = self._loss(None), self._bases()
        self.pool.companion = self

    def close(self) -> None:
        """Stop guarding: users go on learning with the configured protection."""
        for user in list(self._users):
            self.forget(user)
        self.pool.companion = None

    def strength(self, user: str) -> float:
        """The strength of the protection of a user who has a slot.

        Raises:
            KeyError: if ``user`` has none.
        """
        self.pool.slot(user)
        return self._users[user].strength

    def drift(self, user: str | None) -> float:
        """Loss on the held-back inputs with the weights of ``user`` (None: the base model's) / reference - 1."""
        self._renew_reference()
        return self._loss(user) / self.reference - 1

    # -- called while learning --------------------------------------------------------------------------------

    def pace(self, slots: Tensor, nll: Tensor, targets: Tensor, bad: Tensor) -> Tensor:
        """Return (S,), the factor for each slot's steps on a chunk, and count the tokens that each user learns from it.

        Args:
            slots: (B,) int32, the slot of each sequence; -1 for none.
            nll: (B, L), nats.
            targets: (B, L) bool, the tokens that teach.
            bad: (S,) bool, the slots that do not learn from this chunk.
        """
        factors, is_bad = [1.0] * len(bad), bad.tolist()
        for guarded in self._users.values():
            own = targets & (slots == guarded.slot).unsqueeze(1)
            tokens = int(own.sum())
            if not tokens or is_bad[guarded.slot]:
                continue
            loss = float(nll[own].sum(dtype=torch.float64)) / tokens
            rate, guarded.level = pace(loss, tokens, guarded.level, self.surprise)
            factors[guarded.slot] = rate / (guarded.strength if self._scales_steps else 1.0)
            guarded.tokens += tokens
            guarded.since += tokens
        return torch.tensor(factors, dtype=next(iter(self.pool.layers.values())).eta_sum.dtype, device=nll.device)

    def remember(self) -> Callable[[], None]:
        """Return a function that undoes later calls of `pace`: it sets every user's numbers to their present values."""
        kept = [(guarded, {name: getattr(guarded, name) for name in _PROGRESS}) for guarded in self._users.values()]

        def put_back() -> None:
            for guarded, progress in kept:
                for name, value in progress.items():
                    setattr(guarded, name, value)

        return put_back

    def check_due(self) -> list[str]:
        """Check each user who has learnt ``every`` tokens since the last check; return those who were rolled back."""
        due = [user for user, guarded in self._users.items() if self._is_due(guarded.since)]
        return [user for user in due if self.check(user).rolled_back]

    def check(self, user: str) -> UserGuardCheck:
        """Measure a user's drift now, set the strength, and roll the user back if the drift is above ``bound``.

        Raises:
            KeyError: if ``user`` has no slot.
        """
        return finish(self.check_in_steps(user))

    def check_in_steps(self, user: str) -> Generator[None, None, UserGuardCheck]:
        """`check`, in steps of one batch: between them the model may be used for something else.

        The user's weights must not be changed in between.
        """
        self._renew_reference()
        loss = yield from self._loss_in_steps(user)
        return self.settle(user, loss / self.reference - 1)

    def require_within(self, user: str) -> float:
        """The drift with the weights that are in effect now, which a study has not written yet.

        Raises:
            GuardTripped: if it is above ``bound``. Nothing has changed then.
            KeyError: if ``user`` has no slot.
        """
        return self._within(self.drift(user))

    def settle(self, user: str, drift: float) -> UserGuardCheck:
        """`check`, with a ``drift`` that was measured before."""
        guarded = self._users[user]
        strength, past = self._next_strength(guarded.strength, drift)
        self._set(guarded, strength)
        if past:
            self.pool.restore_learnt(user, self._good(user))
        elif drift <= self.threshold:
            self._keep(user)
        guarded.since = 0
        self.history.append(UserGuardCheck(user, guarded.tokens, drift, guarded.strength, past))
        del self.history[:-MOST_CHECKS]
        return self.history[-1]

    def logged(self, user: str) -> None:
        """Take the log into the last good state, if that has all that ``user`` has learnt: a check may come before."""
        guarded = self._users[user]
        if guarded.good_at == guarded.tokens:
            guarded.good |= self.pool.copy_log(user)
            guarded.era = self._era(user)

    # -- called by the pool -----------------------------------------------------------------------------------

    def before_evict(self, user: str) -> None:
        """Check a user who has learnt since the last check, so that the state that is kept is within the bound."""
        if self._users[user].since:
            self.check(user)

    def export(self, user: str) -> State:
        """Return ``progress``, (4,) float64: strength, level, tokens learnt, and tokens learnt since the last check."""
        guarded = self._users[user]
        return {"progress": torch.tensor([getattr(guarded, name) for name in _PROGRESS], dtype=torch.float64)}

    def check_state(self, state: State) -> list[float] | None:
        """The numbers of ``progress``, or None for a state without it.

        Raises:
            ValueError, TypeError: if they are not ones that `export` can return.
        """
        if not state:
            return None
        if set(state) != {"progress"}:
            raise ValueError(f"{self.prefix} needs the tensor 'progress', got {sorted(state)}")
        value = state["progress"]
        if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.shape != (4,):
            kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self.prefix}.progress must be torch.float64 of shape (4,), got {kind}")
        strength, level, tokens, since = numbers = value.tolist()
        whole = tokens.is_integer() and since.is_integer()
        if not (1 <= strength < float("inf") and 0 < level < float("inf") and whole and 0 <= since <= tokens):
            raise ValueError(f"{self.prefix}.progress must be strength >= 1, level > 0 and two counts, got {numbers}")
        return numbers

    def load(self, user: str, state: State) -> None:
        """Start to guard ``user``, who has just got a slot.

        The user's present state becomes the last good one, to which a check may roll back. If its last tokens were
        never checked and its drift is above ``bound``, the last good state is that of a new user instead.
        """
        numbers, slot = self.check_state(state), self.pool.slot(user)
        strength, level, tokens, since = numbers or (self.strengthen**1.5, self.reference, 0, 0)
        guarded = _Guarded(slot, 1.0, level, int(tokens), int(since), {})
        self._users[user] = guarded
        self._set(guarded, strength)
        self._keep(user)
        learnt = any(int(layer.rows[slot]) for layer in self.pool.layers.values())
        if learnt and (numbers is None or since) and not self.drift(user) <= self.bound:
            guarded.good_at = -1
            guarded.good = {
                f"{name}.{key}": t[:0] if key in PER_ROW else torch.zeros_like(t)
                for name, layer in self.pool.layers.items()
                for key, t in layer.slot_state(slot).items()
            }

    def forget(self, user: str) -> None:
        """Drop everything kept for ``user``."""
        guarded = self._users.pop(user, None)
        if guarded is not None:
            for layer in self.pool.layers.values():
                layer.strengths.pop(guarded.slot, None)
            self.history = [check for check in self.history if check.user != user]

    # -- inner ------------------------------------------------------------------------------------------------

    def _keep(self, user: str) -> None:
        """Make the present state of ``user`` the good one."""
        guarded = self._users[user]
        guarded.good, guarded.good_at = self.pool.copy_learnt(user), guarded.tokens
        guarded.era = self._era(user)

    def _era(self, user: str) -> object:
        return None if self.pool.episodes is None else self.pool.episodes.era(user)

    def _good(self, user: str) -> State:
        """The good state of ``user``, without a log that was forgotten since."""
        guarded, log = self._users[user], self.pool.episodes
        if log is None or self._era(user) is guarded.era:
            return guarded.good
        return {name: t for name, t in guarded.good.items() if not name.startswith(f"{log.prefix}.")}

    def _set(self, guarded: _Guarded, strength: float) -> None:
        guarded.strength = clipped(strength, self.cap)
        for layer in self.pool.layers.values():
            if guarded.strength == 1.0:
                layer.strengths.pop(guarded.slot, None)
            else:
                layer.strengths[guarded.slot] = guarded.strength

    def _bases(self) -> int:
        """How often other base weights were put into the layers."""
        return sum(layer.rebases for layer in self.pool.layers.values())

    def _renew_reference(self) -> None:
        """Measure the reference anew if the model was given other base weights, as by `load_state_dict`."""
        if (found := self._bases()) != self._measured:
            self.reference, self._measured = self._loss(None), found

    def _loss(self, user: str | None) -> float:
        """Mean nats per token on the held-back inputs, with the weights of ``user``; None: of the base model."""
        return finish(self._loss_in_steps(user))

    def _loss_in_steps(self, user: str | None) -> Generator[None, None, float]:
        total, count = 0.0, 0
        for at, ids in enumerate(self.batches):
            if at:
                yield
            with torch.no_grad(), self.pool.reading(user, len(ids)):
                logits = self.model(input_ids=ids).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
        return total / count
