"""`Guard`: holds what a learning model forgets within a bound, by watching it on inputs it is known to know."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ttt.checks import check_number, check_whole
from ttt.nn import Linear, Update
from ttt.nn.state import BASE
from ttt.nn.state_access import standing_in

_LEVEL_TOKENS = 65536  # time constant of the running level of surprise
_RISE, _FALL = 1 / 2, 1 / 16  # largest steps of the strength's exponent: protection is raised soon and lowered late


@dataclasses.dataclass(frozen=True)
class Check:
    """One look at the held-back inputs.

    Attributes:
        tokens: rows learnt since the guard was attached.
        drift: loss on the held-back inputs over that of the frozen model, minus 1; before any rollback.
        strength: of the protection from here on; 1 is the configured one.
        rolled_back: whether the state went back to the last good one.
    """

    tokens: int
    drift: float
    strength: float
    rolled_back: bool


class Guard:
    """Watches the loss on a few inputs that the model knows, and acts when learning raises it::

        guard = ttt.Guard([held_back_ids])
        learner = ttt.Learner(model, guard=guard)

    Every ``every`` learnt tokens, drift = loss / loss of the frozen model - 1 is measured, and the strength s of the
    protection follows it, so that it settles where the drift is ``threshold``::

        s <- min(cap, max(1, s strengthen^e))        e = min(1/2, max(-1/16, drift / threshold - 1))

    If the drift is past ``bound``, e = 1/2 and the state goes back to the last one that was within the threshold, to
    the bit. At strength s the layers learn with ``ewc_lambda`` s and ``replay_beta`` min(s beta, 1) (never below the
    configured one; 1 is the full projection, far from where it is unstable). At equal drift that keeps more of what is
    new than smaller steps do; only where the configuration has no protection, ``lr`` / s takes its place. s begins at
    ``strengthen``^(3/2): most is forgotten in the first tokens of new text.

    **Surprise gate.** A chunk of mean loss l teaches at the rate min(1, (surprise L / l)^4), where L is the running
    level of the loss: it begins at the frozen model's on the held-back inputs and follows, over 65,536 tokens,
    min(l, surprise L). What can be learnt soon falls below the gate; noise does not.

    The guard never learns from its inputs, and checking them changes no bit of the state. It holds one copy of what
    learning writes (weight, trace, window, recent inputs).

    The reference is the model as it was anchored when the guard was attached, for good: `Learner.consolidate` checks
    first, so that nothing past the bound is consolidated, and does not move it, or drift would add up from one
    consolidation to the next.

    Args:
        batches: of (B, T) int64 tokens that the model knows, T >= 2. About 2,000 tokens in all are enough; a check
            costs a forward pass on them.
        threshold: drift at which the strength stays as it is.
        bound: drift past which the state goes back. Default: 1.5 ``threshold``.
        every: learnt tokens from check to check.
        strengthen: base of the strength's changes.
        cap: largest strength.
        surprise: of the gate; infinity for no gate.

    Raises:
        ValueError: for a value out of range.

    Attributes:
        history: list of `Check`.
        strength: s, at present.
        rollbacks: how often the state went back.
        reference: nats per token of the frozen model on the held-back inputs.
    """

    def __init__(
        self,
        batches: Iterable[Tensor],
        *,
        threshold: float = 0.01,
        bound: float | None = None,
        every: int = 2048,
        strengthen: float = 4.0,
        cap: float = 256.0,
        surprise: float = 2.5,
    ) -> None:
        self.threshold = check_number("threshold", threshold, 0.0, above=True)
        self.bound = check_number("bound", 1.5 * threshold if bound is None else bound, threshold)
        self.every = check_whole("every", every, 1)
        self.strengthen = check_number("strengthen", strengthen, 1.0, above=True)
        self.cap = check_number("cap", cap, 1.0)
        self.surprise = check_number("surprise", surprise, 1.0, above=True)
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches must hold at least one batch of tokens, got none")
        self.history: list[Check] = []
        self.strength, self.rollbacks, self.tokens = 1.0, 0, 0
        self.reference = self._level = math.nan
        self._since = 0  # tokens learnt since the last check
        self._learner: Any = None
        self._good: list[dict[str, Tensor]] = []
        self._step = False  # whether the strength acts on the step, for want of protection

    def attach(self, learner: Any) -> None:
        """Measure the reference under ``learner``'s anchor; `Learner` calls it.

        Raises:
            TypeError, ValueError: if a batch is none for its model, or the guard watches a learner already.
        """
        if self._learner is not None:
            raise ValueError("guard watches another learner already; make one Guard for each")
        for ids in self.batches:
            learner._checked(ids, None, None)
            if not 2 <= ids.shape[1] <= learner.context:
                raise ValueError(f"batches must have 2 to {learner.context} tokens a row, got {tuple(ids.shape)}")
        self._learner = learner
        with standing_in(learner.layers, [None] * len(learner.layers)):
            self.reference = self.loss()
            self._good = self._copy()  # should the model be past the bound already
        config = learner.config
        self._step = config.ewc_lambda == 0 and config.replay_rows == 0
        self.restart()

    @torch.no_grad()
    def loss(self) -> float:
        """Mean nats per token on the held-back inputs, at present."""
        total, count = 0.0, 0
        for ids in self.batches:
            logits = self._learner.model(input_ids=ids).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
        return total / count

    # -- called by Learner ------------------------------------------------------------------------------------

    def pace(self, updates: list[tuple[Linear, Update]], nll: Tensor) -> None:
        """Scale the steps of ``updates``, from one chunk with losses ``nll``, and count its tokens."""
        tokens = nll.numel()
        surprise = float(nll.sum(dtype=torch.float64)) / max(tokens, 1)
        limit = self.surprise * self._level
        rate = 1.0 if surprise <= limit else (limit / surprise) ** 4
        rate /= self.strength if self._step else 1.0
        self._level += min(1.0, tokens / _LEVEL_TOKENS) * (min(surprise, limit) - self._level)
        if rate < 1.0:
            for _, update in updates:
                update.eta.mul_(rate)
        self.tokens += tokens
        self._since += tokens

    def check_if_due(self) -> None:
        """`check` if ``every`` tokens were learnt since the last one."""
        if self._since >= self.every:
            self.check()

    def check(self) -> None:
        """Measure the drift now, and do what it calls for."""
        drift = self.loss() / self.reference - 1
        past = not drift <= self.bound  # NaN is past it
        exponent = _RISE if past else max(-_FALL, min(_RISE, drift / self.threshold - 1))
        self._set(self.strength * self.strengthen**exponent)
        if past:
            self._restore(self._good)
            self.rollbacks += 1
        elif drift <= self.threshold:
            self._good = self._copy()
        self._since = 0
        self.history.append(Check(self.tokens, drift, self.strength, past))

    def restart(self) -> None:
        """What was learnt is forgotten: strength and level are as at the beginning."""
        self._set(self.strengthen**1.5)
        self._level = self.reference
        self.resume()

    def resume(self) -> None:
        """The state was replaced from outside: it is the last good one if it is within the bound."""
        if self.loss() / self.reference - 1 <= self.bound:
            self._good = self._copy()
        self._since = 0

    def _set(self, strength: float) -> None:
        self.strength = min(self.cap, max(1.0, strength))
        for layer in self._learner.layers:
            layer.strength = self.strength

    # -- state ------------------------------------------------------------------------------------------------

    def _copy(self) -> list[dict[str, Tensor]]:
        """What learning writes, of every layer."""
        kept = [{k: t for k, t in layer.state().items() if k not in BASE} for layer in self._learner.layers]
        return [{name: t.clone() for name, t in state.items()} for state in kept]

    def _restore(self, states: list[dict[str, Tensor]]) -> None:
        for layer, state in zip(self._learner.layers, states, strict=True):
            layer.load_state(state)
