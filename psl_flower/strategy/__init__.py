"""The Flower strategy: the server's loop, its half of a step, and what a run leaves behind."""

from psl_flower.strategy.strategy import ParallelSplitLearning

__all__ = ["ParallelSplitLearning"]
