"""Replay: the past comes back, as samples, as stored logits, as layer inputs, or from a generator."""

from ttt.replay.experience import DarkExperienceReplay, ExperienceReplay
from ttt.replay.generative import GaussianMixture, GenerativeReplay
from ttt.replay.layer import LayerReplay
from ttt.replay.layer_generative import LayerGenerativeReplay
from ttt.replay.reservoir import SampleReservoir
from ttt.replay.sampled import SampledReplay
from ttt.replay.sequences import DarkSequenceReplay, SequenceReplay

__all__ = [
    "DarkExperienceReplay",
    "DarkSequenceReplay",
    "ExperienceReplay",
    "GaussianMixture",
    "GenerativeReplay",
    "LayerGenerativeReplay",
    "LayerReplay",
    "SampleReservoir",
    "SampledReplay",
    "SequenceReplay",
]
