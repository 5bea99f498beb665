"""ttt: PyTorch layers that go on learning while the model is used.

import ttt
ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25"))
learner = ttt.Learner(model)
seen = learner.observe(input_ids)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ttt import nn, ops
from ttt.checkpoint import load, save
from ttt.config import TTTConfig
from ttt.convert import adapt_, learning_layers, restore_
from ttt.fork import Memory, fork, memory
from ttt.generate import Generated
from ttt.graphed import GraphedLearner
from ttt.info import info
from ttt.learner import Learner, Outcome, Seen, Snapshot, capturable_, learning

if TYPE_CHECKING:
    from ttt.exchange import export_peft, import_peft
    from ttt.store import Store

# Imported when first used.
_LAZY = {"Store": "ttt.store", "export_peft": "ttt.exchange", "import_peft": "ttt.exchange"}

__all__ = [
    "Generated",
    "GraphedLearner",
    "Learner",
    "Memory",
    "Outcome",
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
    "restore_",
    "save",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
