"""Parallel split learning, and centralised training: one update of the whole model on every global batch."""

from __future__ import annotations

import numpy as np

from psl_flower.experiments.algorithms.base import Algorithm
from psl_flower.experiments.schedule import Schedule, fill_plan
from psl_flower.population import Population
from psl_flower.samplers.uniform import UniformGlobalSampler
from psl_flower.typing import FloatArray


class ParallelSplit(Algorithm):
    """Parallel split learning (arXiv 2407.15738), all clients of a step in one pass through the uncut model.

    With per-example layers in the client half, the activations' gradients flow through the cut unchanged and the
    clients' parameter gradients add up to those of the union of their batches (docs/method.md, 2). So the weights are
    those of `ParallelSplitLearning` but for rounding, the server half's batch statistics included. A step is a global
    batch.
    """

    def schedule(self, epoch: int) -> Schedule:
        """Return the sampler's plan, filled with what the clients would draw."""
        sampler, data = self.setting.config.make_sampler(), self.data
        plan = sampler.plan(self.population, epoch)
        return fill_plan(plan, data.shares, data.train.targets, seed=sampler.seed, epoch=epoch)


class Centralised(Algorithm):
    """Mini-batch training on the pooled data: what the others are measured by.

    Every epoch is an order of its own of all examples, cut into ceil(N / B) nearly equal batches, a step each. Nobody
    waits for anybody: there is no simulated time. All data counts as one client's.
    """

    def schedule(self, epoch: int) -> Schedule:
        """Return the epoch's order, cut into batches."""
        config, pooled = self.setting.config, np.sort(np.concatenate(self.data.shares))
        sampler = UniformGlobalSampler(config.batch_size, seed=config.seed)
        plan = sampler.plan(Population(np.array([0]), np.array([len(pooled)])), epoch)
        return fill_plan(plan, [pooled], self.data.train.targets, seed=config.seed, epoch=epoch)

    def seconds(self, schedule: Schedule) -> tuple[FloatArray | None, float | None]:
        """Return None: there are no clients to wait for."""
        return None, None
