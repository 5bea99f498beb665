"""The old name of what is now in `ttt.rules`; kept for one release."""

import warnings

from ttt.rules import (
    DarkExperienceReplay,
    DarkSequenceReplay,
    ExperienceReplay,
    GaussianMixture,
    GenerativeReplay,
    LayerGenerativeReplay,
    LayerReplay,
    SampledReplay,
    SampleReservoir,
    SequenceReplay,
)

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

warnings.warn("ttt.replay is now ttt.rules", DeprecationWarning, stacklevel=2)
