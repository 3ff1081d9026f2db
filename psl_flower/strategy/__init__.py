"""The Flower strategy: the server's loop, its half of a step, and what a run leaves behind."""

from psl_flower.strategy.strategy import ParallelSplitLearning
from psl_flower.strategy.tolerance import FaultPolicy

__all__ = ["FaultPolicy", "ParallelSplitLearning"]
