"""What guards measure, by hand, and states without what guards keep in them."""

import torch

import ttt


def loss_of(learner, ids, user=None):
    """Nats per token of ``ids`` with the one set of weights or, in a model with users, those of ``user``."""
    with torch.no_grad():
        if learner.pool is None:
            logits = learner.model(input_ids=ids).logits
        else:
            with ttt.users(learner.model, [user] * len(ids)):
                logits = learner.model(input_ids=ids).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def without_guard(state):
    """A user's ``state`` without the guard's part."""
    return {name: t for name, t in state.items() if not name.startswith("ttt.guard.")}
