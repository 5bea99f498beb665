"""Tiny cases of `bench.kernels`, and the reasons why contenders are not timed."""

from bench.kernels import measure
from bench.kernels.suites.commit import Commit
from bench.kernels.suites.decode import Decode


def tiny_commit(dtype="float32", replay=2):
    return Commit("cpu", dtype, 24, 40, 5, replay, dtype)


def tiny_decode(dtype="float32", window=4):
    return Decode("cpu", dtype, 24, 40, window, 1, dtype)


def reasons(case):
    """Contender -> reason, for those that are not timed."""
    return {row["contender"]: row["reason"] for row in measure.checked(case)[1]}
