"""Batches in which each row belongs to a user: scored, then learnt, each user's by themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.learn.huggingface import cache_of, cached, detached, frozen, masked_inputs
from ttt.nn import Capturing, LowRankLinear
from ttt.nn.rates import Rates
from ttt.per_user.pool import Pool


@dataclasses.dataclass(frozen=True)
class Read:
    """What `observe` found: ``nll`` (B, T-1) and ``mask`` (B, T-1), ``learned`` and ``rejected`` chunks by user."""

    nll: Tensor
    mask: Tensor
    learned: dict[Hashable, int]
    rejected: dict[Hashable, int]


def observe(
    learner: Any,
    pool: Pool,
    ids: Tensor,
    attend: Tensor,
    teach: Tensor,
    users: Sequence[Hashable | None],
    learn: bool,
    pads: bool,
) -> Read:
    """`ttt.Learner.observe` of rows that belong to users, after its checks; ``pads``: ``attend`` (B, T) holds padding.

    What a user reads back and learns depends on their own rows only: the loss's gradient is exact (words left out of
    it would be chosen for the batch), a chunk is judged user by user, and whoever is rejected reads on with a cache of
    zeros, without a restart for the others.
    """
    if len(users) != ids.shape[0]:
        raise ValueError(f"users must have an entry for each of the {ids.shape[0]} rows, got {len(users)}")
    named = list(dict.fromkeys(u for u in users if u is not None))
    chunk, context, length = learner.config.chunk, learner.context, ids.shape[1]
    scored = attend[:, :-1] & attend[:, 1:]
    nll = torch.zeros(scored.shape, device=ids.device)
    learned, rejected = dict.fromkeys(named, 0), dict.fromkeys(named, 0)
    teaches = learn and learner.config.lr > 0 and bool(named)
    with frozen(learner.model), pool.using(users) as slots:
        owned = (slots >= 0).unsqueeze(1)
        targets, rows = scored & teach[:, 1:] & owned, attend & teach & owned
        start, cache, position = 0, None, 0
        while position < length - 1:
            if position - start >= context:
                start, cache = position, None
            last = min(position + chunk, start + context, length - 1)
            span = slice(position, last)
            inputs = {"input_ids": ids[:, span], **cached(learner.model, cache)}
            if pads:
                inputs |= masked_inputs(attend[:, start:last], last - position)
            capturing: Any = Capturing(list(pool.layers.values())) if teaches else contextlib.nullcontext()
            with torch.set_grad_enabled(teaches), capturing, learner._split as split:
                out, scores = split.run(inputs, ids[:, position + 1 : last + 1])
                nll[:, span] = torch.where(scored[:, span], scores.nll, 0.0)
                if teaches:
                    scores.backward(targets[:, span], 0.0)
                    captured = capturing.renew()
            cache = detached(cache_of(out))
            if teaches:
                bad = _learn(pool, captured, slots, rows[:, span], scores.nll.detach(), targets[:, span])
                if pool.companion is not None:
                    pool.companion.check_due()
                for user in _count(pool, named, bad, slots, targets[:, span], learned, rejected):
                    _blank(cache, slots == pool.slot(user))
            position = last
    return Read(nll, scored, learned, rejected)


def _learn(pool: Pool, captured: list, slots: Tensor, rows: Tensor, nll: Tensor, targets: Tensor) -> Tensor:
    """Append what the captured chunk teaches; (S,) bool: the slots where something is not finite, which do not change.

    slots: (B,); rows, nll, targets: (B, L).
    """
    rows = rows.flatten()
    owners = slots.repeat_interleave(nll.shape[1])
    users = torch.where(rows, owners, -1)
    ok = torch.isfinite(torch.where(targets, nll, 0.0)).flatten()
    updates: list[tuple[LowRankLinear, Tensor, Tensor, Rates]] = []
    for layer, pairs in zip(pool.layers.values(), captured, strict=True):
        if not pairs:
            continue
        x, delta = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if len(x) != len(users):
            raise ValueError(f"{layer.name} saw {len(x)} rows of {len(users)} tokens: users need every token seen once")
        x, delta = (t.to(layer.weight.dtype).contiguous() for t in (x, delta))
        x, steps = layer.steps(x, delta, users)
        ok = ok & (steps.finite.to(ok.device) | ~rows)
        updates.append((layer, x, delta, steps))
    bad = torch.zeros(pool.slots + 1, dtype=torch.int64, device=users.device)
    bad = bad.index_add_(0, owners.long() + 1, (~ok).long())[1:] > 0
    users = torch.where(bad[users.clamp_min(0).long()], -1, users)
    factors = None if pool.companion is None else pool.companion.pace(slots, nll, targets, bad)
    for layer, x, delta, steps in updates:
        eta = steps.eta if factors is None else steps.eta * factors[users.clamp_min(0).long()]
        layer.learn(x, delta, eta, users)
        layer.count(steps.grown, ~bad)
    return bad


def _count(
    pool: Pool, named: list, bad: Tensor, slots: Tensor, targets: Tensor, learned: dict, rejected: dict
) -> list[Hashable]:
    """Enter into ``learned`` and ``rejected`` what each user's chunk was; who was rejected."""
    taught = torch.zeros(pool.slots + 1, dtype=torch.int64, device=bad.device)
    taught = taught.index_add_(0, slots.long() + 1, targets.sum(1))[1:] > 0
    found = []
    for user, is_bad, has in zip(named, *_at(pool, named, bad, taught), strict=True):
        if is_bad:
            rejected[user] += 1
            found.append(user)
        elif has:
            learned[user] += 1
    return found


def _at(pool: Pool, named: list, *by_slot: Tensor) -> list[list[bool]]:
    at = [pool.slot(user) for user in named]
    return torch.stack(by_slot)[:, at].tolist()


def _blank(cache: Any, rows: Tensor) -> None:
    """Zero what the cache holds of ``rows`` (B,) bool: nothing that is not finite is read again."""
    for layer in getattr(cache, "layers", []):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == len(rows):
                shape = (-1,) + (1,) * (value.ndim - 1)
                setattr(layer, name, torch.where(rows.view(shape), torch.zeros_like(value), value))
