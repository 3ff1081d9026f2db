"""Poisson sampling: every example is in every step with the same probability, independently of all else."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler
from psl_flower.typing import FloatArray, IntArray


class PoissonGlobalSampler(Sampler):
    """Every example is in every step with probability q = B / N, independently; an epoch is ceil(N / B) such steps.

    The plan holds numbers only: client k has a Binomial(n_k, q) number of examples in a step. Which they are each
    client draws by a secret of its own, any so many as likely as any others, anew in each step. Together that is an
    independent draw of each example, of which the server knows how many of each client came out, a client which of its
    own did, and nobody else anything. DP-SGD can count on it: ``DPSGD(..., examples=N)``.

    An example is used B / N times a step on average, once an epoch, not exactly once: some are not, others repeatedly.
    Batches vary in size by about sqrt(B); a step may be empty, and is left out then.

    Parameters
    ----------
    batch_size : int
        B, the size of a batch on average.
    seed : int
        Not negative; of what else is random in a run. It decides no plan, unless it is `repeatable`.
    repeatable : bool
        Whether the numbers are a function of the seed, as with other samplers, and not of the operating system's
        randomness. Clients know the seed, and with it all numbers: refused with DP-SGD.

    References
    ----------
    Poisson sampling in arXiv 1607.00133 and 1908.10530.
    """

    clients_draw = True

    def __init__(self, batch_size: int, *, seed: int = 0, repeatable: bool = False) -> None:
        super().__init__(batch_size, seed=seed)
        self.repeatable = bool(repeatable)

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        num_clients, num_examples = len(population), population.num_examples
        num_steps = -(-num_examples // self.batch_size)
        uniform: Callable[[int], FloatArray] = (lambda n: 1 - rng.random(n)) if self.repeatable else _unpredictable
        # all steps one after the other are a row of num_steps * N trials
        drawn = _successes(self.batch_size / num_examples, num_steps * num_examples, uniform)
        steps, examples = np.divmod(drawn, num_examples)
        owners = np.searchsorted(np.cumsum(population.sizes), examples, side="right")
        entries, quotas = np.unique(steps * num_clients + owners, return_counts=True)
        offsets = np.searchsorted(entries, np.arange(num_steps + 1) * num_clients)
        return BatchPlan(population, offsets, population.client_ids[entries % num_clients], quotas)


def _successes(rate: float, trials: int, uniform: Callable[[int], FloatArray]) -> IntArray:
    """Return which of so many independent trials of one rate succeed, ascending (m,) int64; O(m).

    From one success to the next it takes a geometric number of trials, P(more than g) = (1 - rate)^g.
    """
    found, last = [], -1
    with np.errstate(divide="ignore"):  # of a rate of 1: each succeeds
        failure = np.log1p(-rate)
    while last < trials:
        gaps = 1 + np.floor(np.log(uniform(1000 + int(1.01 * rate * trials))) / failure).astype(np.int64)
        found.append(last + np.cumsum(gaps))
        last = int(found[-1][-1])
    joined = np.concatenate(found)
    return joined[joined < trials]


def _unpredictable(count: int) -> FloatArray:
    """Return numbers from the operating system, uniform above 0 and below 1."""
    words = np.frombuffer(os.urandom(8 * count), dtype="<u8")
    return np.asarray(((words >> np.uint64(12)) + 0.5) * 2.0**-52)
