"""What only a GPU can show; collected where there is one (tests/conftest.py)."""

import copy

import pytest
import torch
from helpers import assert_close
from test_learner import adapted, ids_of, state_of

import ttt
from ttt.ops import backends, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def wide(t):
    return t.double() if torch.is_tensor(t) and t.is_floating_point() else t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_dispatched_window_linear(dtype, tokens):
    m, n, c = 129, 1000, 16
    args = [torch.randn(s, device="cuda").to(dtype) for s in ((tokens, n), (m, n), (m,), (c, n), (c, m))]
    args.append(torch.rand(c, device="cuda"))
    backends.calls.clear()
    y = ttt.ops.window_linear(*args)
    assert backends.calls["window_linear", "triton", ""] == 1
    assert_close(y, reference.window_linear(*map(wide, args)), reference.window_linear(*args), "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_dispatched_commit(dtype, tokens):
    m, n = 127, 500
    w = torch.randn(m, n, device="cuda")
    case = {
        "weight": w.to(dtype),
        "anchor": (w + 0.1 * torch.randn_like(w)).to(dtype),
        "importance": torch.rand_like(w),
        "trace": torch.rand_like(w),
        "x": torch.randn(tokens, n, device="cuda").to(dtype),
        "delta": torch.randn(tokens, m, device="cuda").to(dtype),
        "eta": torch.rand(tokens, device="cuda") * 0.01,
        "trace_delta": None,
        "memory": torch.randn(20, n, device="cuda").to(dtype),
        "seen": torch.tensor([50], device="cuda"),
        "step": torch.tensor([3], device="cuda"),
    }
    tail = (7, 4, "projection", 0.3, 1e-3, 0.5, 0.99, "fisher")
    exact = {k: copy.deepcopy(wide(v)) for k, v in case.items()}
    plain, ours = copy.deepcopy(case), copy.deepcopy(case)
    torch.ops.ttt.commit(*ours.values(), *tail)
    reference.commit(*plain.values(), *tail)
    reference.commit(*exact.values(), *tail)
    for key in ("weight", "trace"):
        change = [d[key].double() - case[key].double() for d in (ours, exact, plain)]
        assert_close(*change, key)
    assert int(ours["step"]) == 4


def test_step_is_captured_in_a_cuda_graph():
    config = ttt.TTTConfig(window=4, replay_capacity=64, lr=1e-3)
    layer = ttt.nn.Linear(256, 128, device="cuda", dtype=torch.bfloat16, config=config)
    layer.memory.normal_()
    layer.seen.fill_(64)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    delta = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)
    eta = torch.full((4,), 1e-3, device="cuda")

    def step():
        with torch.no_grad():
            y = layer(x)
            layer._commit(x, delta, eta, None)
            ttt.ops.reservoir_insert(layer.memory, layer.seen, x, seed=3)
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    start = {k: t.clone() for k, t in layer.state().items()}
    eager = [step() for _ in range(3)]
    expected = {k: t.clone() for k, t in layer.state().items()}
    layer.load_state(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    layer.load_state(start)
    for want in eager:
        graph.replay()
        assert torch.equal(y, want)
    assert all(torch.equal(t, expected[k]) for k, t in layer.state().items())


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
