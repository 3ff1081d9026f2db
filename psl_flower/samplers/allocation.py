"""Who delivers what in which step, while a schedule is made; in the end it becomes a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.population import Population
from psl_flower.typing import IntArray


@dataclass(frozen=True, eq=False)
class Allocation:
    """An allocation of examples to steps, entry by entry.

    Parameters
    ----------
    steps, rows, classes, counts : (E,) int64
        Step, row of the client in the population, class, and how many examples; equal entries add up.
    """

    steps: IntArray
    rows: IntArray
    classes: IntArray
    counts: IntArray

    @classmethod
    def joined(cls, parts: Sequence[tuple[Any, Any, Any, IntArray]]) -> Allocation:
        """Return the entries of all `parts`, of which there is at least one.

        Each is (steps, rows, classes, counts); in each of the first three columns all parts have a number that holds
        for all of a part's counts, or all have an array of their length. Counts may be 0.
        """
        *columns, counts = zip(*parts, strict=True)
        count = np.concatenate(counts)
        lengths = [len(part) for part in counts]
        whole = (np.repeat(col, lengths) if np.ndim(col[0]) == 0 else np.concatenate(col) for col in columns)
        some = count > 0
        return cls(*(column[some].astype(np.int64) for column in (*whole, count)))

    def plan(self, population: Population) -> BatchPlan:
        """Return the plan, with class quotas; entries of one step and client become one."""
        assert population.label_counts is not None
        num_clients = len(population)
        keys, entries = np.unique(self.steps * num_clients + self.rows, return_inverse=True)
        quotas = np.zeros((len(keys), population.label_counts.shape[1]), dtype=np.int64)
        np.add.at(quotas, (entries, self.classes), self.counts)
        steps, rows = np.divmod(keys, num_clients)
        offsets = np.searchsorted(steps, np.arange(int(steps[-1]) + 2))
        return BatchPlan(population, offsets, population.client_ids[rows], quotas.sum(axis=1), quotas)
