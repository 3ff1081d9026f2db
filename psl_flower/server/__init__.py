"""The server's part of a training in pure torch: the optimizer, the loss, what is told of them."""

from psl_flower.server.loss import WeightedLoss, weighted
from psl_flower.server.metrics import Predictions, Scores, check_metrics, classes_of, why_no_accuracy, wrong_rows
from psl_flower.server.optimizer import Scheduler, make_optimizer, make_scheduler

__all__ = [
    "Predictions",
    "Scheduler",
    "Scores",
    "WeightedLoss",
    "check_metrics",
    "classes_of",
    "make_optimizer",
    "make_scheduler",
    "weighted",
    "why_no_accuracy",
    "wrong_rows",
]
