"""The learner on a GPU, with and without a CUDA graph; collected where there is one (tests/conftest.py)."""

import copy

import pytest
import torch

import ttt
from ttt.ops import backends

pytest.importorskip("transformers")

from tiny_models import adapted, ids_of, state_of


def test_learner_agrees_with_the_cpu():
    torch.manual_seed(3)
    model, learner = adapted(lr=0.01, window=5)
    other = copy.deepcopy(ttt.restore_(copy.deepcopy(model))).cuda()
    ttt.adapt_(other, model.model.layers[-1].mlp.down_proj.config)
    on_gpu = ttt.Learner(other)
    ids = ids_of(2, 50)
    for _ in range(3):
        cpu, gpu = learner.observe(ids), on_gpu.observe(ids.cuda())
    torch.testing.assert_close(gpu.nll.cpu(), cpu.nll, rtol=2e-3, atol=2e-3)
    a, b = state_of(model), state_of(other)
    for key in a:
        if key.endswith(".weight"):
            torch.testing.assert_close(b[key].cpu(), a[key], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("window", [5, 64])
def test_a_graphed_learner_is_the_same_without_its_graph(window):
    torch.manual_seed(4)
    model, learner = adapted(lr=0.01, window=window)
    model.cuda()
    learner.calibrate([ids_of(2, 16).cuda()])
    other = copy.deepcopy(model)
    backends.calls.clear()
    graphed = ttt.GraphedLearner(learner, batch=2, chunk=8)
    assert backends.calls["graphed_learner", "cuda graph", ""] == 1
    eager = ttt.GraphedLearner(ttt.Learner(other), batch=2, chunk=8, graph=False)
    for _ in range(3):
        ids = ids_of(2, 49).cuda()
        a, b = graphed.observe(ids), eager.observe(ids)
        assert (a.learned, a.rejected) == (b.learned, b.rejected) == (6, 0)
        torch.testing.assert_close(a.nll, b.nll, rtol=1e-3, atol=1e-3)
    a, b = state_of(model), state_of(other)
    for key in a:
        if key.endswith(".weight"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-4)
    # A token whose embedding is not finite: its chunk changes no bit, and the next are read as if it were not there.
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    ids[ids == 7] = 8
    ids[0, 12] = 7
    before = state_of(model)
    graphed.restart()
    graphed.step(ids[:, 8:17])
    assert all(torch.equal(t, before[k]) for k, t in state_of(model).items())
    assert int(graphed.rejected) == 1
    seen = graphed.observe(ids)
    assert (seen.learned, seen.rejected) == (5, 1)
    assert bool(torch.isfinite(seen.nll[:, 16:]).all())
    graphed.release()
    assert learner.observe(ids[1:]).rejected == 0
