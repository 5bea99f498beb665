"""Reading a text and learning from it, at once or in steps of one chunk: `ttt.Learner.observe` after its checks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch

from ttt.learn.huggingface import frozen
from ttt.learn.loop import ObserveOutput, read, read_in_steps
from ttt.learn.per_user import PerUserWeights
from ttt.learn.single import SingleWeights
from ttt.learn.text import Text

if TYPE_CHECKING:
    from ttt.learn.learner import Learner
    from ttt.per_user.pool import Pool


def observe(
    learner: Learner, text: Text, users: Sequence[str | None] | None, learn: bool, passes: int
) -> ObserveOutput:
    """Read ``text`` ``passes`` times; see `ttt.Learner.observe`. The caller has entered the learner."""
    config, pool = learner.config, learner.pool
    with frozen(learner.model), contextlib.ExitStack() as stack:
        strategy: SingleWeights | PerUserWeights
        if pool is not None and users is not None:
            slots = stack.enter_context(pool.using(users, learns=learn))
            strategy = PerUserWeights(learner, pool, text, users, slots, learn)
        else:
            strategy = SingleWeights(learner, text, learn)
        nll = read(text, strategy, config.chunk, learner.context)
        for _ in range(passes - 1):
            read(text, strategy, config.chunk, learner.context)
        output = strategy.output(nll)
        if learn:
            _log(learner, text, users, output)
        return output


def observe_in_steps(
    learner: Learner, pool: Pool, text: Text, users: Sequence[str | None], passes: int
) -> Generator[None, None, ObserveOutput]:
    """`observe`, which learns, in steps of one chunk; see `ttt.Learner.observe_in_steps`."""
    strategy = chunks = nll = None
    while True:
        with (
            learner.access.enter("Learner.observe_in_steps"),
            frozen(learner.model),
            pool.using(users, learns=True) as slots,
        ):
            if strategy is None:
                strategy = PerUserWeights(learner, pool, text, users, slots, True)
            if chunks is None:
                chunks = read_in_steps(text, strategy, learner.config.chunk, learner.context)
            if not torch.equal(slots, strategy.slots):
                raise RuntimeError("a user was given another slot between two steps of observe_in_steps")
            try:
                next(chunks)
            except StopIteration as done:
                nll, chunks, passes = done.value if nll is None else nll, None, passes - 1
                if not passes:
                    output = strategy.output(nll)
                    _log(learner, text, users, output)
                    return output
        yield


def _log(learner: Learner, text: Text, users: Sequence[str | None] | None, output: ObserveOutput) -> None:
    """Put what was learnt into the learner's log, if it has one, and let its guards know."""
    if learner.episodes is None:
        return
    learner.episodes.keep(text, users, output, learner.context)
    if learner.guard is not None:
        learner.guard.logged()
    elif learner.pool is not None and learner.pool.companion is not None:
        for user in {user for user in users or () if user is not None}:
            learner.pool.companion.logged(user)
