"""One learning step of one set of weights: backward passes on a scored chunk, and writing every layer's update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ttt.atomic import whole_write
from ttt.learn.data_parallel import join, joined_rows
from ttt.learn.head import AutogradScores, Scored
from ttt.learn.stream_rule import Chunk, backward_terms, joined
from ttt.nn import Capturing, Linear, Update, own_loss
from ttt.nn.many_learn import Together, divided, learn_together
from ttt.nn.many_updates import updates_from
from ttt.nn.parallel import SharedSide, same_bits

if TYPE_CHECKING:
    from ttt.config import TTTConfig
    from ttt.learn.learner import Learner


@dataclasses.dataclass(frozen=True)
class ScoredChunk:
    """A chunk of B sequences of T tokens after its forward pass.

    Attributes:
        scores: the losses of the targets, with what the backward pass needs.
        wanted: (B, T) bool, the targets whose losses are summed, and at whose tokens rows (x, delta) are written; None
            for all.
        shown: what the learner's rules are given of the chunk; None if it has no rules.
        emphasis: what multiplies the steps.
    """

    scores: Scored
    wanted: Tensor | None = None
    shown: Chunk | None = None
    emphasis: float = 1.0


class Step(NamedTuple):
    """What the layers can learn from a chunk.

    Attributes:
        updates: each layer that took part in the forward pass, with its update.
        finite: () bool, whether the loss and all updates are finite.
    """

    updates: list[tuple[Linear, Update]]
    finite: Tensor


def differentiates_outputs(config: TTTConfig) -> bool:
    """Whether the trace needs gradients of the squared logits, as that of `ttt.MAS` does (Aljundi et al., 2018)."""
    return config.importance == "mas" and config.ewc_lambda > 0


def learn_from(learner: Learner, capturing: Capturing, chunk: ScoredChunk) -> bool:
    """Let the learner's layers learn from ``chunk``, whose forward pass ran inside ``capturing``.

    Returns:
        Whether it was learnt. If the loss or a gradient is not finite, nothing was written, and this is False.
    """
    step = step_from(learner, capturing, chunk)
    if not bool(step.finite):
        return False
    if learner.guard is not None or chunk.emphasis != 1.0:
        nll = chunk.scores.nll.flatten() if chunk.wanted is None else chunk.scores.nll[chunk.wanted]
        nll = join(learner.access.replicas, nll) if learner.access.joins else nll
        if learner.guard is not None:
            learner.guard.pace(step.updates, nll)
        if chunk.emphasis != 1.0:
            _emphasise(step.updates, chunk.emphasis, nll.detach().sum())
    write(step.updates)
    if chunk.shown is not None:
        with torch.no_grad():
            for rule in learner.rules:
                rule.seen(chunk.shown)
    return True


@torch.no_grad()
def _emphasise(updates: Sequence[tuple[Linear, Update]], emphasis: float, loss: Tensor) -> None:
    """Multiply the steps of ``updates`` by ``emphasis``, within what the ``loss`` () of their tokens allows."""
    for layer, update in updates:
        update.eta.mul_(emphasis)
        if update.gain is not None:
            lowered = (update.eta * update.gain).sum()
            update.eta.mul_(own_loss.factor(lowered, loss.to(lowered.device), layer.share))


def step_from(learner: Learner, capturing: Capturing, chunk: ScoredChunk) -> Step:
    """Run the backward passes of ``chunk`` and collect every layer's update. Nothing is written."""
    scores, layers = chunk.scores, learner.layers
    mas = differentiates_outputs(learner.config)
    term, logits_gradient = None, None
    replayed: list[Any] = [[] for _ in layers]
    if chunk.shown is not None:
        term, replayed = backward_terms(learner.rules, chunk.shown, capturing)
        logits_gradient = chunk.shown.logits.grad
    scores.backward(chunk.wanted, learner.config.head_mass, retain_graph=mas, logits_gradient=logits_gradient)
    captured = capturing.renew()
    traced: list[Any] = [None] * len(layers)
    if mas:
        assert isinstance(scores, AutogradScores)
        valid = scores.logits if chunk.wanted is None else scores.logits[chunk.wanted]
        valid.square().sum().backward()
        traced = capturing.renew()
    rows = None if chunk.wanted is None else chunk.wanted.flatten()
    given = []
    for layer, pairs, trace, more in zip(layers, captured, traced, replayed, strict=True):
        own = joined(pairs, trace, rows, more)
        given.append(joined_rows(learner.access.replicas, layer, own) if learner.access.joins else own)
    updates = updates_from(layers, given, chunk.emphasis)
    found = [(layer, update) for layer, update in zip(layers, updates, strict=True) if update is not None]
    loss = (scores.nll if chunk.wanted is None else scores.nll[chunk.wanted]).sum()
    loss = loss if term is None else loss + term
    finite = torch.stack([torch.isfinite(loss)] + [update.finite.to(loss.device) for _, update in found])
    if not learner.access.joins:
        refuse_other_updates(learner.access.replicas, found)
    return Step(found, learner.access.agreed(finite.all()))


def refuse_other_updates(processes: Sequence[SharedSide], updates: Sequence[tuple[Any, Any]]) -> None:
    """Raise ValueError, in all ``processes``, unless whole layers that each of them holds get the same rows in all.

    FSDP2 is made for processes that read other texts, from which these layers would learn something else in each.
    Each of ``updates`` is a layer with something whose ``x`` and ``delta`` are the rows.
    """
    if not processes:
        return
    if not same_bits(processes, [t for _, u in updates for t in (u.x, u.delta)]):
        raise ValueError(
            "all processes of a model that FSDP2 shards must learn from the same tokens, to the bit, as each holds "
            "the layers that learn; inputs or gradients of these layers differ between them. Give all of them the "
            "same batches; if they had the same, one of them computed something that is not finite, or rounded "
            "otherwise, as processors of another kind do"
        )


def write(updates: Sequence[tuple[Linear, Update]], gate: Tensor | None = None) -> None:
    """Let every layer learn its update. Signals wait until all are written, see `ttt.atomic`.

    Args:
        gate: as in `ttt.nn.Linear.learn`.

    Raises:
        ValueError: if a layer cannot take its update. Nothing has changed then.
    """
    experts: list[Together] = []
    others: Sequence[tuple[Linear, Update]] = updates
    if gate is None:
        experts, others = divided(updates)
    for layer, update in others:
        layer.check_update(update, gate)
    with whole_write([layer for layer, _ in updates], "a learning step"):
        learn_together(experts)
        for layer, update in others:
            layer.learn(update) if gate is None else layer.learn(update, gate)
