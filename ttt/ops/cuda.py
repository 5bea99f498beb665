"""Implements the ops on CUDA: the Triton kernels, or the reference (and a record of why) without Triton."""

from __future__ import annotations
