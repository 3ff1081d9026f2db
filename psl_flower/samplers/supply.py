"""What clients can deliver, class by class and in how many seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.population import Population
from psl_flower.typing import FloatArray, IndexArray, IntArray

# Seconds that differ by less, relatively, are equal: latency + 3 * per_sample must fit into its own result.
SAME_TIME = 1e-9


@dataclass(frozen=True, eq=False)
class Supply:
    """The data and delays of clients, by row of their population.

    Parameters
    ----------
    counts : (K, C) int64
        Examples of each class.
    latency, per_sample : (K,) float64
        Seconds a step, seconds an example.
    """

    counts: IntArray
    latency: FloatArray
    per_sample: FloatArray

    @classmethod
    def of(cls, population: Population) -> Supply:
        """Return the supply of a population that has label counts and delays."""
        assert population.label_counts is not None
        assert population.delays is not None
        return cls(population.label_counts, population.delays.latency, population.delays.per_sample)

    @cached_property
    def sizes(self) -> IntArray:
        """Examples of each client, (K,)."""
        sizes: IntArray = self.counts.sum(axis=1)
        return sizes

    @cached_property
    def first_reply(self) -> FloatArray:
        """Seconds each client takes for one example, (K,)."""
        return self.latency + self.per_sample

    @cached_property
    def pairs(self) -> tuple[IndexArray, IndexArray]:
        """Client and class of every pair that has examples, (P,) each, ascending by client, then class."""
        clients, classes = np.nonzero(self.counts)
        return clients, classes

    def reply(self, loads: IntArray) -> FloatArray:
        """Return the seconds each client takes for (..., K) `loads`: none for a load of 0."""
        seconds: FloatArray = np.where(loads > 0, self.latency + self.per_sample * loads, 0.0)
        return seconds

    def capacity(self, seconds: FloatArray, most: int) -> IntArray:
        """Return how many examples each client can deliver in steps that take so long, within [0, most].

        Parameters
        ----------
        seconds : (...) float64
            Durations.
        most : int
            Upper limit.

        Returns
        -------
        (..., K) int64
            ``floor((seconds - latency) / per_sample)``.
        """
        return _fitting(np.asarray(seconds)[..., None], self.latency, self.per_sample, most)

    def capacity_of(self, client: int, seconds: FloatArray, most: int) -> IntArray:
        """Return the capacity of the client in row `client`, in the shape of `seconds`."""
        return _fitting(seconds, self.latency[client], self.per_sample[client], most)


def _fitting(seconds: FloatArray, latency: FloatArray, per_sample: FloatArray, most: int) -> IntArray:
    spare = seconds * (1 + SAME_TIME) - latency
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        examples = np.where(per_sample > 0, np.floor(spare / per_sample), np.inf)
    result: IntArray = np.where(spare >= 0, np.clip(examples, 0, most), 0).astype(np.int64)
    return result


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who delivers what in which step, entry by entry.

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
    def joined(cls, parts: Sequence[tuple[Any, Any, Any, IntArray]]) -> Assignment:
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
