"""ttt: PyTorch layers that go on learning while the model is used.

import ttt
ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25"))
learner = ttt.Learner(model)
seen = learner.observe(input_ids)
"""

from ttt import nn, ops
from ttt.checkpoint import load, save
from ttt.config import TTTConfig
from ttt.convert import adapt_, learning_layers, restore_
from ttt.fork import Memory, fork, memory
from ttt.generate import Generated
from ttt.graphed import GraphedLearner
from ttt.growth import GrowingLearner
from ttt.guard import Check, Guard
from ttt.info import info
from ttt.learner import Learner, Outcome, Seen, Snapshot, capturable_, learning

__all__ = [
    "Check",
    "Generated",
    "GraphedLearner",
    "GrowingLearner",
    "Guard",
    "Learner",
    "Memory",
    "Outcome",
    "Seen",
    "Snapshot",
    "TTTConfig",
    "adapt_",
    "capturable_",
    "fork",
    "info",
    "learning",
    "learning_layers",
    "load",
    "memory",
    "nn",
    "ops",
    "restore_",
    "save",
]
