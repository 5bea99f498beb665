"""Measurements: `bench.kernels` of speed, `bench.learning` of what is learnt and forgotten. Not part of the wheel."""
