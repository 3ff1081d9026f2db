"""Who is slow, by how much, and what that costs."""

from psl_flower.stragglers.clock import VirtualClock, step_times
from psl_flower.stragglers.delays import (
    DELAY_MODELS,
    CsvDelays,
    DelayModel,
    LognormalDelays,
    NoDelays,
    SlowFractionDelays,
    delay_model,
)
from psl_flower.stragglers.estimate import DelayEstimator

__all__ = [
    "DELAY_MODELS",
    "CsvDelays",
    "DelayEstimator",
    "DelayModel",
    "LognormalDelays",
    "NoDelays",
    "SlowFractionDelays",
    "VirtualClock",
    "delay_model",
    "step_times",
]
