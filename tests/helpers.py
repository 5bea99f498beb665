"""The one rule by which tests compare a kernel with the truth."""

import torch


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error over the root mean square of the truth, in float64."""
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_close(actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, name: str) -> None:
    """``actual`` may be wrong by at most twice what ``baseline`` is, plus a few float32 roundings.

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


def assert_commit(case, ours, exact, plain) -> None:
    """State after a commit: W and F by `assert_close`, the step bumped, and not a bit of the rest written."""
    for name in ("weight", "trace"):
        if case[name] is not None:
            assert ours[name].dtype == case[name].dtype
            # Compared as changes: the weights themselves would hide an update that is wrong.
            change = [t[name].double() - case[name].double() for t in (ours, exact, plain)]
            assert_close(*change, name)
    for name in set(ORDER) - {"weight", "trace", "step"}:
        assert case[name] is None or torch.equal(ours[name], case[name]), f"{name} was written"
    assert int(ours["step"]) == int(case["step"]) + 1
