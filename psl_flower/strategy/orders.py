"""Plan steps become work orders: where each client stands in its epoch's order of examples."""

from __future__ import annotations

import numpy as np

from psl_flower.batch_plan import PlanStep
from psl_flower.protocol import WorkOrder
from psl_flower.typing import IntArray


class Cursors:
    """How far each client is in its order of examples for an epoch; moved on only by committed steps.

    Parameters
    ----------
    client_ids : (K,) int64
        Ascending.
    seed, epoch : int
        Of the clients' orders.

    Attributes
    ----------
    used : (K,) int64
        Examples each client has used.
    used_by_class : (K, C) int64
        The same for each class, as far as steps had class quotas.
    """

    def __init__(self, client_ids: IntArray, *, seed: int, epoch: int) -> None:
        self._clients = client_ids
        self._seed, self._epoch = seed, epoch
        self.used = np.zeros(len(client_ids), dtype=np.int64)
        self.used_by_class = np.zeros((len(client_ids), 0), dtype=np.int64)

    def orders(self, index: int, step: PlanStep) -> list[WorkOrder]:
        """Return the work orders of step `index` of the epoch, in ascending client id."""
        rows = np.searchsorted(self._clients, step.clients)
        by_class = step.class_quotas is not None
        if step.class_quotas is not None:
            self._widen(step.class_quotas.shape[1])
        return [
            WorkOrder(
                client=int(client),
                seed=self._seed,
                epoch=self._epoch,
                step=index,
                start=int(self.used[row]),
                count=int(quota),
                class_starts=self.used_by_class[row].copy() if by_class else None,
                class_counts=None if step.class_quotas is None else step.class_quotas[i],
            )
            for i, (client, row, quota) in enumerate(zip(step.clients, rows, step.quotas, strict=True))
        ]

    def advance(self, step: PlanStep) -> None:
        """Count a committed step's examples as used."""
        rows = np.searchsorted(self._clients, step.clients)
        self.used[rows] += step.quotas
        if step.class_quotas is not None:
            self._widen(step.class_quotas.shape[1])
            self.used_by_class[rows] += step.class_quotas

    def _widen(self, num_classes: int) -> None:
        missing = num_classes - self.used_by_class.shape[1]
        if missing > 0:
            self.used_by_class = np.pad(self.used_by_class, ((0, 0), (0, missing)))
