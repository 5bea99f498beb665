"""Shared by the tests of ops: each instruction set of the C++ kernels, and a Triton interpreter that works once."""

import importlib.util
import os

import pytest
from helpers import ISAS

from ttt.ops import cpu

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.work_once()


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that the kernels have been compiled for, which they use in the test."""
    before = cpu._C.active_isa()
    cpu._C.set_isa(request.param)
    assert cpu._C.active_isa() == request.param
    yield request.param
    cpu._C.set_isa(before)
