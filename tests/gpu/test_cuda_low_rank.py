"""Many users on a GPU, through the dispatcher and in a CUDA graph; collected where there is one (tests/conftest.py)."""

import pytest
import torch
from test_cuda import captured
from user_rates import check_rates_are_a_users_own, check_steps

import ttt
from ttt.ops import backends
from ttt.ops.low_rank import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pool_of(slots, capacity, n, m, dtype):
    a, b = (torch.randn(slots, capacity, k, device="cuda").to(dtype) for k in (n, m))
    rows = torch.randint(0, capacity + 1, (slots,), device="cuda", dtype=torch.int32)
    return a, b * 0.05, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 200])
def test_dispatched_forward_and_append(dtype, tokens):
    (a, b, rows), n, m = pool_of(5, 40, 1000, 129, dtype), 1000, 129
    x, weight, delta = (torch.randn(*s, device="cuda").to(dtype) for s in ((tokens, n), (m, n), (tokens, m)))
    users = torch.randint(-1, 5, (tokens,), device="cuda", dtype=torch.int32)
    eta, eta_sum = torch.rand(tokens, device="cuda"), torch.rand(5, device="cuda")
    backends.calls.clear()
    y = ttt.ops.low_rank_linear(x, weight, None, a, b, rows, users)
    base = torch.nn.functional.linear(x, weight)
    exact = reference.add_delta_(base.double(), x.double(), a.double(), b.double(), rows, users)
    assert (y.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
    assert torch.equal(y[users < 0], base[users < 0])
    want = [t.clone() for t in (a, b, rows, eta_sum)]
    reference.low_rank_append(*want, x, delta, eta, users)
    ttt.ops.low_rank_append(a, b, rows, eta_sum, x, delta, eta, users)
    assert all(torch.equal(t, expected) for t, expected in zip((a, b, rows), want, strict=False))
    torch.testing.assert_close(eta_sum, want[3], rtol=1e-5, atol=0)
    assert set(backends.calls) == {("low_rank_linear", "triton", ""), ("low_rank_append", "triton", "")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatched_compress_of_default_slots(dtype):
    """Against the float64 reference of the same rows; slots that are not named change by no bit."""
    a, b, rows = pool_of(6, 80, 2048, 1030, dtype)
    rows[:4] = torch.tensor([80, 79, 16, 0])
    rates = [torch.rand(6, device="cuda") for _ in range(2)]
    state = [a, b, rows, *rates, torch.randint(0, 99, (6,), device="cuda")]
    before, wide = (
        [f(t) for t in state] for f in (torch.clone, lambda t: t.double() if t.is_floating_point() else t.clone())
    )
    slots = torch.tensor([3, 1, -1, 0, 2], device="cuda")
    backends.calls.clear()
    ttt.ops.low_rank_compress(*state, slots, rank=16, seed=7)
    assert dict(backends.calls) == {("low_rank_compress", "triton", ""): 1}
    options = 0.0, None, None, None, None, 7, 0, 0.3, 1e-3
    reference.low_rank_compress(*wide, slots, 16, *options)
    assert state[2].tolist() == wide[2].tolist()
    assert torch.equal(state[5], wide[5])
    torch.testing.assert_close(state[4].double(), wide[4], rtol=1e-5, atol=1e-5)
    for u in range(6):
        if u >= 4:
            assert all(torch.equal(t[u], old[u]) for t, old in zip(state, before, strict=True))
            continue
        held = slice(0, int(state[2][u]))
        got, want = (t[1][u, held].double().T @ t[0][u, held].double() for t in (state, wide))
        assert (got - want).norm() <= {torch.float32: 1e-6}.get(dtype, 1.5e-2) * want.norm()


@pytest.mark.parametrize("rate", ["energy", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_a_users_own(dtype, rate):
    check_rates_are_a_users_own("cuda", dtype, rate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 0.5, "replay_rows": 2}])
@pytest.mark.parametrize("tokens", [5, 14])
def test_a_learning_step_is_one_graph(dtype, options, tokens):
    def graph_of(step):
        graph, _ = captured(step)
        return graph.replay

    check_steps("cuda", dtype, graph_of, tokens, **options)
