"""Tests that need a GPU; tests/conftest.py collects them only if there is one."""

import copy

import pytest
import torch
from helpers import as_double, assert_close, assert_commit, plain_config, trace_of_rounded_factors

import ttt
from ttt.nn.many_forward import outputs_of
from ttt.ops import backends, log8, reference
from ttt.ops.triton import commit as fused
from ttt.ops.triton import panels

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
def test_experts_are_read_and_passed_back_through_in_one_launch(dtype):
    config = plain_config(window=6, ewc_lambda=0.0, replay_rows=0)
    layers = [ttt.nn.Linear(200, 129, bias=False, device="cuda", dtype=dtype, config=config) for _ in range(5)]
    x, counts = torch.randn(25, 200, device="cuda").to(dtype).requires_grad_(), [1, 4, 16, 3, 1]
    for layer in layers[:3]:
        rows = torch.randn(2, 200, device="cuda").to(dtype), torch.randn(2, 129, device="cuda").to(dtype)
        layer.learn(layer.update_from([rows]))
    backends.calls.clear()
    y = outputs_of(layers, x, counts, torch.arange(25, device="cuda"))
    delta = torch.randn_like(y)
    y.backward(delta)
    assert {key for key in backends.calls if key[0] in backends.MANY} == {
        ("experts_forward", "triton", ""),
        ("experts_backward", "triton", ""),
    }
    parts = list(zip(layers, x.detach().split(counts), delta.split(counts), strict=True))
    exact = [
        layer.weight.double()
        - (layer.win_delta.double() * layer.win_eta.double().unsqueeze(1)).T @ layer.win_x.double()
        for layer in layers
    ]
    wanted = [torch.cat([part.double() @ w.T for (_, part, _), w in zip(parts, exact, strict=True)]),
              torch.cat([part.double() @ w for (_, _, part), w in zip(parts, exact, strict=True)])]  # fmt: skip
    alone = [torch.cat([layer._apply_window(part) for layer, part, _ in parts]),
             torch.cat([layer._transposed_window(part) for layer, _, part in parts])]  # fmt: skip
    for found, right, baseline in zip((y.detach(), x.grad), wanted, alone, strict=True):
        assert_close(found, right, baseline, "experts")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_dispatched_project_out(dtype, tokens):
    x, basis = torch.randn(tokens, 1000, device="cuda"), torch.linalg.qr(torch.randn(1000, 17, device="cuda")).Q.T
    args = x.to(dtype), basis.contiguous().to(dtype)
    backends.calls.clear()
    y = ttt.ops.project_out(*args)
    assert backends.calls["project_out", "triton", ""] == 1
    assert_close(y, reference.project_out(*map(wide, args)), args[0] - (args[0] @ args[1].T) @ args[1], "x'")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_dispatched_commit(dtype, tokens):
    backends.calls.clear()
    check_commit(commit_case(127, 500, tokens, dtype, torch.float32), OPTIONS)
    assert backends.calls["commit", "triton", ""] == 1


def test_step_is_captured_in_a_cuda_graph():
    config = plain_config(window=4, replay_capacity=64, lr=1e-3)
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


def commit_case(m, n, tokens, dtype, state):
    def stored(t):
        return log8.encode(t) if state == torch.uint8 else t.to(state)

    w = torch.randn(m, n, device="cuda")
    return {
        "weight": w.to(dtype),
        "anchor": (w + 0.1 * torch.randn_like(w)).to(dtype),
        "importance": stored(torch.rand_like(w)),
        "trace": stored(torch.rand_like(w)),
        "x": torch.randn(tokens, n, device="cuda").to(dtype),
        "delta": torch.randn(tokens, m, device="cuda").to(dtype),
        "eta": torch.rand(tokens, device="cuda") * 0.01,
        "trace_delta": None,
        "memory": torch.randn(20, n, device="cuda").to(dtype),
        "seen": torch.tensor([50], device="cuda"),
        "step": torch.tensor([3], device="cuda"),
    }


OPTIONS = {
    "seed": 7, "replay_rows": 4, "beta": 0.3, "eps": 1e-3, "lam": 0.5, "gamma": 0.99,
    "kind": "fisher", "trace_every": 1,
}  # fmt: skip


def committed(function, case, options, convert=lambda t: t, gate=None):
    after = {k: None if t is None else convert(t).clone() for k, t in case.items()}
    function(*after.values(), *options.values(), gate)
    return after


def check_commit(case, options):
    n = case["x"].shape[1]
    ours = committed(torch.ops.ttt.commit, case, options)
    plain = committed(reference.commit, case, options)
    exact = committed(reference.commit, case, options, lambda t: as_double(t, n))
    if case["weight"].dtype == torch.bfloat16 and options["kind"] != "si":
        plain["trace"] = trace_of_rounded_factors(case, options)
    assert_commit(case, ours, exact, plain)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("tokens", "every"), [(64, 1), (64, 4), (700, 1), (1029, 4)])
def test_commit_of_few_and_of_many_tokens(dtype, state, tokens, every):
    check_commit(commit_case(200, 531, tokens, dtype, state), {**OPTIONS, "trace_every": every})


@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
def test_commit_in_several_panels(kind, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)
    check_commit(commit_case(200, 531, 700, torch.bfloat16, torch.bfloat16), {**OPTIONS, "kind": kind})


@pytest.mark.parametrize("path", ["fused", "panels"])
@pytest.mark.parametrize("state", [torch.bfloat16, torch.uint8])
def test_bits_are_the_reference_s(path, state, monkeypatch):
    """All sums are exact, so the stored weights and traces agree to the bit."""
    monkeypatch.setattr(fused, "FEW_TOKENS", 10**9 if path == "fused" else 0)
    m, n, tokens = 133, 275, 5
    case = commit_case(m, n, tokens, torch.bfloat16, state)
    case["x"] = torch.randint(-3, 4, (tokens, n), device="cuda").bfloat16()
    case["delta"] = torch.randint(-3, 4, (tokens, m), device="cuda").bfloat16()
    case["weight"] = torch.randint(-512, 513, (m, n), device="cuda").div(64).bfloat16()
    trace = torch.randint(0, 100, (m, n), device="cuda").float()
    case["trace"] = log8.encode(trace) if state == torch.uint8 else trace.to(state)
    case["eta"].fill_(2.0**-12)
    options = {**OPTIONS, "replay_rows": 0, "lam": 0.0, "gamma": 1.0}
    ours, theirs = (committed(f, case, options) for f in (torch.ops.ttt.commit, reference.commit))
    assert torch.equal(ours["weight"], theirs["weight"])
    assert torch.equal(ours["trace"], theirs["trace"])


@pytest.mark.parametrize("tokens", [16, 700])
@pytest.mark.parametrize("state", [torch.bfloat16, torch.uint8])
def test_results_are_the_same_in_every_run(tokens, state):
    case = commit_case(300, 2100, tokens, torch.bfloat16, state)
    first, second = (committed(torch.ops.ttt.commit, case, OPTIONS) for _ in range(2))
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(first["trace"], second["trace"])


@pytest.mark.parametrize("tokens", [16, 700])
def test_a_gated_commit_in_a_cuda_graph(tokens):
    """One graph, replayed with the gate open, closed and open again; the host never waits."""
    case = commit_case(133, 275, tokens, torch.bfloat16, torch.uint8)
    options = OPTIONS
    gate = torch.ones(1, dtype=torch.int64, device="cuda")
    live = {k: None if t is None else t.clone() for k, t in case.items()}

    def step():
        torch.ops.ttt.commit(*live.values(), *options.values(), gate)
        torch.ops.ttt.reservoir_insert(live["memory"], live["seen"], live["x"], 3, gate)

    def restore():
        for k, t in case.items():
            if t is not None:
                live[k].copy_(t)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    restore()
    for _ in range(2):
        step()
    expected = {k: None if t is None else t.clone() for k, t in live.items()}
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    restore()
    x = case["x"].clone()
    for value in (1, 0, 0, 1):
        gate.fill_(value)
        live["x"].copy_(x if value else torch.full_like(x, float("nan")))
        graph.replay()
    assert int(live["step"]) == int(case["step"]) + 2
    for k, t in live.items():
        assert t is None or torch.equal(t, expected[k]), k


def captured(run):
    """A CUDA graph of ``run``, which has run before, so that all kernels are compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "rows"), [(16, 1), (16, 5), (8, 8), (12, 3)])
@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 0.0, "replay_rows": 0}, {"importance": "mas"}])
def test_a_whole_decode_step_is_one_graph(dtype, window, rows, options):
    """Forward, append and commits in a graph give the same bits as the same calls without a graph."""
    config = plain_config(window=window, replay_capacity=64, lr=1e-2, **options)
    layer = ttt.nn.Linear(256, 128, device="cuda", dtype=dtype, config=config).capturable_(rows)
    if layer.memory is not None:
        layer.memory.normal_()
        layer.seen.fill_(64)
    x, delta = (torch.zeros(rows, k, device="cuda", dtype=dtype) for k in (256, 128))
    gate = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step(layer=layer):
        with torch.no_grad():
            y = layer(x)
            layer.learn(layer.update_from([(x, delta)]), gate)
        return y

    other = copy.deepcopy(layer)
    before = {k: t.clone() for k, t in layer.state().items()}
    graph, y = captured(step)
    assert all(torch.equal(t, before[k]) for k, t in layer.state().items())  # the gate was closed
    for i in range(3 * window // rows + 4):
        x.normal_()
        delta.normal_()
        gate.fill_(i % 5 != 3)
        graph.replay()
        assert torch.equal(y, step(other))
    state, theirs = layer.state(), other.state()
    assert int(state["step"]) > 1
    assert all(torch.equal(t.nan_to_num(7.0), theirs[k].nan_to_num(7.0)) for k, t in state.items())
    probe = torch.randn(3, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        exact = wide(probe) @ wide(layer.effective_weight()).T + wide(layer.bias)
        assert float((layer(probe) - exact).norm() / exact.norm()) < 0.02


def test_reading_the_count_while_capturing_says_why_it_cannot():
    layer = ttt.nn.Linear(64, 32, device="cuda", config=plain_config(window=4, replay_rows=0)).capturable_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            layer.flush()


def test_any_model_and_loss_learn_in_a_graph():
    layer = ttt.nn.Linear(64, 48, device="cuda", config=plain_config(window=8, replay_rows=0, lr=1e-3))
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(48, 8, device="cuda").requires_grad_(False))
    ttt.capturable_(model, 4)
    x, outcomes = torch.zeros(4, 64, device="cuda"), []

    def step(model=model):
        with ttt.learning(model) as outcome:
            model(x).square().sum().backward()
        outcomes.append(outcome)

    graph, _ = captured(step)  # the warm-up learnt from inputs of 0: no weight has changed
    learnt, other = outcomes[-1].learned, copy.deepcopy(model)
    for i in range(7):
        x.normal_()
        if i == 3:
            x[0, 0] = float("nan")
        graph.replay()
        step(other)
        assert int(learnt) == (i != 3)
    for key, t in model[0].state().items():
        torch.testing.assert_close(t, other[0].state()[key], rtol=1e-4, atol=1e-5)


def test_launches_on_several_streams_do_not_disturb_each_other():
    args = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((1, 2048), (2048, 2048))]
    window = [torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    eta = torch.rand(64, device="cuda")
    want = ttt.ops.window_linear(*args, None, *window, eta)
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ttt.ops.window_linear(*args, None, *window, eta))
    graphs = [captured(lambda: ttt.ops.window_linear(*args, None, *window, eta)) for _ in range(2)]
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in found + [y for _, y in graphs])
