"""Comparison of kernels with exact results, and the configuration that most tests vary."""

import torch

import ttt
from ttt.ops import cpu, log8
from ttt.ops.philox import choose_tokens
from ttt.ops.rounding import stochastic_round_, trace_rounding_bits

PLAIN = {
    "rate": "constant", "lr": 5e-3, "clip": None, "burst": None, "feedback": 0.0, "ewc_lambda": 0.01,
    "replay_rows": 4, "replay_beta": 0.3, "orthogonal": 0, "kronecker": 0,
}  # fmt: skip


ISAS = [] if cpu._C is None else cpu._C.available_isas()
"""The instruction sets to test; matrix units are emulated if the processor multiplies pairs of bfloat16."""
ISAS += ["amx, emulated"] if "avx512bf16" in ISAS else []


def multiplies_pairs(isa: str) -> bool:
    """Whether kernels for ``isa`` multiply bfloat16 without widening it."""
    return isa == "avx512bf16" or isa.startswith("amx")


def plain_config(**options) -> ttt.TTTConfig:
    """EWC and layer replay at a constant rate, changed by ``options``; tests do not depend on ttt's defaults."""
    return ttt.TTTConfig().with_flat(**PLAIN | options)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error relative to the root mean square of ``exact``, in float64."""
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_close(actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, name: str) -> None:
    """Check that the error of ``actual`` is at most twice that of ``baseline``, plus a few float32 roundings.

    Args:
        actual: what the kernel computed.
        exact: the float64 reference on the same inputs.
        baseline: the same formula in plain torch at the kernel's own dtype.
    """
    assert actual.shape == exact.shape == baseline.shape, f"{name}: {actual.shape}, {exact.shape}, {baseline.shape}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error, allowed = relative_error(actual, exact), 2 * relative_error(baseline, exact) + 4 * 2**-23
    # A change that is exactly zero has no relative error.
    if float(exact.double().norm()) == 0:
        assert float(actual.double().norm()) <= 1e-6, f"{name} must be zero"
        return
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


ORDER = ("weight", "anchor", "importance", "trace", "x", "delta", "eta", "trace_delta", "memory", "seen", "step")


def as_double(t: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """``t`` in float64; 8-bit state is decoded, and other tensors of integers stay as they are."""
    if log8.is_packed(t):
        return log8.decode(t, n).double()
    return t.double() if t is not None and t.is_floating_point() else t


def trace_of_rounded_factors(case, options) -> torch.Tensor:
    """The trace after a commit with bfloat16 weights if both factors of S are rounded to bfloat16.

    This is how kernels that multiply pairs of bfloat16 compute it, and plain torch at that dtype.
    """
    p, x = case["delta" if case["trace_delta"] is None else "trace_delta"], case["x"]
    tokens, n = x.shape
    decay = options["gamma"] ** torch.arange(tokens - 1, -1, -1, device=x.device).unsqueeze(1)
    if options.get("trace_every", 1) > 1:
        token, size = choose_tokens(tokens, options["trace_every"], case["step"], options["seed"])
        p, x, decay = p[token], x[token], decay[token] * size.unsqueeze(1)
    fisher = options["kind"] == "fisher"
    left = ((p.float().square() if fisher else p.float().abs()) * decay).bfloat16()
    right = (x.float().square() if fisher else x.float().abs()).bfloat16()
    value = options["gamma"] ** tokens * as_double(case["trace"], n).float() + left.float().T @ right.float()
    bits = trace_rounding_bits(*case["weight"].shape, case["step"], options["seed"])
    if log8.is_packed(case["trace"]):
        return log8.encode(value, bits)
    trace = case["trace"].clone()
    stochastic_round_(trace, value, bits)
    return trace


def assert_commit(case, ours, exact, plain) -> None:
    """Check the state after a commit: W and F with `assert_close`, the step plus one, and no other bit changed."""
    n = case["x"].shape[1]
    for name in ("weight", "trace"):
        if case[name] is not None:
            assert ours[name].dtype == case[name].dtype
            assert ours[name].shape == case[name].shape
            # Compared as changes: the weights themselves would hide an update that is wrong.
            change = [as_double(t[name], n) - as_double(case[name], n) for t in (ours, exact, plain)]
            assert_close(*change, name)
    for name in set(ORDER) - {"weight", "trace", "step"}:
        assert case[name] is None or torch.equal(ours[name], case[name]), f"{name} was written"
    assert int(ours["step"]) == int(case["step"]) + 1
