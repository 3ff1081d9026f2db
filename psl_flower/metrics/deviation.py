"""How far each step's global batch is from the pooled data: in its classes, and in its mix of clients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_not_negative
from psl_flower.errors import ConfigError
from psl_flower.typing import FloatArray


def batch_deviation(batch_counts: ArrayLike, population_counts: ArrayLike) -> FloatArray:
    """Return the L1 distance between each batch's class distribution and the population's (docs/method.md, 1).

    Parameters
    ----------
    batch_counts : (T, C)
        Examples of each class in each step's global batch.
    population_counts : (C,)
        Examples of each class in the pooled data.

    Returns
    -------
    (T,) float64
        From 0 (the same distribution) to 2 (no class in common).

    Raises
    ------
    ConfigError
        If the shapes do not match, a count is negative, infinite or NaN, or a batch or the population is empty.
    """
    batches = np.asarray(batch_counts, dtype=np.float64)
    population = np.asarray(population_counts, dtype=np.float64)
    if batches.ndim != 2 or population.shape != batches.shape[1:]:
        raise ConfigError(
            f"batch_counts must have shape (steps, classes) and population_counts (classes,), got {batches.shape} and "
            f"{population.shape}"
        )
    for name, counts in (("batch_counts", batches), ("population_counts", population)):
        check_not_negative(counts, name)
    sizes = batches.sum(axis=1)
    if not sizes.all():
        raise ConfigError(f"every batch needs an example, that of step {sizes.argmin()} has none")
    if not population.any():
        raise ConfigError("the population needs an example, all population_counts are 0")
    distance: FloatArray = np.abs(batches / sizes[:, None] - population / population.sum()).sum(axis=1)
    return distance


def client_mix_deviation(plan: BatchPlan) -> FloatArray:
    """Return the L1 distance between the client shares of each step's batch, b_tk / b_t, and the population's, r_k.

    It shows what `batch_deviation` hides: batches whose classes are balanced but that come from few clients.

    Parameters
    ----------
    plan : BatchPlan
        Read entry by entry: takes memory for the entries only, not for steps x clients.

    Returns
    -------
    (T,) float64
        From 0 to 2. Even a perfectly random batch is far from 0 where clients outnumber its examples.

    Raises
    ------
    ConfigError
        If a step is empty.
    """
    sizes = plan.batch_sizes()
    if not sizes.all():
        raise ConfigError(f"every batch needs an example, that of step {sizes.argmin()} has none")
    steps, num_steps = plan.steps(), len(plan)
    expected = (plan.population.sizes / plan.population.num_examples)[plan.rows()]
    gaps = np.abs(plan.quotas / sizes[steps] - expected)
    # a client that takes no part is off by its whole r_k; together they are off by what the others' shares leave of 1
    absent = 1 - np.bincount(steps, expected, num_steps)
    distance: FloatArray = np.bincount(steps, gaps, num_steps) + absent.clip(0)
    return distance


@dataclass(frozen=True)
class DeviationSummary:
    """The deviation of an epoch's steps in three numbers; tiny tail batches dominate the plain mean.

    Parameters
    ----------
    mean : float
        Over steps.
    p95 : float
        95th percentile over steps.
    weighted_mean : float
        Over steps, each weighted by the size of its batch: the deviation that the average example was trained in.
    """

    mean: float
    p95: float
    weighted_mean: float


def summarize_deviation(deviation: ArrayLike, batch_sizes: ArrayLike) -> DeviationSummary:
    """Summarize the deviation of the steps of an epoch.

    Parameters
    ----------
    deviation : (T,) float
        Of each step, from `batch_deviation` or `client_mix_deviation`.
    batch_sizes : (T,) int
        Examples in each step's global batch, at least 1.

    Raises
    ------
    ConfigError
        If there is no step, the shapes differ, or a batch size is below 1.
    """
    values, sizes = np.asarray(deviation, dtype=np.float64), np.asarray(batch_sizes)
    if values.ndim != 1 or not len(values) or sizes.shape != values.shape:
        raise ConfigError(
            f"deviation and batch_sizes must be 1-D, of one length and not empty, got {values.shape} and {sizes.shape}"
        )
    if sizes.min() < 1:
        raise ConfigError(f"batch_sizes must be at least 1, got {sizes.min()} at step {sizes.argmin()}")
    return DeviationSummary(
        mean=float(values.mean()),
        p95=float(np.percentile(values, 95)),
        weighted_mean=float(np.average(values, weights=sizes)),
    )
