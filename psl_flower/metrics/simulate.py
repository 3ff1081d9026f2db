"""Which classes a plan's batches would hold, drawn without training."""

from __future__ import annotations

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.errors import ConfigError
from psl_flower.typing import IntArray


def draw_class_counts(plan: BatchPlan, rng: np.random.Generator) -> IntArray:
    """Return the class counts of every global batch of an epoch, with clients' data in a random order.

    Every client shuffles its labels and takes its quotas one after the other, as in a run. Where the plan decides the
    classes itself, its own counts are returned and nothing is drawn.

    Parameters
    ----------
    plan : BatchPlan
        T steps that use every example of its population once; the population has label counts, or the plan has class
        quotas.
    rng : np.random.Generator
        Decides the order of each client's examples.

    Returns
    -------
    (T, C) int64
        Rows add up to the batch sizes.

    Raises
    ------
    ConfigError
        If there are neither class quotas nor label counts, or the plan does not use every example once.
    """
    if plan.class_quotas is not None:
        table = np.zeros((len(plan), plan.class_quotas.shape[1]), dtype=np.int64)
        np.add.at(table, plan.steps(), plan.class_quotas)
        return table
    counts = plan.population.label_counts
    if counts is None:
        raise ConfigError("drawing classes needs the population's label_counts, which are not given")
    num_clients, num_classes = counts.shape
    rows = plan.rows()
    used = np.bincount(rows, weights=plan.quotas, minlength=num_clients)
    if not np.array_equal(used, plan.population.sizes):
        raise ConfigError("drawing classes needs a plan that uses every example of its population once")

    # Two tables of the examples, both sorted by owner: labels, shuffled within each owner, and the steps that use them.
    owners = np.repeat(np.arange(num_clients), plan.population.sizes)
    labels = np.repeat(np.tile(np.arange(num_classes), num_clients), counts.ravel())
    labels = labels[np.argsort(owners + rng.random(len(owners)))]
    by_owner = np.argsort(rows, kind="stable")  # entries are in ascending step, and stay so within an owner
    steps = np.repeat(plan.steps()[by_owner], plan.quotas[by_owner])
    return np.bincount(steps * num_classes + labels, minlength=len(plan) * num_classes).reshape(len(plan), num_classes)
