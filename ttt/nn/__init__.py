"""Linear layers that learn while they are used."""

from ttt._renamed import old_names
from ttt.nn.capture import Capturing
from ttt.nn.linear import Linear
from ttt.nn.low_rank import LowRankLinear
from ttt.nn.update import Update

__all__ = ["Capturing", "Linear", "LowRankLinear", "Update"]

__getattr__ = old_names(__name__, {"FleetLinear": "LowRankLinear"}, globals())
