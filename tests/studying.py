"""Tiny learners with a log of what was learnt, and what their studies are compared with."""

import contextlib

import torch
from tiny_models import TARGETS, VOCAB, tiny
from torch import nn

import ttt


def words(rows, length, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)  # None: the test's own
    return torch.randint(1, VOCAB, (rows, length), generator=generator)


def learner_of(users=None, dtype=torch.float32, lr=0.0, log=None, family="llama", context=None, **options):
    config = ttt.TTTConfig(
        TARGETS[family], layers="last:0.5", lr=lr, protect=[ttt.KroneckerFisher(directions=3)], window=8, chunk=8,
        per_user=None if users is None else ttt.LowRank(slots=users, rank=40, window=8), **options,
    )  # fmt: skip
    learner = ttt.Learner(ttt.adapt_(tiny(family).to(dtype), config), context=context, episodes=log or ttt.EpisodeLog())
    learner.calibrate([words(2, 24)])
    return learner


def told(learner, ids, learn, user="ada"):
    if learner.pool is not None:
        learner.pool.open(user)
    learner.episodes.keep(*_text(ids, learn, learner.pool and [user] * len(ids)))


def _text(ids, learn, users):
    from ttt.learn.loop import ObserveOutput
    from ttt.learn.text import Text

    nothing = torch.zeros((len(ids), ids.shape[1] - 1))
    return Text.of(ids, None, learn), users, ObserveOutput(nothing, nothing.bool(), 0, 0)


@torch.no_grad()
def mean_loss(learner, user):
    """Nats per learnt token of all episodes of ``user``, by plain forward passes."""
    total, count = 0.0, 0
    for episode in learner.episodes.of(user):
        with contextlib.nullcontext() if user is None else ttt.users(learner.model, [user]):
            logits = learner.model(input_ids=episode.ids[None, :-1], use_cache=False).logits[0].double()
        each = nn.functional.cross_entropy(logits, episode.ids[1:], reduction="none")
        total, count = total + float(each[episode.learn[1:]].sum()), count + int(episode.learn[1:].sum())
    return total / count


def flat(held):
    """The tensors of a snapshot or of a user's state, by name."""
    if isinstance(held, dict):
        return held
    layers = {f"{at}.{key}": t for at, layer in enumerate(held.layers) for key, t in layer.items()}
    return layers | held.episodes
