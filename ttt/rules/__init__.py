"""Rules against forgetting that act on weights, on the loss, or on the model's shape; replay is in `ttt.replay`.

Any number of them compose in a `Trainer`, and `StreamRule`s in a `ttt.Learner`. Linear layers change by the fused
commit alone.
"""

from ttt.rules.base import Batch, Rule, configure, forward_inputs, masked, task_loss
from ttt.rules.distil import LwF, SeenOutputs, TopLogits, distillation, top_distillation, top_logits
from ttt.rules.distil_layer import LayerDistillation
from ttt.rules.importance import EWC, MAS, SynapticIntelligence, measure_importance
from ttt.rules.momentum import Momentum
from ttt.rules.orthogonal import OrthogonalUpdates
from ttt.rules.progressive import Progressive, ProgressiveNet, forward_task
from ttt.rules.stream import LogitDistillation
from ttt.rules.trainer import Trainer
from ttt.stream import Chunk, Segment, StreamRule

__all__ = [
    "EWC",
    "MAS",
    "Batch",
    "Chunk",
    "LayerDistillation",
    "LogitDistillation",
    "LwF",
    "Momentum",
    "OrthogonalUpdates",
    "Progressive",
    "ProgressiveNet",
    "Rule",
    "SeenOutputs",
    "Segment",
    "StreamRule",
    "SynapticIntelligence",
    "TopLogits",
    "Trainer",
    "configure",
    "distillation",
    "forward_inputs",
    "forward_task",
    "masked",
    "measure_importance",
    "task_loss",
    "top_distillation",
    "top_logits",
]
