"""The fleet's ops on CUDA."""

from __future__ import annotations

from ttt.ops import schema
from ttt.ops.backends import record
from ttt.ops.fleet import checks, reference


def fleet_linear(*args):
    checks.check_fleet_linear(*args)
    record("fleet_linear", "reference", "no Triton kernel yet")
    return reference.fleet_linear(*args)


def fleet_append(*args) -> None:
    checks.check_fleet_append(*args)
    record("fleet_append", "reference", "no Triton kernel yet")
    reference.fleet_append(*args)


def fleet_compress(*args) -> None:
    checks.check_fleet_compress(*args)
    record("fleet_compress", "reference", "cuSOLVER, through torch, decomposes the factors")
    reference.fleet_compress(*args)


for _function in (fleet_linear, fleet_append, fleet_compress):
    schema.implement(_function.__name__, "CUDA", _function)
