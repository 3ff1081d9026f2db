"""Experiments in one process: parallel split learning and the baselines, on the same data, model and metrics."""

from psl_flower.experiments.setting import ALGORITHMS, Setting

__all__ = ["ALGORITHMS", "Setting"]
