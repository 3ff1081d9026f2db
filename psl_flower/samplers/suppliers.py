"""What clients can deliver, class by class and in how many seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from psl_flower.population import Population
from psl_flower.typing import FloatArray, IndexArray, IntArray

# Seconds that differ by less, relatively, are equal: latency + 3 * per_sample must fit into its own result.
SAME_TIME = 1e-9


@dataclass(frozen=True, eq=False)
class Suppliers:
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
    def of(cls, population: Population) -> Suppliers:
        """Return the suppliers of a population that has label counts and delays."""
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
