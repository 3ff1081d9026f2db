"""Aligned: slow clients' examples packed into as few steps of the epoch as their classes allow."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.population import Population
from psl_flower.samplers.aligned.durations import choose_durations, cover
from psl_flower.samplers.aligned.local_search import local_search
from psl_flower.samplers.aligned.slowest_first import slowest_first_allocation
from psl_flower.samplers.allocation import Allocation
from psl_flower.samplers.latency import greedy_allocation
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.samplers.targeted import TargetedSampler, epoch_time
from psl_flower.samplers.targets import tilted_targets
from psl_flower.typing import IntArray

logger = logging.getLogger(__name__)

# Local search makes up for at most so much. Where clients hold all classes and have many speeds, the allocation that it
# starts from may be slower than the greedy one by more: leaving it out saves half a second.
_WITHIN_REACH = 1.1


class AlignedSampler(TargetedSampler):
    """Aligned: suppliers chosen over the whole epoch, so that slow clients work in the same few steps.

    The class targets of the steps come first, as in `LatencyBudgetedSampler`, and are met exactly; so the batches are
    those of centralised training (random targets), or better balanced (stratified ones), however the suppliers are
    chosen. Then a linear program chooses which steps shall be long, places are filled from the slowest client down, and
    same-class swaps shorten what can be shortened. Never slower than the greedy `LatencyBudgetedSampler` with the same
    targets and seed, whose schedule is built too and kept if it is faster.

    Parameters
    ----------
    batch_size : int
        Global batch size B; sizes differ by at most 1.
    seed : int
        Not negative.
    targets : {"random", "stratified"}
        See `psl_flower.samplers.targets.class_targets`. Random targets let the program choose steps that suit the slow
        clients' classes: faster. Stratified ones deviate least, and with a little tilt are as fast.
    tilt : float
        How far (L1 distance, from 0 to 2) the class distribution of a step may lean from its target, long steps toward
        the slow clients' classes, shorter ones away from them. The shortest make up for the rest and may lean further:
        with two durations, however far they must, so if slow clients hold all of a class, the short steps lose it. Look
        at the plan before using more than 0.1, see `psl_flower.metrics.starvation`.
    order : {"shuffled", "natural"}
        "shuffled" (default) mixes the finished steps, at no cost; "natural" is the order in which targets were drawn.
    max_durations : int
        How many different durations the linear program may give to steps, at least 2. More make a better schedule
        where clients have many different speeds, and take longer to build.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        targets: str = "random",
        tilt: float = 0.0,
        order: str = "shuffled",
        max_durations: int = 12,
    ) -> None:
        super().__init__(batch_size, seed=seed, targets=targets, order=order)
        self.tilt = check_float(tilt, "tilt", least=0)
        if self.tilt > 2:
            raise ConfigError(f"tilt must be at most 2, the greatest L1 distance of distributions, got {tilt}")
        self.max_durations = check_int(max_durations, "max_durations", least=2)

    def _schedule(
        self,
        population: Population,
        suppliers: Suppliers,
        targets: IntArray,
        for_greedy: np.random.Generator,
        for_search: np.random.Generator,
    ) -> BatchPlan:
        plan = greedy_allocation(suppliers, targets, for_greedy).plan(population)
        try:
            allocation = self._allocation(suppliers, targets, for_search)
        except RuntimeError as exc:  # a solver's numerical trouble is no reason to stop a run
            logger.warning("no aligned schedule for this epoch, the greedy one is used: %s", exc)
        else:
            if epoch_time(allocation.plan(population)) < _WITHIN_REACH * epoch_time(plan):
                aligned = local_search(suppliers, allocation, len(targets)).plan(population)
                plan = min(aligned, plan, key=epoch_time)
        return plan

    def _allocation(self, suppliers: Suppliers, targets: IntArray, rng: np.random.Generator) -> Allocation:
        tilt = int(self.tilt / 2 * targets.sum(axis=1).min() + 1e-9)  # in examples that a step may exchange
        durations = choose_durations(suppliers, targets, tilt, self.max_durations, rng)
        targets = tilted_targets(targets, durations.level, durations.tilt, tilt, rng)
        durations = replace(durations, level=cover(suppliers, targets, durations.seconds, durations.level))
        return slowest_first_allocation(suppliers, targets, durations, rng)
