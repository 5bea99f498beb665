"""Inputs of the sequence ops, each op behind one interface, for the tests of this folder."""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from helpers import ISAS, assert_close

from ttt.ops import sequence as ops
from ttt.ops.sequence.states import tensors_of

H, D, F = 2, 5, 7
KERNEL_ISAS = [isa for isa in ISAS if "amx" not in isa]
"""The instruction sets with C++ kernels of their own for these ops."""


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def unit(*shape, dtype=torch.float64):
    return torch.nn.functional.normalize(draw(*shape, dtype=dtype), dim=-1)


def between(low, high, *shape, dtype=torch.float64):
    return low + (high - low) * torch.rand(*shape, dtype=dtype)


@dataclasses.dataclass
class Op:
    """An op with fixed first weights.

    Attributes:
        inputs: ``inputs(batch, tokens, dtype)``, the tensors of each token.
        run: ``run(*tensors, size, **options)``: the op, in chunks or mini-batches of ``size``.
        step: ``step(*tensors, size, state)``.
        begin: ``begin(batch)``: the state of new sequences.
        sized: whether the result depends on ``size``.
    """

    inputs: Callable
    run: Callable
    step: Callable
    begin: Callable
    sized: bool = True


def delta(gated, values=4):
    def inputs(batch, tokens, dtype=torch.float64):
        shape = (batch, tokens, H)
        tensors = draw(*shape, D, dtype=dtype), unit(*shape, D, dtype=dtype), draw(*shape, values, dtype=dtype)
        gates = (-between(0, 1, *shape, dtype=dtype),) if gated else ()
        return (*tensors, between(0, 1, *shape, dtype=dtype), *gates)

    return Op(
        inputs,
        lambda *ts, size, **options: ops.gated_delta_rule(*ts, chunk_size=size, **options),
        lambda *ts, size, state: ops.gated_delta_rule_step(*ts, state=state),
        lambda batch, dtype=torch.float64: torch.zeros(batch, H, D, values, dtype=dtype),
        sized=False,
    )


def learning(depth=1, normed=True, gated=False, moving=False):
    sizes = [D, *[F] * (depth - 1), D]
    weights = []
    for a, b in itertools.pairwise(sizes):
        weights += [0.4 * draw(H, a, b), 0.2 * draw(H, b)]
    norm = ops.Norm(1 + 0.2 * draw(H, D), 0.2 * draw(H, D)) if normed else None

    def inputs(batch, tokens, dtype=torch.float64):
        shape = (batch, tokens, H)
        extra = (between(0.7, 1, *shape, dtype=dtype),) if gated else ()
        extra += (between(0, 0.8, *shape, dtype=dtype),) if moving else ()
        tensors = draw(*shape, D, dtype=dtype), unit(*shape, D, dtype=dtype), draw(*shape, D, dtype=dtype)
        return (*tensors, between(0, 0.3, *shape, dtype=dtype), *extra)

    def options_of(extra, dtype):
        named = dict(zip((["gate"] if gated else []) + (["momentum"] if moving else []), extra, strict=True))
        return named | {"norm": norm and ops.Norm(norm.weight.to(dtype), norm.bias.to(dtype))}

    def run(q, k, v, rate, *extra, size, weights=weights, **options):
        return ops.memory(q, k, v, rate, weights, mini_batch=size, **options_of(extra, q.dtype), **options)

    def step(q, k, v, rate, *extra, size, state):
        return ops.memory_step(q, k, v, rate, mini_batch=size, state=state, **options_of(extra, q.dtype))

    def begin(batch, dtype=torch.float64):
        return ops.new_memory_state([w.to(dtype) for w in weights], batch, moving)

    return Op(inputs, run, step, begin)


def lact(moving, orthogonal):
    weights = [0.5 * draw(H, D, F), 0.5 * draw(H, F, D), 0.5 * draw(H, D, F)]

    def inputs(batch, tokens, dtype=torch.float64):
        shape = (batch, tokens, H)
        tensors = draw(*shape, D, dtype=dtype), unit(*shape, D, dtype=dtype), draw(*shape, D, dtype=dtype)
        extra = (between(0, 1, *shape, dtype=dtype),) if moving else ()
        return (*tensors, between(0, 0.1, *shape, 3, dtype=dtype), *extra)

    def run(q, k, v, rates, *momentum, size, weights=weights, **options):
        options |= {"momentum": momentum[0] if moving else None, "orthogonal": orthogonal}
        return ops.lact(q, k, v, rates, weights, chunk_size=size, **options)

    def step(q, k, v, rates, *momentum, size, state):
        options = {"momentum": momentum[0] if moving else None, "orthogonal": orthogonal}
        return ops.lact_step(q, k, v, rates, chunk_size=size, state=state, **options)

    def begin(batch, dtype=torch.float64):
        return ops.new_large_chunk_state([w.to(dtype) for w in weights], batch, moving, norms=True)

    return Op(inputs, run, step, begin)


def in_place(values=4):
    weight = draw(H, D, values)

    def inputs(batch, tokens, dtype=torch.float64):
        shape = (batch, tokens, H)
        tensors = draw(*shape, D, dtype=dtype), draw(*shape, D, dtype=dtype), draw(*shape, values, dtype=dtype)
        return (*tensors, between(0, 0.1, *shape, dtype=dtype))

    return Op(
        inputs,
        lambda *ts, size, weight=weight, **options: ops.in_place_ttt(*ts, weight, chunk_size=size, **options),
        lambda *ts, size, state: ops.in_place_ttt_step(*ts, chunk_size=size, state=state),
        lambda batch, dtype=torch.float64: ops.new_large_chunk_state([weight.to(dtype)], batch),
    )


OPS = {
    "DeltaNet": lambda: delta(False),
    "gated delta rule": lambda: delta(True),
    "TTT-Linear": learning,
    "TTT-MLP": lambda: learning(depth=2),
    "Titans": lambda: learning(normed=False, gated=True, moving=True),
    "Titans, two layers": lambda: learning(depth=2, normed=False, gated=True, moving=True),
    "memory with a gate": lambda: learning(gated=True),
    "memory with momentum": lambda: learning(normed=False, moving=True),
    "LaCT": lambda: lact(True, True),
    "LaCT, plain": lambda: lact(False, False),
    "In-Place TTT": in_place,
}


def doubled(tensors):
    """The same tensors in float64; None stays None."""
    return [None if t is None else t.double() for t in tensors]


def memory_case(batch, tokens, heads, dtype, width, *middles):
    """Tokens, first weights and the norm of a memory of heads of ``width``, with layers of ``middles`` in between.

    Rates and weights are such that rounding errors do not grow from token to token.
    """
    q, k = (unit(batch, tokens, heads, width, dtype=torch.float32).to(dtype) for _ in range(2))
    v = draw(batch, tokens, heads, width, dtype=torch.float32).to(dtype)
    weights = []
    for a, b in itertools.pairwise((width, *middles, width)):
        weights += [draw(heads, a, b, dtype=torch.float32), 0.1 * draw(heads, b, dtype=torch.float32)]
        weights[-2] *= 0.3 if not middles else 1 if a == width else a**-0.5
    # A norm of few numbers divides by deviations that are near 0 now and then: rounding errors would grow by each step.
    eps, most = (1e-6, 0.3) if width > 20 else (1.0, 0.1)
    most /= 1 + 4 * len(middles)
    rate = between(0, most, batch, tokens, heads, dtype=torch.float32)
    norm = ops.Norm(*(c + 0.1 * draw(heads, width, dtype=torch.float32) for c in (1, 0)), eps)
    return (q, k, v, rate), weights, norm


def wide_norm(norm):
    return ops.Norm(norm.weight.double(), norm.bias.double(), norm.eps)


def compare(found, exact, plain, isa="this processor"):
    """Outputs and states, of which those of the exact one are float64; errors name the instruction set."""
    assert_close(found[0], exact[0], plain[0], f"o of {isa}")
    for got, wanted, other in zip(*(tensors_of(x[1]) for x in (found, exact, plain)), strict=True):
        if got.dtype == torch.int64:
            assert torch.equal(got, wanted), isa
        else:
            assert_close(got, wanted, other, f"state of {isa}")
