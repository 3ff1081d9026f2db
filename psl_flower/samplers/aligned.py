"""Aligned: slow clients' examples packed into as few steps of the epoch as their classes allow."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.filling import fill
from psl_flower.samplers.latency import greedy_schedule
from psl_flower.samplers.outline import cover, make_outline
from psl_flower.samplers.polishing import polish
from psl_flower.samplers.supply import Assignment, Supply
from psl_flower.samplers.targets import TARGETS, class_targets, leaned_targets
from psl_flower.stragglers.clock import step_times
from psl_flower.typing import IntArray

logger = logging.getLogger(__name__)

# Swaps make up for at most so much. Where clients hold all classes and have many speeds, a filled outline may be slower
# than the greedy schedule by more, and half a second is saved.
_WITHIN_REACH = 1.1


class AlignedSampler(Sampler):
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

    needs_label_counts = True
    needs_delays = True

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
        super().__init__(batch_size, seed=seed)
        self.targets = check_choice(targets, "targets", TARGETS)
        self.tilt = check_float(tilt, "tilt", least=0)
        if self.tilt > 2:
            raise ConfigError(f"tilt must be at most 2, the greatest L1 distance of distributions, got {tilt}")
        self.order = check_choice(order, "order", ("shuffled", "natural"))
        self.max_durations = check_int(max_durations, "max_durations", least=2)

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        supply = Supply.of(population)
        for_targets, for_greedy, for_schedule, for_order = rng.spawn(4)  # the first two as in LatencyBudgetedSampler
        targets = class_targets(self.targets, supply.counts.sum(axis=0), self.batch_size, for_targets)
        plan = greedy_schedule(supply, targets, for_greedy).plan(population)
        try:
            schedule = self._schedule(supply, targets, for_schedule)
        except RuntimeError as exc:  # a solver's numerical trouble is no reason to stop a run
            logger.warning("no aligned schedule for this epoch, the greedy one is used: %s", exc)
        else:
            if _epoch_time(schedule.plan(population)) < _WITHIN_REACH * _epoch_time(plan):
                aligned = polish(supply, schedule, len(targets)).plan(population)
                plan = min(aligned, plan, key=_epoch_time)
        return plan.shuffled(for_order) if self.order == "shuffled" else plan

    def _schedule(self, supply: Supply, targets: IntArray, rng: np.random.Generator) -> Assignment:
        lean = int(self.tilt / 2 * targets.sum(axis=1).min() + 1e-9)
        outline = make_outline(supply, targets, lean, self.max_durations, rng)
        targets = leaned_targets(targets, outline.level, outline.lean, lean, rng)
        outline = replace(outline, level=cover(supply, targets, outline.seconds, outline.level))
        return fill(supply, targets, outline, rng)

    def __repr__(self) -> str:
        return (
            f"AlignedSampler(batch_size={self.batch_size}, seed={self.seed}, targets={self.targets!r}, "
            f"tilt={self.tilt})"
        )


def _epoch_time(plan: BatchPlan) -> float:
    return float(step_times(plan).sum())
