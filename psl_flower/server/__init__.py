"""The server's end of a step, in pure torch: master copy, parts that run here, optimizer, loss, scores."""

from psl_flower.server.accumulation import Accumulated, accumulate
from psl_flower.server.additive import REFUSED, Additivity, adds_up
from psl_flower.server.examples import example_gradients
from psl_flower.server.language import causal_lm_loss
from psl_flower.server.local import LocalBackend, load_known
from psl_flower.server.loss import Loss, WeightedLoss, check_loss, loss_target, weighted
from psl_flower.server.metrics import Predictions, Scores, check_metrics, classes_of, why_no_accuracy, wrong_rows
from psl_flower.server.optimizer import OptimizerFn, RatedOptimizer, Scheduler, make_optimizer, make_scheduler
from psl_flower.server.outcome import Outcome
from psl_flower.server.part import Gradients, NothingCountsError, PartCopy, ServerPart, ServerPass, run_on_batch
from psl_flower.server.reduction import SUMMED, Reduction

__all__ = [
    "REFUSED",
    "SUMMED",
    "Accumulated",
    "Additivity",
    "Gradients",
    "LocalBackend",
    "Loss",
    "NothingCountsError",
    "OptimizerFn",
    "Outcome",
    "PartCopy",
    "Predictions",
    "RatedOptimizer",
    "Reduction",
    "Scheduler",
    "Scores",
    "ServerPart",
    "ServerPass",
    "WeightedLoss",
    "accumulate",
    "adds_up",
    "causal_lm_loss",
    "check_loss",
    "check_metrics",
    "classes_of",
    "example_gradients",
    "load_known",
    "loss_target",
    "make_optimizer",
    "make_scheduler",
    "run_on_batch",
    "weighted",
    "why_no_accuracy",
    "wrong_rows",
]
