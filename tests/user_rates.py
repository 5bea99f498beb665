"""Learning steps of a LowRankLinear: bodies of tests that run on the CPU and, in a CUDA graph, on a GPU."""

import copy

import torch
from helpers import plain_config

from ttt.defences import LowRank
from ttt.nn import LowRankLinear

SLOTS, RANK, WINDOW = 4, 3, 6


def layer_on(device, dtype, **options):
    low_rank = LowRank(slots=SLOTS, rank=RANK, window=WINDOW)
    config = plain_config(per_user=low_rank, replay_capacity=9, **{"ewc_lambda": 0.0, "replay_rows": 0, **options})
    layer = LowRankLinear(33, 20, device=device, dtype=dtype, config=config, name="layer")
    for name in ("importance_m", "importance_n", "memory"):
        if getattr(layer, name) is not None:
            getattr(layer, name).uniform_()
    if layer.seen is not None:
        layer.seen.fill_(5)
    return layer


def check_steps(device, dtype, captured, tokens, **options):
    """Forward, steps and append, and the compressions that fall due, over and over: as the same calls on a copy.

    Args:
        captured: makes of a function without arguments, which has run before, one that does the same again.
    """
    layer = layer_on(device, dtype, rate="energy", lr=0.01, **options)
    other = copy.deepcopy(layer)
    x, delta = (torch.zeros(tokens, k, device=device, dtype=dtype) for k in (33, 20))
    users = torch.full((tokens,), -1, dtype=torch.int32, device=device)
    y = torch.zeros(tokens, 20, device=device, dtype=dtype)
    eta = torch.zeros(tokens, device=device)

    @torch.no_grad()
    def step(layer=layer):
        layer.routing.set(users)
        y.copy_(layer(x))
        layer._learn(x, delta, eta, users)

    step()  # nobody learns
    assert int(layer.rows.sum()) == 0
    again = captured(step)
    for i in range(3 * WINDOW):
        for t in (x, delta, eta):
            t.normal_() if t is not eta else t.uniform_(0, 1e-2)
        users.copy_(torch.randint(-1, SLOTS, (tokens,), dtype=torch.int32))
        if i % 3 == 0:
            users.fill_(i % SLOTS)
        again()
        found = y.clone()
        other.routing.set(users)
        with torch.no_grad():
            assert torch.equal(found, other(x))
        other.learn(x, delta, eta, users)
        for (name, t), twin in zip(layer.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(t, twin), f"{name} after step {i}"
    assert int(layer.step.min()) > 0


def check_rates_are_a_users_own(device, dtype, rate):
    """Steps and moments of one user, whatever the others' tokens are."""
    layer = layer_on(device, dtype, rate=rate, lr=0.01, clip=3.0)
    layer.calibrated.copy_(torch.tensor([30.0, 40.0, 2.0]))
    x, delta = (torch.randn(24, k, device=device).to(dtype) for k in (33, 20))
    users = torch.tensor([0, 1, 2, 1, -1, 1] * 4, dtype=torch.int32, device=device)
    mine = users == 1
    x2, delta2 = x.clone(), delta.clone()
    x2[~mine] *= 1e3
    delta2[~mine] = 0
    found, others = layer.steps(x, delta, users)[2], layer.steps(x2, delta2, users)[2]
    assert torch.equal(found.eta[mine], others.eta[mine])
    assert torch.equal(found.grown[1], others.grown[1])
    assert not torch.equal(found.grown[0], others.grown[0])
    before = layer.moments.clone()
    layer.count(found.grown, torch.tensor([False, True, True, True], device=device))
    assert torch.equal(layer.moments[0], before[0])
    assert float(layer.moments[1, 2]) == int(mine.sum())
