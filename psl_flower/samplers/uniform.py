"""Uniform global sampling (UGS): batches distributed as if the data of all clients were in one place."""

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler


class UniformGlobalSampler(Sampler):
    """UGS: shuffle the multiset that holds each client n_k times, cut it into ceil(N / B) nearly equal parts, count.

    The quotas of a step have the distribution of the clients in a batch drawn from the pooled data without replacement
    (multivariate hypergeometric), so training sees the same batches as centralised mini-batch SGD. Batch sizes differ
    by at most 1. Takes O(N) memory and time, whatever the number of clients.

    Parameters
    ----------
    batch_size : int
        Global batch size B, at least 1; no batch is larger.
    seed : int
        Not negative. A plan is a function of (seed, epoch, population) alone.

    References
    ----------
    UGS in arXiv 2407.15738 v2, called GPSL in v5.
    """

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        num_clients, num_examples = len(population), population.num_examples
        # Owners as rows in the population, in two or four bytes: a quarter of the ids' memory, and what sorts fastest
        # (bytes do not: numpy has no vectorised sort for them).
        dtype = np.promote_types(np.uint16, np.min_scalar_type(num_clients - 1))
        owners = np.repeat(np.arange(num_clients, dtype=dtype), population.sizes)
        rng.shuffle(owners)

        num_steps = -(-num_examples // self.batch_size)
        base, longer = divmod(num_examples, num_steps)  # the first `longer` parts hold base + 1 examples, the rest base
        cut = longer * (base + 1)
        bounds = np.concatenate((np.arange(0, cut, base + 1), np.arange(cut, num_examples + 1, base)))

        # Sorting each part on its own, as the rows of two tables, beats one sort of (part, owner) keys several times.
        owners[:cut].reshape(longer, base + 1).sort(axis=1)
        owners[cut:].reshape(num_steps - longer, base).sort(axis=1)

        # an entry begins where the owner changes and where a part begins; the last bound closes the last entry
        is_bound = np.empty(num_examples + 1, dtype=np.bool_)
        np.not_equal(owners[1:], owners[:-1], out=is_bound[1:-1])
        is_bound[bounds] = True
        begins = np.flatnonzero(is_bound)
        clients = population.client_ids[owners[begins[:-1]]]
        return BatchPlan(population, np.searchsorted(begins, bounds), clients, np.diff(begins))
