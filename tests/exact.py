"""The commit in float64, independent of `ttt.ops`, and an element by element comparison of stored state with it.

A kernel and `ttt.ops.reference` round 16-bit state with the same random bits, so what they store differs only where the
float32 sums before rounding differ enough to cross a rounding threshold. `assert_stored` therefore allows one unit in
the last place for a small share of the elements, which the error of a correct kernel explains, and nothing beyond.
"""

import torch

from ttt.ops import log8
from ttt.ops.rounding import momentum_rounding_bits, rounding_bits, trace_rounding_bits

D = torch.float64
EPSILON = 2.0**-24
"""Largest relative error of one rounding to float32."""


def double(t):
    return t.double() if t is not None and t.is_floating_point() else t


def values(state, n):
    """Importance or trace in float64."""
    return log8.decode(state, n).double() if log8.is_packed(state) else state.double()


def moved(w, m, gradient, tokens, mu):
    """(W, M) after ``tokens`` tokens, each with its share of ``gradient``; M may be None."""
    if m is None:
        return w - gradient, None
    for _ in range(tokens):
        m = mu * m + gradient / tokens
        w = w - m
    return w, m


def weight_after(case, rows, *, beta, eps, lam, mu=0.0, decay=0.0, rounded_step=False, **_):
    """(W, M, size): both (m, n) before they are rounded, and the sum of the magnitudes that W is made of.

    Args:
        case: the tensors of `ttt.ops.commit`.
        rows: (R, n), the replay rows; R may be 0.
        rounded_step: eta delta is rounded to bfloat16 for the tokens' gradient, but not for the drift of the rows.
    """
    w, anchor, x, delta, eta, m = (double(case.get(k)) for k in ("weight", "anchor", "x", "delta", "eta", "momentum"))
    tokens, n = x.shape
    step = eta.unsqueeze(1) * delta
    size = w.abs() + step.abs().T @ x.abs() + (0 if m is None else m.abs() / (1 - mu))
    seen_by_rows, _ = moved(w, m, step.T @ x, tokens, mu)
    if rounded_step:
        step = step.float().bfloat16().double()
    w, m = moved(w, m, step.T @ x, tokens, mu)
    if len(rows):
        r = rows.double()
        gram = r @ r.T
        ridge = eps * float(gram.diagonal().mean()) or 1.0
        inverse = torch.linalg.inv(gram + ridge * torch.eye(len(r), dtype=D))
        v = beta * inverse @ r
        size = size + ((size + anchor.abs()) @ r.abs().T) @ v.abs()
        w = w - ((seen_by_rows - anchor) @ r.T) @ v
    pull = torch.zeros_like(w)
    if lam:
        pull = pull + lam * eta.sum() * values(case["importance"], n)
    if decay:
        pull = pull + decay * eta.sum()
    if lam or decay:
        w, size = anchor + (w - anchor) / (1 + pull), size + anchor.abs()
    return w, m, size


def commit(case, *, rows, **options):
    """The weight (m, n) after a commit of ``case`` that replays ``rows`` (R, n), before it is rounded."""
    return weight_after(case, rows, **options)[0]


def steps(case, *, mu, decay, lam=0.0, **_):
    """(W, M) after the tokens of ``case`` by the recurrence of Titans, without replay, before they are rounded."""
    return weight_after(case, case["x"][:0], beta=0.0, eps=0.0, lam=lam, mu=mu, decay=decay)[:2]


def factors_of(case, kind, gamma, rounded):
    """The factors of S, (T, m) and (T, n) in float64; ``rounded`` to bfloat16 as kernels for pairs of it take them."""
    p, x = (case["delta"] if case["trace_delta"] is None else case["trace_delta"]).float(), case["x"].float()
    if kind == "si":
        return p.double(), x.double()
    age = gamma ** torch.arange(len(x) - 1, -1, -1, dtype=D, device=x.device).unsqueeze(1)
    left, right = (p * p, x * x) if kind == "fisher" else (p.abs(), x.abs())
    if rounded:
        return (left * age.float()).bfloat16().double(), right.bfloat16().double()
    left, right = (p.double().square(), x.double().square()) if kind == "fisher" else (left.double(), right.double())
    return left * age, right


def trace_after(case, stored, *, kind, gamma, rounded=False, **_):
    """(F, size) before F is rounded; ``stored`` is the weight after the commit, which Synaptic Intelligence reads."""
    tokens, n = case["x"].shape
    left, right = factors_of(case, kind, gamma, rounded)
    s, before = left.T @ right, gamma**tokens * values(case["trace"], n)
    size = before.abs() + left.abs().T @ right.abs()
    if kind == "si":
        moved = case["weight"].double() - stored.double()
        return before + s * moved, before.abs() + left.abs().T @ right.abs() * moved.abs()
    return before + s, size


DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that a 16-bit number has no place for."""


def unit_of(value, dtype):
    """The unit in the last place of 16-bit numbers of the magnitude of ``value``."""
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.ones_like(value), exponent - (24 - DROPPED[dtype]))


def rounded_to(value, bits, dtype):
    """float64 ``value`` in 16 bits: its magnitude is cut off after a random part of a unit is added."""
    unit, low = unit_of(value, dtype), 1 << DROPPED[dtype]
    return (value.sign() * torch.floor(value.abs() / unit + (bits & low - 1).double() / low) * unit).to(dtype)


def assert_stored(actual, value, size, bits, name, *, flips, terms):
    """``actual`` is ``value``, rounded as its dtype is.

    Args:
        value: (m, n) float64, before rounding.
        size: (m, n), the sum of the magnitudes that it is made of: float32 errors are in proportion to it.
        bits: (m, n) int64, its rounding bits.
        flips: the share of elements that may be one unit in the last place off; for float32, beyond the bound.
        terms: how many roundings to float32 an element has behind it.
    """
    n = value.shape[1]
    if actual.dtype == torch.float32:
        wrong = (actual.double() - value).abs() > terms * EPSILON * size + EPSILON * value.abs()
        far = (actual.double() - value).abs() > 2.0**-8 * size
    elif log8.is_packed(actual):
        expected = log8.encode(value.float(), bits)
        assert torch.equal(actual[:, n:], expected[:, n:]), f"{name}: exponents differ"
        apart = (actual[:, :n].int() - expected[:, :n].int()).abs()
        wrong, far = apart > 0, apart > 1
    else:
        expected, unit = rounded_to(value, bits, actual.dtype), unit_of(value, actual.dtype)
        apart = (actual.double() - expected.double()).abs()
        # Where the terms nearly cancel, their errors are large beside a unit of what is left: bounded, but not counted.
        wrong, far = (apart > 0) & (unit > 2.0**-12 * size), apart > unit + 2.0**-16 * size
    share = float(wrong.double().mean())
    assert not bool(far.any()), f"{name}: {int(far.sum())} of {far.numel()} elements are far off"
    assert share <= flips, f"{name}: {share:.2%} of the elements are off, {flips:.2%} may be"


def assert_committed(
    case, after, rows, options, *, flips=0.01, rounded_step=False, rounded_factors=(False,), split=False
):
    """The state ``after`` a commit of ``case`` that replayed ``rows``, all of it, element by element.

    Args:
        rounded_step: as in `weight_after`.
        rounded_factors: whether the factors of the trace are rounded to bfloat16; one of the given answers must fit.
        split: eta delta is taken as two bfloat16 numbers, whose sum is off by up to 2^-17.
    """
    m, n = case["weight"].shape
    step, seed = case["step"], options["seed"]
    weight, momentum, size = weight_after(case, rows, rounded_step=rounded_step, **options)
    terms = 16 + len(case["x"]) + (2**7 if split else 0)
    bits = rounding_bits(m, n, step, seed)
    assert_stored(after["weight"], weight, size, bits, "weight", flips=flips, terms=terms)
    if momentum is not None:
        bits = momentum_rounding_bits(m, n, step, seed)
        assert_stored(after["momentum"], momentum, size, bits, "momentum", flips=flips, terms=terms)
    if case["trace"] is not None:
        bits, failures = trace_rounding_bits(m, n, step, seed), []
        for rounded in rounded_factors:
            trace, size = trace_after(case, after["weight"], rounded=rounded, **options)
            try:
                assert_stored(after["trace"], trace, size, bits, "trace", flips=flips, terms=terms)
            except AssertionError as error:
                failures.append(error)
        if len(failures) == len(rounded_factors):
            raise failures[0]
    written = {"weight", "trace", "momentum", "step"}
    for name in set(case) - written:
        assert case[name] is None or torch.equal(after[name], case[name]), f"{name} was written"
    assert int(after["step"]) == int(step) + 1
