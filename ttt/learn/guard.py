"""`Guard`: keeps what a learning model forgets within a bound, by measuring its loss on inputs that it knows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ttt.atomic import whole_write
from ttt.checks import check_token_ids, check_type
from ttt.learn.stand_in import stand_in
from ttt.nn import Linear, Update
from ttt.nn.state import BASE
from ttt.per_user.pacing import MOST_CHECKS, GuardSettings, clipped, pace
from ttt.signals import SignalsDeferred


@dataclasses.dataclass(frozen=True)
class GuardCheck:
    """One measurement on the held-back inputs.

    Attributes:
        tokens: number of tokens learnt since the guard was attached.
        drift: loss on the held-back inputs divided by the frozen model's loss on them, minus 1; before any rollback.
        strength: the factor by which the configured protection is multiplied from then on.
        rolled_back: whether the layers were rolled back to their last good state.
    """

    tokens: int
    drift: float
    strength: float
    rolled_back: bool


class Guard(GuardSettings):
    """Measures the loss on a few inputs that the model knows, and acts when learning raises it:

        guard = ttt.Guard([held_back_ids])
        learner = ttt.Learner(model, guard=guard)

    **Drift and strength.** The guard holds some inputs back: the model never learns from them. After every ``every``
    learnt tokens it measures the drift, which is the loss on the held-back inputs divided by the frozen model's loss on
    them, minus 1. From the drift follows the strength s of the protection:

        s <- min(cap, max(1, s strengthen^e))        e = min(1/2, max(-1/16, drift / threshold - 1))

    So s rises while the drift is above ``threshold``, and falls slowly while it is below. If the drift is above
    ``bound``, e is 1/2, and the layers are rolled back: their state becomes that of the last check within the
    threshold, bit for bit, and so does the learner's log (`ttt.EpisodeLog`), which keeps what the layers have learnt.
    A study that would take the drift above ``bound`` is refused with `ttt.GuardTripped`.

    At strength s the penalty is s times the configured one, and so is the strength of replay, up to 1 (at 1 the drift
    on the replayed inputs is taken back in full; above 2 the step would diverge). If neither is configured, ``lr`` is
    divided by s instead. With protection the steps keep their size, because at equal drift the model then keeps more
    of what it learns. s begins at strengthen^(3/2), because most is forgotten in the first tokens of a new text.

    **Surprise gate.** The steps of a chunk with the mean loss l are multiplied by min(1, (surprise L / l)^4). L is a
    running level of the loss: it begins at the frozen model's loss on the held-back inputs and follows
    min(l, surprise L) with a time constant of 65,536 tokens. Text that can be learnt soon has a loss below
    surprise L. Noise stays above it, and so changes little.

    **Reference.** The drift refers to the loss of the model with the anchor's weights at the time when the guard was
    attached. This reference never changes, as otherwise the drift could grow by up to ``bound`` with every
    consolidation. `Learner.consolidate` begins with a check, so that no state beyond the bound is consolidated.

    **Another state.** After `ttt.load`, and after a rollback or a reset by another learner, the guard begins anew at
    the learner's next call: the state that was put in is the last good one; if its drift is above ``bound``, the state
    with its anchor's weights is. Strength and level are as in the beginning. After `load_state_dict`, which gives the
    model other base weights, the reference is measured anew, too. The strength is that of the methods of this learner;
    `ttt.learning` computes with that of the learner that was used last.

    The guard holds one copy of the tensors that learning writes (weight, trace, window, recent inputs), and of the log.

    Args:
        batches: held-back inputs, each (B, T) int64 tokens that the model knows, T >= 2. About 2,000 tokens in all are
            enough. A check costs a forward pass on them.
        threshold: drift at which the strength stays the same.
        bound: drift above which the layers are rolled back. Default: 1.5 ``threshold``.
        every: number of learnt tokens between two checks; None to check where `check` is called only.
        strengthen: base of the power by which a check multiplies the strength.
        cap: largest strength.
        surprise: the gate acts on losses above ``surprise`` times the running level. Infinity for no gate.

    Raises:
        TypeError, ValueError: if ``batches`` is no iterable or empty, or for a value out of range.

    Attributes:
        history: list of the newest `GuardCheck`, at most 10,000.
        strength: s, at present.
        rollbacks: number of times that the layers were rolled back.
        tokens: number of tokens learnt since the guard was attached.
        reference: nats per token of the frozen model on the held-back inputs.
    """

    def __init__(
        self,
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
        self.batches = list(check_type("batches", batches, Iterable, "a list of (B, T) int64 tokens"))
        if not self.batches:
            raise ValueError("batches must hold at least one batch of tokens, got none")
        self.history: list[GuardCheck] = []
        self.strength = 1.0
        self.rollbacks = 0
        self.tokens = 0
        self.reference = math.nan
        self._level = math.nan
        self._since = 0  # tokens learnt since the last check
        self._learner: Any = None
        self._good: list[dict[str, Tensor]] = []
        self._good_log: dict[str, Tensor] = {}
        self._good_era: object = None  # of the log
        self._good_at = 0  # value of tokens then
        self._seen = (0, 0)  # `_put_in` of the state that the guard watches
        self._slows = False  # whether the strength divides the rate, as there is no protection to strengthen

    def settings(self) -> dict[str, Any]:
        """The keyword arguments with which this guard was made."""
        names = ("threshold", "bound", "every", "strengthen", "cap", "surprise")
        return {name: getattr(self, name) for name in names}

    def given(self) -> list[Any]:
        """All that this guard was made with."""
        return [*self.batches, *self.settings().values()]

    def check_fits(self, model: nn.Module, context: int) -> None:
        """Raise TypeError or ValueError unless this guard can be attached to a learner of ``model`` with ``context``.

        It cannot if a batch does not suit the model, or if the guard watches another learner.
        """
        if self._learner is not None:
            raise ValueError("guard watches another learner already; make one Guard for each")
        for ids in self.batches:
            check_token_ids("each of batches", ids, model)
            if not 2 <= ids.shape[1] <= context:
                raise ValueError(f"batches must have 2 to {context} tokens a row, got {tuple(ids.shape)}")

    def attach(self, learner: Any) -> None:
        """Guard ``learner`` from now on, and measure the reference with its anchor's weights. `ttt.Learner` calls this.

        Raises:
            TypeError, ValueError: as `check_fits`.
        """
        self.check_fits(learner.model, learner.context)
        self._learner = learner
        try:
            self._begin(new_base=True)
        except BaseException:
            self._learner = None
            raise
        config = learner.config
        self._slows = config.ewc_lambda == 0 and config.replay_rows == 0
        self.restart()

    def _begin(self, *, new_base: bool) -> None:
        """Keep the state with the anchor's weights, in case the model is above the bound already.

        With ``new_base`` the loss with these weights becomes the reference.
        """
        layers = self._learner.layers
        with stand_in(layers, [None] * len(layers)):
            if new_base:
                self.reference = self.loss()
            self._keep()

    @torch.no_grad()
    def loss(self) -> float:
        """Mean nats per token on the held-back inputs, with the present weights."""
        total, count = 0.0, 0
        for ids in self.batches:
            logits = self._learner.model(input_ids=ids).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
        return total / count

    # -- called by Learner ------------------------------------------------------------------------------------

    def pace(self, updates: list[tuple[Linear, Update]], nll: Tensor) -> None:
        """Scale the steps of ``updates``, those of a chunk with losses ``nll`` (nats), and count its tokens."""
        tokens = nll.numel()
        loss = float(nll.sum(dtype=torch.float64)) / max(tokens, 1)
        rate, self._level = pace(loss, tokens, self._level, self.surprise)
        rate /= self.strength if self._slows else 1.0
        if rate < 1.0:
            for _, update in updates:
                update.eta.mul_(rate)
        self.tokens += tokens
        self._since += tokens

    def logged(self) -> None:
        """Take the log into the last good state, if that has all that was learnt: a check may come before the log."""
        if self._good_at == self.tokens:
            self._keep_log()

    def check_if_due(self) -> None:
        """Call `check` if at least ``every`` tokens were learnt since the last check."""
        if self._is_due(self._since):
            self.check()

    def check(self) -> None:
        """Measure the drift now, set the strength, and roll the layers back if the drift is above ``bound``.

        Raises:
            RuntimeError: as `ttt.Learner.observe`.
        """
        with self._learner.access.enter_together("Guard.check"):
            self.renew_if_replaced()
            self.settle(None, self.loss() / self.reference - 1)

    def require_within(self, user: None = None) -> float:
        """The drift with the weights that are in effect now, which a study has not written yet.

        Raises:
            GuardTripped: if it is above ``bound``. Nothing has changed then.
        """
        return self._within(self.loss() / self.reference - 1)

    def settle(self, user: None, drift: float) -> None:
        """`check`, with a ``drift`` that was measured before; the caller has entered the learner."""
        strength, beyond = self._next_strength(self.strength, drift)
        self._set(strength)
        if beyond:
            self._restore()
            self.rollbacks += 1
        elif drift <= self.threshold:
            self._keep()
        self._since = 0
        self.history.append(GuardCheck(self.tokens, drift, self.strength, beyond))
        del self.history[:-MOST_CHECKS]

    def restart(self) -> None:
        """Set strength and running level to their initial values. Called after the layers were reset."""
        self._set(self.strengthen**1.5)
        self._level = self.reference
        self.resume()

    def resume(self) -> None:
        """Keep the present state as the last good one if its drift is within ``bound``. Called after it was loaded."""
        if self.loss() / self.reference - 1 <= self.bound:
            self._keep()
        self._since = 0
        self._seen = self._put_in()

    def renew_if_replaced(self) -> None:
        """Begin anew, as after `attach`, if another state was put into the layers since, other than by this learner.

        The reference is measured anew only for other base weights. The caller has entered the learner.
        """
        found = self._put_in()
        if found == self._seen:
            return
        self._begin(new_base=found[1] != self._seen[1])
        self.restart()

    def _put_in(self) -> tuple[int, int]:
        """How often another state, and another base weight, were put into the layers."""
        layers = self._learner.layers
        return sum(layer.loads for layer in layers), sum(layer.rebases for layer in layers)

    def _set(self, strength: float) -> None:
        with SignalsDeferred():
            self.strength = clipped(strength, self.cap)
            for layer in self._learner.layers:
                layer.strength, layer.guarded = self.strength, True

    # -- state ------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Copy the tensors that learning writes, for every layer, and the log: the good state from now on."""
        learner = self._learner
        kept = [{k: t for k, t in layer.state().items() if k not in BASE} for layer in learner.layers]
        self._good = [{name: t.clone() for name, t in state.items()} for state in kept]
        self._keep_log()
        self._good_at = self.tokens

    def _keep_log(self) -> None:
        log = self._learner.episodes
        if log is not None:
            self._good_log, self._good_era = log.export(None), log.era(None)

    def _restore(self) -> None:
        learner = self._learner
        with whole_write(learner.layers, "Guard's rollback"):
            for layer, state in zip(learner.layers, self._good, strict=True):
                layer.load_state(state)
            if (log := learner.episodes) is not None:
                log.load(None, self._good_log if log.era(None) is self._good_era else {})
