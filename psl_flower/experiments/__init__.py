"""Experiments in one process: parallel split learning and the baselines, on the same data, model and metrics."""

from psl_flower.experiments.setting import ALGORITHMS, Setting
from psl_flower.experiments.training import Training, open_training

__all__ = ["ALGORITHMS", "Setting", "Training", "open_training"]
