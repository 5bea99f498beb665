"""Layers that learn while they are used."""

from ttt.nn.linear import Linear, Update

__all__ = ["Linear", "Update"]
