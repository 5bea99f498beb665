"""The reference defines the ops, so it is compared with brute force and autograd in float64."""

import math

import pytest
import torch
from torch.func import grad, vmap

from ttt.ops import log8, reference
from ttt.ops.arguments import CommitArguments

D = torch.float64


def committed(weight, x, delta, eta, **options):
    """(W, F) after one reference commit; options as the op's."""
    defaults = {"seed": 3, "eps": 1e-9, "beta": 0.3}
    tensors = dict.fromkeys(("anchor", "importance", "trace", "trace_delta", "memory", "seen"))
    w, step = weight.clone(), torch.tensor([4])
    given = tensors | defaults | options
    reference.commit(*CommitArguments(weight=w, x=x, delta=delta, eta=eta, step=step, **given))
    assert int(step) == 5
    return w, given["trace"]


def test_fisher_is_the_sum_of_per_token_squares_and_not_the_squared_batch_gradient():
    m, n, tokens = 7, 5, 11
    w, x, target = torch.randn(m, n, dtype=D), torch.randn(tokens, n, dtype=D), torch.randint(m, (tokens,))

    def loss(w, x, y):
        return torch.nn.functional.cross_entropy((w @ x).unsqueeze(0), y.unsqueeze(0), reduction="sum")

    gradients = vmap(grad(loss), (None, 0, 0))(w, x, target)  # tokens x m x n, one per token
    delta = torch.softmax(x @ w.T, -1) - torch.nn.functional.one_hot(target, m)
    _, f = committed(w, x, delta, torch.zeros(tokens, dtype=D), trace=torch.zeros(m, n, dtype=D))
    torch.testing.assert_close(f, gradients.square().sum(0), rtol=1e-12, atol=1e-14)
    batch = gradients.sum(0).square()
    assert float((f - batch).norm() / f.norm()) > 0.1


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
def test_trace_equals_a_loop_over_tokens(kind, gamma):
    m, n, tokens = 3, 4, 6
    w, x = torch.randn(m, n, dtype=D), torch.randn(tokens, n, dtype=D)
    delta, p = torch.randn(tokens, m, dtype=D), torch.randn(tokens, m, dtype=D)
    eta, f0 = torch.rand(tokens, dtype=D) * 0.1, torch.rand(m, n, dtype=D)
    new, f = committed(w, x, delta, eta, trace=f0.clone(), trace_delta=p, gamma=gamma, kind=kind)
    torch.testing.assert_close(new, w - sum(e * torch.outer(d, v) for e, d, v in zip(eta, delta, x, strict=True)))
    expected = f0 * gamma**tokens
    for t in range(tokens):
        g = torch.outer(p[t], x[t])
        if kind == "si":
            expected -= g * (new - w)
        else:
            expected += gamma ** (tokens - 1 - t) * (g.square() if kind == "fisher" else g.abs())
    torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-14)


def test_proximal_step_solves_its_equation():
    m, n = 6, 9
    w, anchor, omega = torch.randn(m, n, dtype=D), torch.randn(m, n, dtype=D), torch.rand(m, n, dtype=D) * 5
    x, delta, eta = torch.randn(2, n, dtype=D), torch.randn(2, m, dtype=D), torch.tensor([0.1, 0.2], dtype=D)
    new, _ = committed(w, x, delta, eta, anchor=anchor, importance=omega, lam=0.7)
    g = (delta * eta[:, None]).T @ x
    # Implicit: the penalty's gradient is taken at the new weights.
    torch.testing.assert_close(new, w - g - 0.7 * eta.sum() * omega * (new - anchor), rtol=1e-12, atol=1e-13)


def test_proximal_step_is_stable_where_the_explicit_penalty_diverges():
    m = n = 8
    anchor, omega = torch.randn(m, n, dtype=D), torch.full((m, n), 1e6, dtype=D)
    w = anchor + 1
    for _ in range(20):
        x, delta = torch.randn(1, n, dtype=D), torch.randn(1, m, dtype=D)
        w, _ = committed(w, x, delta, torch.ones(1, dtype=D), anchor=anchor, importance=omega, lam=1.0)
    assert bool(torch.isfinite(w).all())
    assert float((w - anchor).abs().max()) < 1e-4


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_projection_shrinks_the_drift_of_the_drawn_rows_by_one_minus_beta(beta):
    m, n, rows = 5, 40, 6
    w, anchor, memory = (torch.randn(s, n, dtype=D) for s in (m, m, 50))
    x, delta, eta = torch.randn(3, n, dtype=D), torch.randn(3, m, dtype=D), torch.rand(3, dtype=D)
    seen = torch.tensor([50])
    new, _ = committed(
        w, x, delta, eta, anchor=anchor, memory=memory, seen=seen, replay_rows=rows, beta=beta, eps=1e-12
    )
    index = reference.reservoir_draw(seen, torch.tensor([4]), 50, rows, 3)
    xr = memory[index]
    before = xr @ (w - (delta * eta[:, None]).T @ x - anchor).T
    torch.testing.assert_close(xr @ (new - anchor).T, (1 - beta) * before, rtol=1e-8, atol=1e-8)


def test_no_replay_from_an_empty_memory():
    w, anchor = torch.randn(3, 4, dtype=D), torch.randn(3, 4, dtype=D)
    none = torch.empty(0, 4, dtype=D), torch.empty(0, 3, dtype=D), torch.empty(0, dtype=D)
    memory = torch.full((5, 4), math.nan, dtype=D)
    new, _ = committed(w, *none, anchor=anchor, memory=memory, seen=torch.tensor([0]), replay_rows=3)
    assert torch.equal(new, w)


def test_trace_of_one_commit_equals_that_of_two():
    m, n = 3, 5
    x, delta, eta = torch.randn(7, n, dtype=D), torch.randn(7, m, dtype=D), torch.zeros(7, dtype=D)
    w = torch.randn(m, n, dtype=D)
    _, whole = committed(w, x, delta, eta, trace=torch.zeros(m, n, dtype=D), gamma=0.8)
    parts = torch.zeros(m, n, dtype=D)
    for part in (slice(0, 3), slice(3, 7)):
        _, parts = committed(w, x[part], delta[part], eta[part], trace=parts, gamma=0.8)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["fisher", "mas", "si"])
def test_a_sampled_trace_is_that_of_the_chosen_tokens_times_their_number(kind):
    m, n, tokens, every = 3, 4, 11, 4
    w, x, delta = torch.randn(m, n, dtype=D), torch.randn(tokens, n, dtype=D), torch.randn(tokens, m, dtype=D)
    eta, f0, gamma = torch.rand(tokens, dtype=D) * 0.1, torch.rand(m, n, dtype=D), 0.9
    new, f = committed(w, x, delta, eta, trace=f0.clone(), gamma=gamma, kind=kind, trace_every=every)
    chosen, size = reference.choose_tokens(tokens, every, torch.tensor([4]), 3)
    assert [t // every for t in chosen.tolist()] == [0, 1, 2]
    assert size.tolist() == [4, 4, 3]
    expected = f0 * gamma**tokens
    for t, count in zip(chosen.tolist(), size.tolist(), strict=True):
        g = torch.outer(delta[t], x[t])
        if kind == "si":
            expected -= count * g * (new - w)
        else:
            expected += count * gamma ** (tokens - 1 - t) * (g.square() if kind == "fisher" else g.abs())
    torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-14)


def test_a_sampled_trace_is_unbiased():
    """Every token of a group is chosen equally often: chi-squared over many steps."""
    counts = torch.zeros(7)
    for step in range(2100):
        chosen, _ = reference.choose_tokens(7, 7, torch.tensor([step]), 11)
        counts[chosen] += 1
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.9  # 6 degrees of freedom, p = 1e-4


def error_of_s(tokens, **options):
    """Root mean square error of S over its root mean square, for x and delta of a normal distribution."""
    m, n = 200, 300
    x, delta = torch.randn(tokens, n, dtype=D), torch.randn(tokens, m, dtype=D)
    zero, eta = torch.zeros(m, n, dtype=D), torch.zeros(tokens, dtype=D)
    exact, f = (committed(zero, x, delta, eta, trace=zero.clone(), **o)[1] for o in ({}, options))
    return float((f - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [16, 256, 2048])
def test_the_error_of_sampling_is_what_the_docs_state(tokens):
    """A token's term of S, x^2 delta^2, has mean 1 and mean square 9 here, so S has mean square T^2 + 8 T.

    One token of each four, times 4, has variance 4 * 4 * 9 - (4 * 9 + 12) = 96 a group, 24 T in all.
    """
    assert error_of_s(tokens, trace_every=4) == pytest.approx(math.sqrt(24 / (tokens + 8)), rel=0.15)


def test_a_closed_gate_changes_nothing():
    m, n = 3, 5
    case = {"weight": torch.randn(m, n), "x": torch.full((2, n), math.nan), "delta": torch.randn(2, m)}
    trace, step, seen = torch.rand(m, n), torch.tensor([4]), torch.tensor([2])
    before = [t.clone() for t in (case["weight"], trace, step, seen)]
    absent = dict.fromkeys(("anchor", "importance", "trace_delta", "memory", "seen"))
    closed = CommitArguments(**case, **absent, trace=trace, eta=torch.ones(2), step=step, gate=torch.tensor([0]))
    reference.commit(*closed)
    memory = torch.zeros(4, n)
    reference.reservoir_insert(memory, seen, case["x"], 3, torch.tensor([0]))
    assert all(torch.equal(a, b) for a, b in zip((case["weight"], trace, step, seen), before, strict=True))
    assert not memory.any()
    reference.commit(*closed._replace(gate=torch.tensor([-1])))
    assert int(step) == 5


def test_state_in_8_bits_is_decoded_used_and_encoded():
    m, n, tokens = 5, 70, 3
    w, anchor = torch.randn(m, n), torch.randn(m, n)
    x, delta, eta = torch.randn(tokens, n), torch.randn(tokens, m), torch.rand(tokens)
    packed = {k: log8.encode(torch.rand(m, n) * 3) for k in ("importance", "trace")}
    plain = {k: log8.decode(t, n) for k, t in packed.items()}
    new8, f8 = committed(w, x, delta, eta, anchor=anchor, lam=0.7, **{k: t.clone() for k, t in packed.items()})
    new, f = committed(w, x, delta, eta, anchor=anchor, lam=0.7, **plain)
    assert torch.equal(new8, new)
    bits = reference.trace_rounding_bits(m, n, torch.tensor([4]), 3)
    assert torch.equal(f8, log8.encode(f, bits))
