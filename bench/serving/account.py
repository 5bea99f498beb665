"""Whether every turn that was acknowledged as learnt is in its user's final state, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import ttt
from bench.serving.talk import REFUSED, STORED, UNKNOWN, Attempt
from ttt.conversation import Telling
from ttt.serve.teaching import Teaching


@dataclasses.dataclass
class Account:
    """What became of the turns of all users.

    Attributes:
        users: who said something.
        acknowledged, refused, unanswered: numbers of attempts by outcome.
        learnt: attempts that the final states hold.
        lost: acknowledged attempts that they do not hold.
        repeated: attempts that a state holds more than once.
        foreign: texts in a user's state that this user did not say.
        despite_refusal: attempts in a state that a server had refused.
        out_of_order: users whose acknowledged turns are held in another order than they were said.
        miscounted: users whose version counts another number of updates than the state has turns.
        unanswered_learnt: of the attempts without an answer, how many were learnt.
        replayed: users whose turns were learnt again by a fresh learner.
        replay_differs: of these, users for whom any bit of any tensor differs.
        largest_difference: between a stored tensor and the replayed one.
    """

    users: int = 0
    acknowledged: int = 0
    refused: int = 0
    unanswered: int = 0
    learnt: int = 0
    lost: int = 0
    repeated: int = 0
    foreign: int = 0
    despite_refusal: int = 0
    out_of_order: int = 0
    miscounted: int = 0
    unanswered_learnt: int = 0
    replayed: int = 0
    replay_differs: int = 0
    largest_difference: float = 0.0

    @property
    def faults(self) -> dict[str, int]:
        """The counts that must be zero, where they are not."""
        names = ("lost", "repeated", "foreign", "despite_refusal", "out_of_order", "miscounted", "replay_differs")
        return {name: found for name in names if (found := getattr(self, name))}


def account_for(
    store: ttt.Store, attempts: dict[str, Sequence[Attempt]], learner: ttt.Learner, tokenizer: Any, context: int
) -> Account:
    """Compare each user's newest version with what the user said.

    The state's log of episodes tells which attempts were learnt, in order. ``learner``, built as the servers build
    theirs, then learns the same turns of each user alone by `ttt.Learner.observe`, and all tensors are compared, of the
    weights and of the episodes.

    Args:
        attempts: of each user, in the order in which they were made.
        context: largest number of tokens of a lesson, as the servers have it.
    """
    total = Account(users=len(attempts))
    for user, made in attempts.items():
        outcomes = {each.text: each.outcome for each in made}
        acknowledged = [each.text for each in made if each.outcome == STORED]
        total.acknowledged += len(acknowledged)
        total.refused += sum(each.outcome == REFUSED for each in made)
        total.unanswered += sum(each.outcome == UNKNOWN for each in made)
        try:
            state = store.get(user)
        except ttt.store.UnknownUser:
            total.lost += len(acknowledged)
            continue
        held = learnt_texts(state.tensors, tokenizer)
        total.learnt += len(held)
        total.lost += len(set(acknowledged) - set(held))
        total.repeated += len(held) - len(set(held))
        total.foreign += sum(text not in outcomes for text in held)
        total.despite_refusal += sum(outcomes.get(text) == REFUSED for text in held)
        total.unanswered_learnt += sum(outcomes.get(text) == UNKNOWN for text in held)
        total.out_of_order += [text for text in held if text in set(acknowledged)] != acknowledged
        total.miscounted += state.meta["updates"] != len(held)
        difference = replay_difference(learner, tokenizer, context, user, held, state.tensors)
        total.replayed += 1
        total.replay_differs += difference != 0
        total.largest_difference = max(total.largest_difference, difference)
    return total


def learnt_texts(state: dict[str, torch.Tensor], tokenizer: Any) -> list[str]:
    """The texts of the episodes in a user's ``state``, oldest first; each must have been short enough for one."""
    if "episodes.ids" not in state:
        return []
    lengths = state["episodes.lengths"].tolist()
    parts = zip(state["episodes.ids"].split(lengths), state["episodes.learn"].split(lengths), strict=True)
    # A turn teaches its words, but for the first token, and the token that ends it.
    shown = ((ids, learn | torch.cat([learn[1:], learn.new_zeros(1)])) for ids, learn in parts)
    return [tokenizer.decode(ids[words], skip_special_tokens=True) for ids, words in shown]


def replay_difference(
    learner: ttt.Learner, tokenizer: Any, context: int, user: str, texts: Sequence[str], stored: dict[str, torch.Tensor]
) -> float:
    """Learn ``texts`` as the turns of a new user: the largest difference from ``stored``; 0 only if all bits agree."""
    assert learner.pool is not None
    for text in texts:
        lesson = Teaching().lesson(tokenizer, [{"role": "user", "content": text}], context)
        assert lesson is not None
        ids, mask = lesson.tensors()
        learner.observe(ids, learn_mask=mask, users=[user], **Telling().of(lesson.tokens).options)
    found = learner.pool.export(user)
    learner.pool.forget(user)
    if set(found) != set(stored):
        return float("inf")
    worst = 0.0
    for name, tensor in found.items():
        other = stored[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return float("inf")
        if not torch.equal(tensor, other):
            worst = max(worst, float((tensor.double() - other.double()).abs().max()), 1e-300)
    return worst
