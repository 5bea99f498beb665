"""Fixtures of the tests of `bench.kernels`."""

import pytest

from bench.kernels import ceilings, state, timing


@pytest.fixture(autouse=True)
def _small_and_short(monkeypatch):
    """Layers and copies of kilobytes, and samples of 0.1 ms: these tests measure nothing."""
    monkeypatch.setattr(state, "POOL", 1 << 16)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
