"""Layers whose state is a model that learns the tokens they read, and window attention to stand beside them."""

from ttt.nn.sequence.base import LayerState, SequenceLayer
from ttt.nn.sequence.gated_delta import GatedDeltaNet
from ttt.nn.sequence.in_place import InPlaceMLP
from ttt.nn.sequence.lact import LaCT
from ttt.nn.sequence.protected_state import ProtectedState
from ttt.nn.sequence.titans import TitansMemory
from ttt.nn.sequence.ttt_linear import TTTLinear
from ttt.nn.sequence.ttt_mlp import TTTMLP
from ttt.nn.sequence.window_attention import WindowAttention

__all__ = [
    "TTTMLP",
    "GatedDeltaNet",
    "InPlaceMLP",
    "LaCT",
    "LayerState",
    "ProtectedState",
    "SequenceLayer",
    "TTTLinear",
    "TitansMemory",
    "WindowAttention",
]
