"""Learning from a captured prompt, a slice of its tokens at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ttt.conversation import Telling
from ttt.learn.huggingface import cache_of, cached, detached, frozen
from ttt.learn.learner import Learner
from ttt.learn.per_user import PerUserWeights
from ttt.learn.text import Segment, Span, Text

CONTEXT_SLICES = 4  # a token of context takes about a quarter of the time of one that is learnt


@dataclasses.dataclass
class Learnt:
    """What a lesson did.

    Attributes:
        tokens: that were learnt.
        nll: their mean loss in nats, before they were learnt; without the first one, which nothing here predicts;
            None if there is no other.
        passes: how often they were read.
        slices: how many there were, in all passes.
        milliseconds: of computing, without what other requests computed in between.
        longest: milliseconds of the longest slice.
    """

    tokens: int = 0
    nll: float | None = None
    passes: int = 1
    slices: int = 0
    milliseconds: float = 0.0
    longest: float = 0.0


class OneUser(PerUserWeights):
    """The strategy for one sequence of one user: words of little probability may be left out of the head's gradient.

    In a batch of several users they would be chosen for all of them together.
    """

    @property
    def head_mass(self) -> float:
        return self.learner.config.head_mass


def learn_in_slices(
    learner: Learner, user: str, hidden: Tensor, ids: list[int], learn: list[bool], size: int, telling: Telling
) -> Generator[None, None, Learnt]:
    """Let ``user``, who has a slot and keeps it, learn from a prompt.

    Args:
        learner: of the top blocks (`ttt.serve.vllm.top_blocks`), with weights for each user.
        hidden: (1, T, d), the input of the top blocks.
        ids: the T tokens.
        learn: which of them teach. Never the first.
        size: tokens of a slice.
        telling: how the tokens are read.

    Yields:
        After every slice but the last; until the next one, the model may serve others.

    Raises:
        FloatingPointError: if a loss or gradient is not finite. What earlier slices taught has been learnt.
    """
    found = Learnt(tokens=sum(learn), passes=telling.passes)
    text = Text.of(torch.tensor([ids]), teach=torch.tensor([learn]))
    text = dataclasses.replace(text, emphasis=telling.emphasis)
    segment = Segment.of(text, 0, len(ids))
    # The token before the first one that teaches would only score it: what is learnt are rows of tokens that teach.
    position, end = learn.index(True), len(ids) - 1
    cache: Any = None
    strategy: OneUser | None = None
    nll, scored = 0.0, 0
    plan = list(itertools.product(range(telling.passes), _slices(position, end, size)))
    for number, (begin, stop, teaches) in plan:
        began = time.perf_counter()
        if begin == 0:  # of each pass, which begins with context: the first token never teaches
            cache = strategy = None
        with _using(learner, user, hidden[:, begin:stop]) as slots:
            if not teaches:
                cache = _read(learner.model, segment.ids[:, begin:stop], cache)
            else:
                if strategy is None:
                    assert learner.pool is not None
                    strategy = OneUser(learner, learner.pool, text, [user], slots, True)
                    strategy.cache = cache
                if not torch.equal(slots, strategy.slots):
                    raise RuntimeError("the user was given another slot between two slices of a lesson")
                scores, _ = strategy.read(Span(segment, begin, stop))
                if strategy.rejected[user]:
                    raise FloatingPointError("a loss or gradient is not finite; the lesson was not learnt")
                if number == 0:
                    wanted = text.wanted[:, begin:stop]  # type: ignore[index]
                    nll, scored = nll + float(scores[wanted].sum()), scored + int(wanted.sum())
        spent = 1e3 * (time.perf_counter() - began)
        found.slices += 1
        found.milliseconds += spent
        found.longest = max(found.longest, spent)
        if found.slices < len(plan):
            yield
    found.nll = nll / scored if scored else None
    return found


def _slices(first: int, end: int, size: int) -> Generator[tuple[int, int, bool], None, None]:
    """(begin, stop, whether it teaches) of the context before ``first``, and of the tokens from there to ``end``."""
    for begin in range(0, first, CONTEXT_SLICES * size):
        yield begin, min(begin + CONTEXT_SLICES * size, first), False
    for begin in range(first, end, size):
        yield begin, min(begin + size, end), True


@contextlib.contextmanager
def _using(learner: Learner, user: str, hidden: Tensor) -> Iterator[Tensor]:
    """Inside, the top blocks run for ``user``, on tokens whose ``hidden`` states are given: the user's slot."""
    pool, given = learner.pool, learner.model.model.embed_tokens
    assert pool is not None
    with (
        torch.inference_mode(False),
        learner.access.enter("a lesson"),
        frozen(learner.model),
        pool.using([user]) as slots,
    ):
        given.rows = hidden
        try:
            yield slots
        finally:
            given.rows = None


@torch.no_grad()
def _read(model: Any, ids: Tensor, cache: Any) -> Any:
    """The cache after ``ids`` (1, T), which are context."""
    return detached(cache_of(model.model(input_ids=ids, **cached(model.model, cache))))
