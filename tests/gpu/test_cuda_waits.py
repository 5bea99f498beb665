"""On a GPU, steps that a graph captures, and its replays, never have the host wait; collected where there is one.

``torch.cuda.set_sync_debug_mode("error")`` raises at each wait. tests/learn/test_graphed_waits.py looks for the same
waits without a GPU.
"""

import contextlib

import pytest
import torch

pytest.importorskip("transformers")

from test_cuda import captured
from tiny_models import TARGETS, adapted, ids_of, tiny
from user_rates import layer_on

import ttt


@contextlib.contextmanager
def no_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def default():
    model = ttt.adapt_(tiny(), ttt.TTTConfig(TARGETS["llama"], layers="last:0.5", chunk=8))
    return model, ttt.Learner(model)


def test_waits_are_found():
    t = torch.ones(3, device="cuda")
    for read in (lambda: bool(t.all()), lambda: t.tolist(), lambda: t[t > 0]):
        with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
            read()


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("make", [adapted, default])
def test_no_step_of_a_graphed_learner_waits(make, graph):
    model, learner = make()
    model.cuda()
    learner.calibrate([ids_of(2, 16).cuda()])
    graphed = ttt.GraphedLearner(learner, batch=2, chunk=8, graph=graph)
    ids = ids_of(2, 9).cuda()
    graphed.step(ids)
    with no_waits():
        for _ in range(12):  # windows fill, contexts end
            graphed.step(ids)
    assert int(graphed.learned) == 13


def test_no_learning_step_of_users_waits():
    layer = layer_on("cuda", torch.bfloat16, rate="energy", lr=0.01)
    x, delta = (torch.randn(5, k, device="cuda", dtype=torch.bfloat16) for k in (33, 20))
    users = torch.tensor([0, 1, -1, 1, 2], dtype=torch.int32, device="cuda")
    eta = torch.full((5,), 1e-3, device="cuda")

    @torch.no_grad()
    def step():
        layer.routing.set(users)
        layer(x)
        layer._learn(x, delta, eta, users)

    graph, _ = captured(step)
    with no_waits():
        for _ in range(8):
            step()
            graph.replay()
    assert int(layer.step.max()) > 0


def test_a_seed_beyond_32_bits_is_captured_after_a_small_one():
    """No variant of a kernel is loaded within the capture."""
    memory = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    seen, x = torch.full((1,), 16, device="cuda"), torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    ttt.ops.reservoir_insert(memory, seen, x, seed=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ttt.ops.reservoir_insert(memory, seen, x, seed=2**63 - 1)
    before = int(seen)
    graph.replay()
    assert int(seen) == before + 8
