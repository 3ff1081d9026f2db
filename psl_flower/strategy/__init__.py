"""The Flower strategy: the server's loop, its half of a step, and what a run leaves behind."""

from psl_flower.last_word import listen
from psl_flower.strategy.strategy import ParallelSplitLearning

__all__ = ["ParallelSplitLearning"]

listen()  # every ServerApp that uses the strategy imports it here
