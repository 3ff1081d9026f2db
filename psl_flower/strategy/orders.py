"""Plan steps become work orders: where each client stands in its epoch's order of examples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from psl_flower.batch_plan import PlanStep
from psl_flower.protocol import Orders, PutOff
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
    epoch : int
        Of the clients' orders.
    used : (K,) int64
        Examples each client has used.
    used_by_class : (K, C) int64
        The same for each class, as far as steps had class quotas.
    put_off : dict of int to PutOff
        By client: what of its order was moved to the end.
    """

    def __init__(self, client_ids: IntArray, *, seed: int, epoch: int) -> None:
        self._clients = client_ids
        self._seed, self.epoch = seed, epoch
        self.used = np.zeros(len(client_ids), dtype=np.int64)
        self.used_by_class = np.zeros((len(client_ids), 0), dtype=np.int64)
        self.put_off: dict[int, PutOff] = {}

    def orders(self, index: int, step: PlanStep, left_out: Mapping[int, tuple[int, ...]] | None = None) -> Orders:
        """Return the work orders of step `index` of the epoch.

        Parameters
        ----------
        left_out : dict of int to tuple of int
            By client: examples it cannot read.
        """
        rows = np.searchsorted(self._clients, step.clients)
        if step.class_quotas is not None:
            self._widen(step.class_quotas.shape[1])
        return Orders(
            clients=step.clients,
            starts=self.used[rows],
            counts=step.quotas,
            seed=self._seed,
            epoch=self.epoch,
            step=index,
            class_starts=None if step.class_quotas is None else self.used_by_class[rows],
            class_counts=step.class_quotas,
            left_out={int(c): left_out[int(c)] for c in step.clients if int(c) in left_out} if left_out else {},
            put_off={int(c): self.put_off[int(c)] for c in step.clients if int(c) in self.put_off},
        )

    def to_end(self, step: PlanStep) -> None:
        """Have the examples of a step come last in their clients' orders."""
        for i, client in enumerate(step.clients.tolist()):
            row = int(np.searchsorted(self._clients, client))
            moved: list[tuple[int, int, int]] = [(-1, int(self.used[row]), int(step.quotas[i]))]
            if step.class_quotas is not None:
                self._widen(step.class_quotas.shape[1])
                classes = np.flatnonzero(step.class_quotas[i]).tolist()
                starts, counts = self.used_by_class[row], step.class_quotas[i]
                moved = [(c, int(starts[c]), int(counts[c])) for c in classes]
            self.put_off[client] = (*self.put_off.get(client, ()), *moved)

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
