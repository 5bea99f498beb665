"""Rules against forgetting: on weights, on the loss, on the model's shape, and by replay.

`ttt.rules.task` serves sequences of tasks: any number of its rules compose in a `Trainer`. `ttt.rules.stream` serves
text: a `ttt.Learner` takes those. A `Trainer` also takes the defences of `ttt.TTTConfig` that need nothing at the end
of a task, such as `ttt.LayerReplay`. Linear layers change by the fused commit alone.
"""

from ttt.defences import KroneckerFisher, LayerDistillation, LayerGenerativeReplay, LayerReplay, OrthogonalUpdates
from ttt.learn.stream_rule import Chunk, Segment, StreamRule
from ttt.rules.reservoir import SampleReservoir
from ttt.rules.stream.distillation import LogitDistillation
from ttt.rules.stream.sampled_replay import SampledReplay
from ttt.rules.stream.sequence_replay import DarkSequenceReplay, SequenceReplay
from ttt.rules.task.base import Batch, Rule, configure, forward_inputs, masked, task_loss
from ttt.rules.task.distillation import LwF, SeenOutputs, TopLogits, distillation, top_distillation, top_logits
from ttt.rules.task.experience import DarkExperienceReplay, ExperienceReplay
from ttt.rules.task.generative import GaussianMixture, GenerativeReplay
from ttt.rules.task.importance import EWC, MAS, SynapticIntelligence, measure_importance
from ttt.rules.task.momentum import Momentum
from ttt.rules.task.progressive import Progressive, ProgressiveNet, forward_task
from ttt.rules.task.trainer import Trainer

__all__ = [
    "EWC",
    "MAS",
    "Batch",
    "Chunk",
    "DarkExperienceReplay",
    "DarkSequenceReplay",
    "ExperienceReplay",
    "GaussianMixture",
    "GenerativeReplay",
    "KroneckerFisher",
    "LayerDistillation",
    "LayerGenerativeReplay",
    "LayerReplay",
    "LogitDistillation",
    "LwF",
    "Momentum",
    "OrthogonalUpdates",
    "Progressive",
    "ProgressiveNet",
    "Rule",
    "SampleReservoir",
    "SampledReplay",
    "SeenOutputs",
    "Segment",
    "SequenceReplay",
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
