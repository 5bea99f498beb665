"""Shared by the tests of sequence ops."""

import pytest
from sequence_cases import KERNEL_ISAS

from ttt.ops import cpu


@pytest.fixture(params=KERNEL_ISAS)
def isa(request):
    """Each instruction set that the kernels have been compiled for, which they use in the test."""
    before = cpu._C.active_isa()
    cpu._C.set_isa(request.param)
    yield request.param
    cpu._C.set_isa(before)


@pytest.fixture
def each_isa():
    """Iterates over these instruction sets, each of which the kernels use until the next: what they all are compared
    with is computed once."""
    before = cpu._C.active_isa()

    def chosen():
        for isa in KERNEL_ISAS:
            cpu._C.set_isa(isa)
            yield isa

    yield chosen
    cpu._C.set_isa(before)
