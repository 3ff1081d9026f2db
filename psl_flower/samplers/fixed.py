"""Fixed quotas (FLS, FPLS): every client gives the same number of examples each step until it has no more."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler
from psl_flower.typing import IntArray


class _FixedQuotaSampler(Sampler):
    """Base of the two, with the parameters of `Sampler`: a subclass says how much each client gives a step.

    Batches aim at the batch size. The seed has no effect on the quotas, which are the same in every epoch; which
    examples fill them depends on it, in the clients. Both are baselines of arXiv 2407.15738 ("the paper").
    """

    @abstractmethod
    def _quotas(self, population: Population) -> IntArray:
        """Return what each client gives a step, (K,) int64, at least 1."""

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        sizes, quotas, num_clients = population.sizes, self._quotas(population), len(population)
        lifetimes = -(-sizes // quotas)  # steps until client k has no more
        first = np.repeat(np.cumsum(lifetimes) - lifetimes, lifetimes)
        # one key per (step, client), ordered by step and then by client: at most N of them, however large K * T is
        steps = np.arange(len(first)) - first
        keys = steps * num_clients + np.repeat(np.arange(num_clients), lifetimes)
        keys.sort()
        steps, rows = np.divmod(keys, num_clients)
        offsets = np.concatenate(([0], np.cumsum(np.bincount(steps))))
        taken = np.minimum(quotas[rows], sizes[rows] - steps * quotas[rows])  # the last one is what is left
        return BatchPlan(population, offsets, population.client_ids[rows], taken)


class FixedLocalSampler(_FixedQuotaSampler):
    """FLS: every client gives max(1, round(B / K)) examples each step until its data is used up, then leaves.

    Batches shrink as clients leave, so an epoch takes more than ceil(N / B) steps and ends in small batches of few
    classes; with more clients than ``2 * batch_size``, every batch exceeds B at first. Halves round to the even number.

    Parameters are those of `Sampler`; the seed has no effect on the quotas. The paper's "fixed local sampling".
    """

    def _quotas(self, population: Population) -> IntArray:
        quota = max(1, round(self.batch_size / len(population)))
        return np.full(len(population), quota, dtype=np.int64)


class FixedProportionalSampler(_FixedQuotaSampler):
    """FPLS: client k gives max(1, round(B * n_k / N)) examples each step until its data is used up, then leaves.

    Rounding makes the first batches differ from B (at least 1 a client: 147 for B = 128 on one split over 128 clients)
    and lets clients run out at different steps, so an epoch takes more than ceil(N / B) steps. Halves round to the even
    number.

    Parameters are those of `Sampler`; the seed has no effect on the quotas. The paper's "fixed proportional local
    sampling".
    """

    def _quotas(self, population: Population) -> IntArray:
        shares = population.sizes / population.num_examples
        return np.maximum(1, np.rint(self.batch_size * shares)).astype(np.int64)
