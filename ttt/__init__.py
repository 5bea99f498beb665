"""ttt: PyTorch layers that go on learning while the model is used.

import ttt
ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25"))
learner = ttt.Learner(model)
seen = learner.observe(input_ids)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ttt import nn, ops
from ttt.adapt.checkpoint import load, save
from ttt.adapt.convert import adapt_, learning_layers, restore_
from ttt.adapt.fork import Memory, fork, memory
from ttt.config import TTTConfig
from ttt.experts.learner import GrowingLearner
from ttt.info import info
from ttt.learn.any_loss import Outcome, capturable_, learning
from ttt.learn.cuda_graph import GraphedLearner
from ttt.learn.generate import Generated
from ttt.learn.guard import Check, Guard
from ttt.learn.learner import Learner, Seen, Snapshot
from ttt.options import LowRank
from ttt.per_user.pool import Pool, pool_of, users

if TYPE_CHECKING:
    from ttt.adapt import export_peft, import_peft
    from ttt.store import Store

# Imported when first used.
_LAZY = {"Store": "ttt.store", "export_peft": "ttt.adapt", "import_peft": "ttt.adapt"}

__all__ = [
    "Check",
    "Generated",
    "GraphedLearner",
    "GrowingLearner",
    "Guard",
    "Learner",
    "LowRank",
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
