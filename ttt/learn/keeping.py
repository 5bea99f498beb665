"""`Keeping`: the methods of a `ttt.Learner` that protect what was learnt, go back, and forget."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ttt.atomic import whole_write
from ttt.checks import check_type
from ttt.learn import protection
from ttt.learn.own_text import own_text
from ttt.learn.prepared import Prepared
from ttt.learn.snapshot import Snapshot, check_snapshot, put_back, take_snapshot
from ttt.learn.text import check_tokens
from ttt.nn.parallel import together
from ttt.per_user.protection import calibrate as calibrate_users
from ttt.signals import SignalsDeferred

_END: Any = object()

# What reads through a learner and needs its anchor in place; not in the learner, which can be copied and pickled.
_READERS: weakref.WeakKeyDictionary[Keeping, weakref.ref[Any]] = weakref.WeakKeyDictionary()


class Keeping(Prepared):
    """The part of `ttt.Learner` that protects what the model knows or has learnt, and takes back what it has learnt."""

    # -- protect --------------------------------------------------------------------------------------------------

    def calibrate(
        self,
        batches: Iterable[Tensor] | None = None,
        loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        """Measure what must not be forgotten, on data that the model knows or on text that it writes itself.

        Measured is what the defences of ``config.protect`` need: the factors of the Fisher information
        (`ttt.KroneckerFisher`); the importance of each weight, which is the per-token Fisher information (MAS for
        ``importance="mas"``; SI has no offline form, so Fisher too) divided by its mean over all adapted weights; and
        samples of the layers' inputs for the replay memories. The scale of the gradients sets the unit of ``lr``.

        Args:
            batches: of (B, T) int64 tokens; or of anything, with ``loss``. None: 16 sequences of 256 tokens that the
                model writes (`ttt.learn.own_text`), which takes as long as generating 256 tokens in a batch of 16.
            loss: called with (model, batch), returns the summed loss, whose per-token gradients are squared: for models
                that are not causal language models. Default: ``config.fisher``, labels drawn from the model's own
                output ("true") or those of the text ("empirical").
            tokenizer: the model's, for ``batches=None``: the model writes answers in its own chat template. None: it
                writes from the token that begins a text.

        Warns:
            SmallTextWarning: if text has few different pairs of neighbouring tokens for the directions of
                `ttt.KroneckerFisher`: such moments hold for little else, and updates may overshoot.

        Raises:
            TypeError, ValueError: if the model has learnt already, there is no batch, or an argument, a batch or what
                ``loss`` returns is of a wrong type. Nothing has changed then.
            FloatingPointError: if the model's output is not finite; it names the parameter that is not. Nothing has
                changed then.
            RuntimeError: as `observe`.
        """
        with contextlib.ExitStack() as held:
            with self.access.checks("Learner.calibrate", held):
                if batches is not None or loss is not None:
                    check_type("batches", batches, Iterable, "an iterable of batches")
                if loss is not None and not callable(loss):
                    raise TypeError(f"loss must be a function of (model, batch) or None, got {type(loss).__name__}")
                drawn = None if batches is None else iter(batches)
            self.access.require_same("whether batches and loss are given", drawn is None, loss is None)
            if drawn is None:
                drawn = iter(own_text(self.model, tokenizer, context=self.context, seed=self.config.seed))
            kind = "mas" if self.config.importance == "mas" else "fisher"
            pairs = protection.Pairs()
            if loss is None:
                texts = pairs.counted(self._drawn_together(drawn, "each of batches"))
                losses = protection.calibration_losses(self.model, texts, self.config, kind)
            else:
                losses = (loss(self.model, batch) for batch in self._drawn_together(drawn))
            if self.pool is None:
                protection.calibrate(self.layers, losses, kind)
            elif self.pool.users:
                raise ValueError(f"calibrate before learning: users {list(self.pool.users)} have slots already")
            else:
                calibrate_users(list(self.pool.layers.values()), losses, kind)
            self.own_texts = None
        if loss is None:
            pairs.warn_if_few(self.config)

    def consolidate(self) -> None:
        """Protect what was learnt so far, as in online EWC; call it at the end of a task, if there are tasks:

            Omega <- gamma_c Omega + F / tokens       (SI: Omega + relu(F / ((W - W*)^2 + xi)))
            W* <- W;  F <- 0

        in units of the first calibration's mean importance. The sample of recent inputs joins the replay memory.

        Raises:
            RuntimeError: while a `ttt.GrowingLearner` reads through this learner: its columns are relative to the
                anchor.
        """
        self.require_single("consolidate", "the anchor is shared by all users")
        with self.access.enter_together("Learner.consolidate"):
            if (reader := self.reader) is not None:
                raise RuntimeError(
                    f"Learner.consolidate would move the anchor, and the columns of a {type(reader).__name__} that "
                    "reads through this learner are relative to it; delete that one first"
                )
            if self.guard is not None:
                self.guard.check()
            with whole_write(self.layers, "Learner.consolidate"):
                protection.consolidate(self.layers)
            for rule in self.rules:
                rule.consolidated()
            if self.guard is not None:
                self.guard.resume()

    @property
    def reader(self) -> Any:
        """What reads through this learner and needs its anchor in place (`read_through`); None for nothing."""
        found = _READERS.get(self)
        return None if found is None else found()

    def read_through(self, reader: Any) -> None:
        """Let ``reader`` read through this learner: for as long as it lives, `consolidate` is refused.

        Raises:
            ValueError: if another one does.
        """
        if (other := self.reader) is not None:
            raise ValueError(
                f"learner serves a {type(other).__name__} already, and two would change each other's active column; "
                "delete that one first, or make another learner of a model of its own"
            )
        _READERS[self] = weakref.ref(reader)

    # -- go back --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A copy of all learning state, that of the rules and the log of episodes included, for `rollback`."""
        self.require_single("snapshot", "pool.export(user)")
        with self.access.enter_together("Learner.snapshot"):
            return take_snapshot(self.layers, self.rules, self.episodes)

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot exactly.

        Raises:
            TypeError: if ``snapshot`` is none.
            ValueError: if it comes from a model with other layers, or a learner with other rules.
        """
        self.require_single("rollback", "pool.load(user, state)")
        with contextlib.ExitStack() as held:
            with self.access.checks("Learner.rollback", held, repairs=True):
                check_snapshot(snapshot, self.layers, self.rules)
            put_back(snapshot, self.layers, self.rules, self.episodes)
            if self.guard is not None:
                self.guard.resume()

    def reset(self) -> None:
        """Forget everything learnt since calibration; the weights are exactly the base model's. Rules forget, too."""
        with self.access.enter_together("Learner.reset", repairs=True):
            if self.pool is not None:
                with SignalsDeferred():
                    self.pool.forget_all()
                for each in self.pool.layers.values():
                    each.torn = ""
            with whole_write(self.layers, "Learner.reset"):
                for layer in self.layers:
                    layer.reset()
                    layer.loads += 1
            for rule in self.rules:
                rule.reset()
            if self.episodes is not None:
                self.episodes.forget(None)
            if self.guard is not None:
                self.guard.restart()

    def flush(self) -> None:
        """Write every layer's window into its weights, as before ``save_pretrained``."""
        with self.access.enter_together("Learner.flush"), whole_write(self.layers, "Learner.flush"):
            for layer in self.layers:
                layer.flush()

    def _drawn_together(self, drawn: Iterator[Any], tokens: str = "") -> Iterator[Any]:
        """The batches that are ``drawn``, of which all processes of a sharded model must have as many.

        An error in one of them is an error in all. If the batches are ``tokens``, which names them, they are checked
        and must be the same in all.
        """
        while True:
            with together(self.access.processes, "Learner.calibrate"):
                batch = next(drawn, _END)
                if tokens and batch is not _END:
                    check_tokens(self.model, batch, name=tokens)
            self.access.require_same("the number of batches", batch is _END)
            if batch is _END:
                return
            if tokens:
                self.access.require_same(tokens, batch)
            yield batch
