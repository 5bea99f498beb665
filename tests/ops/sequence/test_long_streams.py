"""Long streams: states stay finite, and reading in chunks ends where reading token by token does."""

import pytest
import torch
from helpers import relative_error

from ttt.ops import sequence as ops
from ttt.ops.sequence.states import tensors_of


def stream(tokens, heads=1, width=8):
    q, k = (torch.nn.functional.normalize(torch.randn(1, tokens, heads, width), dim=-1) for _ in range(2))
    return q, k, torch.randn(1, tokens, heads, width), torch.rand(1, tokens, heads)


def in_pieces(run, tensors, size):
    """The state after all tokens, which are read ``size`` at a time."""
    state = None
    for at in range(0, tensors[0].shape[1], size):
        _, state = run([t[:, at : at + size] for t in tensors], state)
    return state


@pytest.mark.parametrize("gated", [False, True])
def test_a_million_tokens_of_the_delta_rule(gated):
    """Without gates nothing is ever forgotten but by being overwritten. One state is read by a kernel in one call, one
    by the torch form, and one by steps for the last 20,000 tokens, which is where a state's memory ends."""
    q, k, v, beta = stream(1_000_000)
    g = torch.rand_like(beta).log() * 0.01 if gated else None
    given = [q, k, v, beta] if g is None else [q, k, v, beta, g]
    _, state = ops.gated_delta_rule(*given, output_final_state=True)
    assert all(t.isfinite().all() for t in tensors_of(state))
    _, other = ops.gated_delta_rule(*given, output_final_state=True, form="chunk", chunk_size=64)
    assert relative_error(other, state) < 1e-5
    _, stepped = ops.gated_delta_rule(*(t[:, :-20_000] for t in given), output_final_state=True)
    for t in range(980_000, 1_000_000):
        ops.gated_delta_rule_step(*(x[:, t] for x in given), state=stepped)
    assert relative_error(stepped, state) < 1e-5


def test_a_long_stream_of_ttt_linear():
    """A million tokens by the kernel; 100,000 by the torch form; 20,000 by steps."""
    q, k, v, rate = stream(1_000_000)
    weights = [torch.zeros(1, 8, 8), torch.zeros(1, 8)]
    norm = ops.Norm(torch.ones(1, 8), torch.zeros(1, 8))
    options = {"norm": norm, "mini_batch": 16, "output_final_state": True}
    tensors = [q, k, v, 0.2 * rate]
    _, state = ops.memory(*tensors, weights, **options)
    pieces = in_pieces(lambda ts, s: ops.memory(*ts, weights, initial_state=s, **options), tensors, 333_333)
    assert all(t.isfinite().all() for t in tensors_of(state))
    for a, b in zip(tensors_of(pieces), tensors_of(state), strict=True):
        assert relative_error(a, b) < 1e-5
    part = [t[:, :100_000] for t in tensors]
    _, by_kernel = ops.memory(*part, weights, **options)
    _, by_torch = ops.memory(*part, weights, form="chunk", **options)
    stepped = ops.memory(*(t[:, :80_000] for t in tensors), weights, **options)[1]
    for t in range(80_000, 100_000):
        ops.memory_step(*(x[:, t] for x in tensors), norm=norm, mini_batch=16, state=stepped)
    for a, b, c in zip(*map(tensors_of, (by_kernel, by_torch, stepped)), strict=True):
        assert relative_error(b, a) < 1e-5
        assert relative_error(c, a) < 1e-5


def test_a_long_stream_of_ttt_mlp():
    """20,000 tokens by the kernel and by the torch form; the last 2,000 by steps too."""
    q, k, v, rate = stream(20_000)
    weights = [torch.randn(1, 8, 24), torch.zeros(1, 24), torch.randn(1, 24, 8) / 5, torch.zeros(1, 8)]
    options = {"norm": ops.Norm(torch.ones(1, 8), torch.zeros(1, 8)), "mini_batch": 16}
    tensors = [q, k, v, 0.02 * rate]
    by_kernel = ops.memory(*tensors, weights, output_final_state=True, **options)[1]
    by_torch = ops.memory(*tensors, weights, output_final_state=True, form="chunk", **options)[1]
    stepped = ops.memory(*(t[:, :18_000] for t in tensors), weights, output_final_state=True, **options)[1]
    for t in range(18_000, 20_000):
        ops.memory_step(*(x[:, t] for x in tensors), state=stepped, **options)
    for a, b, c in zip(*map(tensors_of, (by_kernel, by_torch, stepped)), strict=True):
        assert relative_error(b, a) < 1e-4
        assert relative_error(c, a) < 1e-4


@pytest.mark.parametrize("which", ["Titans", "TTT-MLP", "LaCT", "LaCT, plain"])
def test_other_states_stay_finite(which):
    """And equal, read in other pieces. Where Newton-Schulz steps replace most of the weights, rounding grows from chunk
    to chunk: only the first chunks are compared there."""
    q, k, v, rate = stream(20_000)
    wide = [0.3 * torch.randn(s) for s in ((1, 8, 16), (1, 16), (1, 16, 8), (1, 8))]

    def run(tensors, state):
        options = {"initial_state": state, "output_final_state": True}
        q, k, v, rate = tensors
        if which.startswith("LaCT"):
            weights = [wide[0], wide[2], wide[0]]
            rates, momentum = 0.1 * rate.unsqueeze(-1).expand(*rate.shape, 3), rate
            options |= {"momentum": momentum, "orthogonal": which == "LaCT"}
            return ops.lact(q, k, v, rates, weights, chunk_size=128, **options)
        if which == "Titans":
            weights = [torch.zeros(1, 8, 8), torch.zeros(1, 8)]
            return ops.titans(q, k, v, 0.1 * rate, 0.01 * rate, 0.9 * rate, weights, **options)
        return ops.ttt_mlp(q, k, v, 0.1 * rate, wide, ops.Norm(torch.ones(1, 8), torch.zeros(1, 8)), **options)

    state = in_pieces(run, [q, k, v, rate], 20_000)
    assert all(t.isfinite().all() for t in tensors_of(state))
    tokens = 300 if which == "LaCT" else 20_000
    first = [t[:, :tokens] for t in (q, k, v, rate)]
    one, other = in_pieces(run, first, 20_000), in_pieces(run, first, tokens // 3)
    for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
        assert relative_error(a, b) < 1e-3
