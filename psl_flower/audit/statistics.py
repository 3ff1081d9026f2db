"""How well scores tell apart what they should, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from psl_flower.typing import FloatArray, IntArray

_REPEATS = 200
_TAILS = (2.5, 97.5)  # percentiles: an interval of 95 %


def auc(scores: FloatArray, positive: NDArray[np.bool_]) -> float:
    """Return the probability that a positive scores above a negative, ties counted half; 0.5 if one kind is missing."""
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        return 0.5
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * few))


def mean_auc(scores: FloatArray, labels: IntArray) -> float:
    """Return the mean over classes of the AUC of a class against all others.

    Parameters
    ----------
    scores : (N, C) float
        How much each example looks like each class.
    labels : (N,) int
        Classes that are not among them, or all there is, are not counted.
    """
    present = [c for c in range(scores.shape[1]) if 0 < (labels == c).sum() < len(labels)]
    return float(np.mean([auc(scores[:, c], labels == c) for c in present])) if present else 0.5


def interval(
    statistic: Callable[[IntArray], float], size: int, rng: np.random.Generator, repeats: int = _REPEATS
) -> tuple[float, float]:
    """Return a 95 % interval of a statistic by the bootstrap (percentiles).

    Parameters
    ----------
    statistic : callable
        Takes row numbers, (size,) int64, and returns the statistic of those rows.
    size : int
        Rows there are.
    """
    values = [statistic(rng.integers(0, size, size)) for _ in range(repeats)]
    low, high = np.percentile(values, _TAILS)
    return float(low), float(high)


def matched_accuracy(clusters: IntArray, labels: IntArray, num_classes: int) -> float:
    """Return the share of rows whose cluster is their class, clusters named in the best way (Hungarian method)."""
    table = np.zeros((clusters.max() + 1, num_classes))
    np.add.at(table, (clusters, labels), 1)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def p_value(value: float, by_chance: FloatArray) -> float:
    """Return how often chance does as well as `value`, which is counted among them: never 0."""
    return float((1 + (by_chance >= value).sum()) / (1 + len(by_chance)))
