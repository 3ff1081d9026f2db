"""Parallel split learning and the algorithms it is compared with, one a file."""

from psl_flower.experiments.algorithms.base import Algorithm
from psl_flower.experiments.algorithms.fedavg import FedAvg
from psl_flower.experiments.algorithms.pooled import Centralised, ParallelSplit
from psl_flower.experiments.algorithms.sequential import SequentialSplit
from psl_flower.experiments.algorithms.splitfed import SplitFedV1, SplitFedV2

ALGORITHM_CLASSES: dict[str, type[Algorithm]] = {
    "psl": ParallelSplit,
    "centralised": Centralised,
    "sl": SequentialSplit,
    "splitfed-v1": SplitFedV1,
    "splitfed-v2": SplitFedV2,
    "fedavg": FedAvg,
}

__all__ = ["ALGORITHM_CLASSES"]
