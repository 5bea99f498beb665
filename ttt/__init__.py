"""ttt: PyTorch layers that go on learning while the model is used.

import ttt
ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25"))
learner = ttt.Learner(model)
seen = learner.observe(input_ids)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ttt import nn, ops
from ttt.blocks import Outcome, capturable_, learning
from ttt.checkpoint import load, save
from ttt.config import TTTConfig
from ttt.convert import adapt_, learning_layers, restore_
from ttt.fleet.options import Fleet
from ttt.fleet.pool import Pool, pool_of, users
from ttt.fork import Memory, fork, memory
from ttt.generate import Generated
from ttt.graphed import GraphedLearner
from ttt.growth import GrowingLearner
from ttt.guard import Check, Guard
from ttt.info import info
from ttt.learner import Learner, Seen, Snapshot

if TYPE_CHECKING:
    from ttt.exchange import export_peft, import_peft
    from ttt.store import Store

# Imported when first used.
_LAZY = {"Store": "ttt.store", "export_peft": "ttt.exchange", "import_peft": "ttt.exchange"}

__all__ = [
    "Check",
    "Fleet",
    "Generated",
    "GraphedLearner",
    "GrowingLearner",
    "Guard",
    "Learner",
    "Memory",
    "Outcome",
    "Pool",
    "Seen",
    "Snapshot",
    "Store",
    "TTTConfig",
    "adapt_",
    "capturable_",
    "export_peft",
    "fork",
    "import_peft",
    "info",
    "learning",
    "learning_layers",
    "load",
    "memory",
    "nn",
    "ops",
    "pool_of",
    "restore_",
    "save",
    "users",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
