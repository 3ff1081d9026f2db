"""Plan steps become work orders: where each client stands in its epoch's order of examples."""

from __future__ import annotations

import numpy as np

from psl_flower.protocol import WorkOrder
from psl_flower.samplers.base import BatchPlan, PlanStep


class Cursors:
    """How far each client is in its order of examples for an epoch; moved on only by committed steps.

    Parameters
    ----------
    plan : BatchPlan
        The epoch's.
    seed, epoch : int
        Of the clients' orders.
    """

    def __init__(self, plan: BatchPlan, *, seed: int, epoch: int) -> None:
        self._clients = plan.population.client_ids
        self._seed, self._epoch = seed, epoch
        self._used = np.zeros(len(self._clients), dtype=np.int64)
        classes = 0 if plan.class_quotas is None else plan.class_quotas.shape[1]
        self._used_by_class = np.zeros((len(self._clients), classes), dtype=np.int64)

    def orders(self, index: int, step: PlanStep) -> list[WorkOrder]:
        """Return the work orders of step `index` of the epoch, in ascending client id."""
        rows = np.searchsorted(self._clients, step.clients)
        by_class = step.class_quotas is not None
        return [
            WorkOrder(
                client=int(client),
                seed=self._seed,
                epoch=self._epoch,
                step=index,
                start=int(self._used[row]),
                count=int(quota),
                class_starts=self._used_by_class[row].copy() if by_class else None,
                class_counts=None if step.class_quotas is None else step.class_quotas[i],
            )
            for i, (client, row, quota) in enumerate(zip(step.clients, rows, step.quotas, strict=True))
        ]

    def advance(self, step: PlanStep) -> None:
        """Count a committed step's examples as used."""
        rows = np.searchsorted(self._clients, step.clients)
        self._used[rows] += step.quotas
        if step.class_quotas is not None:
            self._used_by_class[rows] += step.class_quotas
