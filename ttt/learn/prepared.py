"""`Prepared`: what a `ttt.Learner` is made of, after all that it was given was checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ttt.adapt.sharding import processes_of
from ttt.checks import check_model, check_type, check_whole
from ttt.learn.access import Access
from ttt.learn.continues import refuse_unreadable, trials_for
from ttt.learn.data_parallel import refuse_other_replicas
from ttt.learn.episodes import EpisodeLog
from ttt.learn.guard import Guard
from ttt.learn.head import HeadSplit
from ttt.learn.step import differentiates_outputs
from ttt.learn.stream_rule import StreamRule, check_rules
from ttt.learn.text import Text
from ttt.nn.parallel import together
from ttt.per_user.guards import UserGuards


class Prepared:
    """The part of `ttt.Learner`, whose arguments and attributes it has, that makes it and says when it can be used."""

    def __init__(
        self,
        model: nn.Module,
        *,
        context: int | None = None,
        rules: Sequence[StreamRule] = (),
        guard: Guard | None = None,
        episodes: EpisodeLog | None = None,
        data_parallel: bool = False,
    ) -> None:
        with contextlib.ExitStack() as held:
            with together(processes_of(check_model(model), data_parallel is True), "ttt.Learner"):
                if guard is not None:
                    check_type("guard", guard, Guard, "a ttt.Guard or None")
                if episodes is not None:
                    check_type("episodes", episodes, EpisodeLog, "a ttt.EpisodeLog or None")
                if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                    raise ValueError(
                        f"model ({type(model).__name__}) has an encoder, which sees the tokens that the decoder is to "
                        "predict; ttt.Learner reads causal language models. ttt.learning(model) learns from a loss "
                        "with labels"
                    )
                self.access = Access(model, data_parallel)
                for name, given in (("rules", rules), ("episodes", episodes)):
                    if given:
                        self.access.refuse_several(f"ttt.Learner({name}=...)")
                self.pool, self.layers, self.config = self.access.pool, self.access.single_layers, self.access.config
                if context is None:
                    context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2048
                self.context = check_whole("context", context, 2)
                self.rules = check_rules(rules)
                if self.pool is not None and self.rules:
                    raise ValueError(
                        "rules must not be given for a model whose users have weights of their own: they serve one "
                        f"set of weights; got {[type(rule).__name__ for rule in self.rules]}"
                    )
                if episodes is not None and self.pool is not None and self.pool.episodes not in (None, episodes):
                    raise ValueError(
                        "episodes must be the log that the model's users have already, pool.episodes: what they said "
                        "is in it"
                    )
                if guard is not None and self.pool is None:
                    guard.check_fits(model, self.context)
                self.model: Any = held.enter_context(_put_in_eval_mode(model))
                mas = "importance 'mas' differentiates the logits" * differentiates_outputs(self.config)
                self.head = HeadSplit(model, mas)
                held.enter_context(self.access.enter("Learner", repairs=True))
            given = [] if guard is None else guard.given()
            self.access.require_same("context, guard and data_parallel", self.context, data_parallel, *given)
            if data_parallel:
                refuse_other_replicas(self.access.replicas, model, self.layers)
            self.guard: Guard | None = None
            self.user_guards: UserGuards | None = None
            self.episodes = episodes
            self.own_texts: Tensor | None = None  # what the base model wrote for rehearsal
            self._looked_for_protection = False
            self._tried: set[str] = set()
            with contextlib.ExitStack() as undo:
                for rule in self.rules:
                    undo.callback(setattr, rule, "learner", rule.learner)
                    rule.attach(self)
                if guard is not None and self.pool is not None:
                    self.user_guards = UserGuards(model, guard.batches, **guard.settings())
                elif guard is not None:
                    guard.attach(self)
                    self.guard = self.access.guard = guard
                if episodes is not None and self.pool is not None:
                    self.pool.episodes = episodes
                undo.pop_all()

    def _try_model(self, text: Text, learns: bool) -> None:
        """Raise ValueError, before ``text`` is read, if the model cannot read it, or learn from it, chunk by chunk."""
        chooses = learns and (self.pool is not None or text.wanted is not None)
        trials = trials_for(text, self.config.chunk, self.context, chooses)
        if self.access.joins:  # their forward passes may be those of all processes
            trials |= {name for name in ("padding", "rows") if self.access.anywhere(name in trials)}
        if not trials <= self._tried:
            refuse_unreadable(self.model, trials, self.config.chunk, self.context)
            self._tried |= trials

    def renew_guard(self) -> None:
        """Let the guard, if there is one, begin anew where the layers were given another state. Called before use."""
        if self.guard is not None:
            self.guard.renew_if_replaced()

    def require_single(self, what: str, instead: str) -> None:
        """Raise ValueError if users have weights of their own, where ``what`` needs one set.

        The message ends with ``instead``, which says what to do.
        """
        if self.pool is not None:
            raise ValueError(f"{what} is for one set of weights, but every user has their own: {instead}")


@contextlib.contextmanager
def _put_in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in eval mode, in which it stays; after an error its modules are in the modes that they were in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    except BaseException:
        for module, training in modes:
            module.training = training
        raise
