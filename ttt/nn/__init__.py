"""Layers that learn while they are used."""

from ttt.nn.capture import Capturing
from ttt.nn.fleet import FleetLinear
from ttt.nn.linear import Linear, Update

__all__ = ["Capturing", "FleetLinear", "Linear", "Update"]
