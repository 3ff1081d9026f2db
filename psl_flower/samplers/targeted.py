"""Samplers that fix every step's classes first, and then choose who delivers them."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_choice
from psl_flower.extras import check_extra
from psl_flower.population import Population
from psl_flower.samplers.base import ORDERS, Sampler
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.samplers.targets import TARGETS, class_targets
from psl_flower.stragglers.clock import step_times
from psl_flower.typing import IntArray


class TargetedSampler(Sampler):
    """Base of samplers with class targets: draws them, and shuffles the steps of the schedule that a subclass makes.

    Two of them with the same `seed` and `targets` draw the same targets.

    Parameters
    ----------
    batch_size : int
        Global batch size B; sizes differ by at most 1.
    seed : int
        Not negative.
    targets : {"random", "stratified"}
        See `psl_flower.samplers.targets.class_targets`.
    order : {"shuffled", "natural"}
        "shuffled" mixes the finished steps, at no cost; "natural" is the order in which targets were drawn.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    """

    needs_label_counts = True
    needs_delays = True

    def __init__(self, batch_size: int, *, seed: int, targets: str, order: str) -> None:
        check_extra("scipy", "samplers", "a sampler that plans by class")
        super().__init__(batch_size, seed=seed)
        self.targets = check_choice(targets, "targets", TARGETS)
        self.order = check_choice(order, "order", ORDERS)

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        suppliers = Suppliers.of(population)
        for_targets, for_greedy, for_search, for_order = rng.spawn(4)
        targets = class_targets(self.targets, suppliers.counts.sum(axis=0), self.batch_size, for_targets)
        plan = self._schedule(population, suppliers, targets, for_greedy, for_search)
        return plan.shuffled(for_order) if self.order == "shuffled" else plan

    @abstractmethod
    def _schedule(
        self,
        population: Population,
        suppliers: Suppliers,
        targets: IntArray,
        for_greedy: np.random.Generator,
        for_search: np.random.Generator,
    ) -> BatchPlan:
        """Make the plan that meets the (T, C) `targets`; `suppliers` are the population's, all of which hold data."""


def epoch_time(plan: BatchPlan) -> float:
    """Return how long all steps of a plan take, in seconds."""
    return float(step_times(plan).sum())
