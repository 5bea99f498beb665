"""Layers that learn while they are used."""

from ttt.nn.capture import Capturing
from ttt.nn.linear import Linear, Update
from ttt.nn.low_rank import LowRankLinear

__all__ = ["Capturing", "Linear", "LowRankLinear", "Update"]
