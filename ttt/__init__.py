"""ttt: PyTorch layers that go on learning while the model is used.

import ttt
ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:0.25"))
learner = ttt.Learner(model)
output = learner.observe(input_ids)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ttt import nn, ops
from ttt._renamed import old_names
from ttt.adapt.checkpoint import load, save
from ttt.adapt.convert import adapt_, learning_layers, restore_
from ttt.adapt.fork import MemoryUsage, fork, memory_usage
from ttt.adapt.version import version
from ttt.config import TTTConfig
from ttt.defences import (
    EWC,
    MAS,
    SI,
    Decay,
    DriftBudget,
    KroneckerFisher,
    LayerDistillation,
    LayerGenerativeReplay,
    LayerReplay,
    LowRank,
    OrthogonalUpdates,
)
from ttt.experts.learner import GrowingLearner
from ttt.info import info
from ttt.learn.any_loss import LearningResult, capturable_, learning
from ttt.learn.cuda_graph import GraphedLearner
from ttt.learn.episodes import EpisodeLog
from ttt.learn.generate import GenerateOutput
from ttt.learn.guard import Guard, GuardCheck
from ttt.learn.learner import Learner
from ttt.learn.loop import ObserveOutput
from ttt.learn.snapshot import Snapshot
from ttt.learn.study import StudyOutput
from ttt.per_user.pacing import GuardTripped
from ttt.per_user.pool import Pool, pool_of, users

if TYPE_CHECKING:
    from ttt.adapt import LearntState, export_peft, import_peft
    from ttt.store import Store

__all__ = [
    "EWC",
    "MAS",
    "SI",
    "Decay",
    "DriftBudget",
    "EpisodeLog",
    "GenerateOutput",
    "GraphedLearner",
    "GrowingLearner",
    "Guard",
    "GuardCheck",
    "GuardTripped",
    "KroneckerFisher",
    "LayerDistillation",
    "LayerGenerativeReplay",
    "LayerReplay",
    "Learner",
    "LearningResult",
    "LearntState",
    "LowRank",
    "MemoryUsage",
    "ObserveOutput",
    "OrthogonalUpdates",
    "Pool",
    "Snapshot",
    "Store",
    "StudyOutput",
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
    "memory_usage",
    "nn",
    "ops",
    "pool_of",
    "restore_",
    "save",
    "users",
    "version",
]

# Imported when first used.
_LAZY = {"LearntState": "ttt.adapt", "Store": "ttt.store", "export_peft": "ttt.adapt", "import_peft": "ttt.adapt"}

_OLD = {
    "Check": "GuardCheck",
    "Fleet": "LowRank",
    "Generated": "GenerateOutput",
    "Memory": "MemoryUsage",
    "Outcome": "LearningResult",
    "Seen": "ObserveOutput",
    "memory": "memory_usage",
}
_old_name = old_names(__name__, _OLD, globals())


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    return _old_name(name)
