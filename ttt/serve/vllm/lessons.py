"""Learning from a captured prompt, in pieces: between two of them, the model may serve others."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from ttt.conversation import Telling
from ttt.learn.head import Scores, input_gradient, score
from ttt.learn.learner import Learner
from ttt.learn.per_user import LayerUpdate, PerUserWeights
from ttt.learn.text import Text
from ttt.ops.dtypes import accumulation
from ttt.serve.vllm.blocks import Inner, Rotation, TopBlocks

CONTEXT = 4
"""How many times as many tokens of context are read at a time as are learnt: each takes about a quarter of the time."""
SCORED = 64
"""Tokens that the head scores in one piece: for each it computes as much as eight blocks of a small model do."""
Pieces = Generator[None, None, None]


@dataclasses.dataclass
class Learnt:
    """What a lesson did.

    Attributes:
        tokens: that were learnt.
        nll: their mean loss in nats, before they were learnt; without the first one, which nothing here predicts;
            None if there is no other.
        passes: how often they were read.
        slices: how often it was taken on, between which others were served.
        milliseconds: of computing, without what other requests computed in between.
        longest: milliseconds of the longest slice.
    """

    tokens: int = 0
    nll: float | None = None
    passes: int = 1
    slices: int = 0
    milliseconds: float = 0.0
    longest: float = 0.0


def learn_in_slices(
    learner: Learner, blocks: TopBlocks, user: str, hidden: Tensor, ids: list[int], learn: list[bool], chunk: int,
    telling: Telling, budget: Callable[[], float],
) -> Generator[None, None, Learnt]:  # fmt: skip
    """Let ``user``, who has a slot and keeps it, learn from a prompt.

    What is learnt does not depend on where the lesson pauses.

    Args:
        learner: of the top blocks (`ttt.serve.vllm.top_blocks`), with weights for each user.
        blocks: the same blocks.
        hidden: (1, T, d), the input of the top blocks.
        ids: the T tokens.
        learn: which of them teach. Never the first.
        chunk: tokens that are learnt together, each of them scored before.
        telling: how the tokens are read.
        budget: called before each slice; after so many milliseconds the slice ends, with the piece that is going on:
            one block forward or backward, the scores of `SCORED` tokens, or writing what the layers learn.

    Yields:
        After every slice but the last; until the next one, the model may serve others.

    Raises:
        FloatingPointError: if a loss or gradient is not finite. What earlier chunks taught has been learnt.
    """
    found = Learnt(tokens=sum(learn), passes=telling.passes)
    with torch.inference_mode(False):
        lesson = _Lesson(learner, blocks, user, hidden[0], ids, learn, telling.emphasis)
    pieces = lesson.pieces(chunk, telling.passes)
    over = False
    while True:
        began, limit = time.perf_counter(), budget()
        with _using(learner, user) as slots:
            lesson.check_slots(slots)
            over = next(pieces, _OVER) is _OVER
            while not over and 1e3 * (time.perf_counter() - began) < limit:
                over = next(pieces, _OVER) is _OVER
        spent = 1e3 * (time.perf_counter() - began)
        found.slices += 1
        found.milliseconds += spent
        found.longest = max(found.longest, spent)
        if over:
            break
        yield
    found.nll = lesson.mean
    return found


_OVER = object()


class _Lesson:
    """One sequence of one user. The arguments are those of `learn_in_slices`."""

    def __init__(
        self, learner: Learner, blocks: TopBlocks, user: str, hidden: Tensor, ids: list[int], learn: list[bool],
        emphasis: float,
    ) -> None:  # fmt: skip
        assert learner.pool is not None
        self.blocks, self.user, self.hidden, self.taught = blocks, user, hidden, learn
        self.mass = learner.config.head_mass
        device = hidden.device
        self.text = Text.of(torch.tensor([ids], device=device), teach=torch.tensor([learn], device=device))
        self.text = dataclasses.replace(self.text, emphasis=emphasis)
        slots = torch.tensor([learner.pool.slot(user)], dtype=torch.int32, device=device)
        self.strategy = PerUserWeights(learner, learner.pool, self.text, [user], slots, True)
        self._memory = [block.memory(len(ids)) for block in blocks.blocks]
        self._lowest: dict[int, Inner] = {}  # by the place of a chunk: the same in each pass
        # Memory that is used again costs less than memory that the system has to hand out for each part.
        self._logits = blocks.head.new_empty((min(SCORED, len(ids)), len(blocks.head)))
        self._wide = self._logits.new_empty(self._logits.shape, dtype=accumulation(self._logits.dtype))
        self._nll, self._scored = 0.0, 0

    @property
    def mean(self) -> float | None:
        """The mean loss of the tokens that teach in the first pass."""
        return self._nll / self._scored if self._scored else None

    def check_slots(self, slots: Tensor) -> None:
        """Raise RuntimeError unless ``slots`` (1,) are the user's, as they were at the beginning."""
        if not torch.equal(slots, self.strategy.slots):
            raise RuntimeError("the user was given another slot between two slices of a lesson")

    def pieces(self, chunk: int, passes: int) -> Pieces:
        """Read the text so often; after each piece it yields."""
        # The first token that teaches is predicted, and so learnt, at the one before it.
        first, end = self.taught.index(True) - 1, len(self.taught) - 1
        for number in range(passes):
            for begin in range(0, first, CONTEXT * chunk):
                yield from self._read(begin, min(begin + CONTEXT * chunk, first))
            for begin in range(first, end, chunk):
                yield from self._learn(begin, min(begin + chunk, end), count=number == 0)

    def _read(self, begin: int, end: int) -> Pieces:
        """Compute the keys and values of context."""
        x, rotation, (*blocks, last) = self.hidden[begin:end], self.blocks.rotation(begin, end), self.blocks.blocks
        for index, block in enumerate(blocks):
            x = block.outer(self._inner(index, x, begin, rotation, keep=False))
            yield
        last.remember(x, begin, rotation, self._memory[-1])
        yield

    def _inner(self, index: int, x: Tensor, begin: int, rotation: Rotation, *, keep: bool) -> Inner:
        """`Block.inner` of the block of this index; of the lowest one it is computed in the first pass only."""
        found = self._lowest.get(begin) if index == 0 else None
        if found is None:
            found = self.blocks.blocks[index].inner(x, begin, rotation, self._memory[index], keep=keep)
        if index == 0:
            self._lowest[begin] = found
        return found

    def _score(self, normed: Tensor, part: slice) -> Scores:
        """The scores of the tokens after those of ``part``, from what the head gets of these."""
        logits = torch.mm(normed, self.blocks.head.T, out=self._logits[: len(normed)])
        if logits.dtype != self._wide.dtype:
            logits = self._wide[: len(normed)].copy_(logits)
        return score(logits, self.text.ids[0, part.start + 1 : part.stop + 1])

    def _learn(self, begin: int, end: int, *, count: bool) -> Pieces:
        """Learn a chunk; ``count`` its loss."""
        columns, blocks, strategy = slice(begin, end), self.blocks.blocks, self.strategy
        x, rotation, inners = self.hidden[columns], self.blocks.rotation(begin, end), list[Inner]()
        for index, block in enumerate(blocks):
            inners.append(self._inner(index, x, begin, rotation, keep=index > 0))
            x = block.outer(inners[-1])
            yield
        normed, saved = self.blocks.norm.forward(x)
        nll, parts = list[Tensor](), list[Tensor]()
        for at in range(begin, end, SCORED):
            part = slice(at, min(at + SCORED, end))
            scores = self._score(normed[at - begin : part.stop - begin], part)
            assert self.text.wanted is not None
            wanted = self.text.wanted[0, part]
            if count:
                self._nll, self._scored = self._nll + float(scores.nll[wanted].sum()), self._scored + int(wanted.sum())
            nll.append(scores.nll)
            parts.append(input_gradient(scores, self.blocks.head, wanted, self.mass))
            yield
        if not strategy.learns:  # with steps of size 0 a user keeps no rows
            return
        gradient = self.blocks.norm.backward(saved, torch.cat(parts))
        users, updates = strategy.owners(columns)[0], list[LayerUpdate]()
        for block, inner in zip(reversed(blocks), reversed(inners), strict=True):
            updates.append(strategy.update(block.down, [(inner.active, gradient)], columns))
            if block is not blocks[0]:
                gradient = block.backward(inner, gradient, users)
            yield
        if strategy.learn(updates[::-1], columns, torch.cat(nll).unsqueeze(0)):
            raise FloatingPointError("a loss or gradient is not finite; the lesson was not learnt")
        yield


@contextlib.contextmanager
def _using(learner: Learner, user: str) -> Iterator[Tensor]:
    """Inside, the top blocks run for ``user``: the user's slot."""
    pool = learner.pool
    assert pool is not None
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        learner.access.enter("a lesson"),
        pool.using([user]) as slots,
    ):
        yield slots
