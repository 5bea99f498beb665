"""The sequence ops against flash-linear-attention's naive forms, and the same recurrences restated without it.

Only the files of the naive forms are loaded: they need neither Triton nor a GPU. fla-core is in the extra ``test``.
"""

import importlib.metadata
import importlib.util

import pytest
import torch

from ttt.ops import sequence as ops


def naive(folder):
    """The module of fla's naive forms in ``folder``."""
    try:
        installed = importlib.metadata.distribution("fla-core")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fla-core is not installed (it is in the extra 'test')")
    path = installed.locate_file(f"fla/ops/{folder}/naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(tokens=48, heads=2, width=16):
    q, k = (torch.nn.functional.normalize(torch.randn(2, tokens, heads, width), dim=-1) for _ in range(2))
    v = torch.randn(2, tokens, heads, width)
    return q, k, v, torch.rand(2, tokens, heads), -torch.rand(2, tokens, heads)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["auto", "chunk"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_gated_delta_rule_is_that_of_fla(form, gated):
    fla = naive("gated_delta_rule")
    q, k, v, beta, g = inputs()
    g = g if gated else None
    first = torch.randn(2, 2, 16, 16)
    out, state = ops.gated_delta_rule(q, k, v, beta, g, initial_state=first, output_final_state=True, form=form)
    gate = torch.zeros_like(beta) if g is None else g
    options = {"initial_state": first, "output_final_state": True}
    for other in (
        fla.naive_recurrent_gated_delta_rule(q, k, v, beta, gate, **options),
        fla.naive_chunk_gated_delta_rule(q, k, v, gate, beta, chunk_size=16, **options),
    ):
        close(out, other[0])
        close(state, other[1])


@pytest.mark.parametrize("form", ["auto", "chunk"])
def test_ttt_linear_is_that_of_fla_where_they_agree(form):
    """fla writes all tokens of a mini-batch at the rate of its last one, and returns z + LN(z) instead of q + LN(z): so
    rates are constant here, and outputs are compared after a further norm, which undoes the first summand."""
    fla = naive("ttt")
    q, k, v, _, _ = inputs()
    weight, bias = 0.1 * torch.randn(2, 2, 16, 16), 0.1 * torch.randn(2, 2, 1, 16)
    norm = ops.Norm(torch.full((2, 16), 0.7), torch.zeros(2, 16))
    rate = torch.full((2, 48, 2), 0.05)
    state = ops.new_memory_state([weight[0], bias[0, :, 0]], 2)
    for held in (state.weights, state.start):
        held[0].copy_(weight)
        held[1].copy_(bias.squeeze(2))
    out, final = ops.memory(
        q, k, v, rate, [weight[0], bias[0, :, 0]], norm=norm, mini_batch=16, scale=0.25, initial_state=state,
        output_final_state=True, form=form,
    )  # fmt: skip
    other, other_weight, other_bias = fla.chunk_ttt_linear_ref(
        q.clone(), k, v, *norm[:2], rate.unsqueeze(-1), scale=0.25, mini_batch_size=16, initial_state=weight,
        initial_state_bias=bias, output_final_state=True,
    )  # fmt: skip
    close(final.weights[0], other_weight)
    close(final.weights[1], other_bias.squeeze(2))
    plain = torch.nn.functional.layer_norm(other, (16,))
    torch.testing.assert_close((out - 0.25 * q) / 0.7, plain, rtol=1e-3, atol=1e-3)


def test_titans_factors_are_the_sums_of_products_that_the_paper_writes_out():
    """M_t of a memory of one number, written as one sum over all gradients, tokens and momenta."""
    tokens = 6
    rate, forget, momentum = torch.rand(3, 1, tokens, 1, dtype=torch.float64)
    q = torch.ones(1, tokens, 1, 1, dtype=torch.float64)
    k, v = torch.randn(2, 1, tokens, 1, 1, dtype=torch.float64)
    weights = [torch.full((1, 1, 1), 0.3, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)]
    out, _ = ops.titans(q, k, v, rate, forget, momentum, weights, mini_batch=tokens)
    for t in range(tokens):
        total = 0.3 * torch.prod(1 - forget[0, : t + 1, 0])
        for s in range(t + 1):
            kept = torch.prod(1 - forget[0, s + 1 : t + 1, 0])
            for j in range(s + 1):
                error = 0.3 * k[0, j, 0, 0] - v[0, j, 0, 0]
                # The bias learns with an input of 1, and is read with a query of 1.
                gradient = error * (k[0, j, 0, 0] + 1)
                total = total - kept * torch.prod(momentum[0, j + 1 : s + 1, 0]) * rate[0, j, 0] * gradient
        close(out[0, t, 0, 0], total)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_lact_written_out(orthogonal):
    """Chunk by chunk with autograd's gradients and the singular values that Newton-Schulz steps bring near 1."""
    tokens, size, width, inner = 22, 5, 6, 8
    q, v = torch.randn(2, 1, tokens, 1, width, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(1, tokens, 1, width, dtype=torch.float64), dim=-1)
    rates, momentum = torch.rand(1, tokens, 1, 3, dtype=torch.float64) * 0.1, torch.rand(1, tokens, 1).double()
    weights = [torch.randn(s, dtype=torch.float64) for s in ((width, inner), (inner, width), (width, inner))]
    out, _ = ops.lact(q, k, v, rates, [w.unsqueeze(0) for w in weights], momentum=momentum, chunk_size=size,
                      orthogonal=orthogonal)  # fmt: skip
    norms, velocity = [w.norm(dim=0) for w in weights], [torch.zeros_like(w) for w in weights]

    def f(x, w):
        return (torch.nn.functional.silu(x @ w[0]) * (x @ w[2])) @ w[1]

    for at in range(0, tokens, size):
        chunk = slice(at, at + size)
        close(out[0, chunk, 0], f(q[0, chunk, 0], weights))
        if at + size > tokens:
            break
        change = [torch.zeros_like(w) for w in weights]
        for t in range(at, at + size):
            leaves = [w.clone().requires_grad_() for w in weights]
            gradient = torch.autograd.grad(-(f(k[0, t, 0], leaves) * v[0, t, 0]).sum(), leaves)
            change = [c - rates[0, t, 0, i] * g for i, (c, g) in enumerate(zip(change, gradient, strict=True))]
        velocity = [momentum[0, chunk, 0].mean() * m + c for m, c in zip(velocity, change, strict=True)]
        new = []
        for w, m, norm in zip(weights, velocity, norms, strict=True):
            if orthogonal:
                u, s, vh = torch.linalg.svd(m, full_matrices=False)
                s = s / (s.norm() + 1e-7)
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                m = u @ torch.diag(s) @ vh
            w = w + m
            new.append(w * norm / (w.norm(dim=0) + 1e-5))
        weights = new


def test_in_place_ttt_written_out():
    q, k = torch.randn(2, 1, 12, 1, 4, dtype=torch.float64)
    v, rate = torch.randn(1, 12, 1, 3, dtype=torch.float64), torch.rand(1, 12, 1, dtype=torch.float64)
    first = torch.randn(1, 4, 3, dtype=torch.float64)
    out, _ = ops.in_place_ttt(q, k, v, rate, first, chunk_size=5, scale=2.0)
    for t in range(12):
        past = range(t // 5 * 5)
        weight = first[0] + sum(rate[0, s, 0] * torch.outer(k[0, s, 0], v[0, s, 0]) for s in past)
        close(out[0, t, 0], 2.0 * q[0, t, 0] @ weight)
