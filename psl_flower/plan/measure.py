"""What an epoch under a sampler would be like: the plan, its times and its batches, without training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.metrics.bounds import schedule_lower_bound
from psl_flower.metrics.deviation import batch_deviation, client_mix_deviation, summarize_deviation
from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.metrics.starvation import StarvedClass, starved_classes
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler
from psl_flower.stragglers.clock import step_times
from psl_flower.typing import FloatArray

# keeps the draw of classes apart from the sampler's own stream, see Note [Sampler streams] in samplers/base.py
_CLASS_STREAM = 4
# speeds told apart by the lower bound: with 1,000 clients of different speeds the finer one takes 15 seconds
_FINE_GROUPS, _COARSE_GROUPS, _FINE_CLIENTS = 32, 8, 256


@dataclass(frozen=True, eq=False)
class Epoch:
    """One epoch's schedule and what it would be like.

    Parameters
    ----------
    plan : BatchPlan
        T steps.
    times : (T,) float64
        Seconds of every step.
    deviation : (T,) float64, optional
        Batch deviation of every step; None where the clients' classes are not known.
    starved : list of StarvedClass
        Classes it keeps away for too long.
    build_seconds : float
        What making the plan took, in real time.
    bound : float, optional
        Seconds that no plan with the same class targets can beat; None where the plan has none, or nobody asked.
    """

    plan: BatchPlan
    times: FloatArray
    deviation: FloatArray | None
    starved: list[StarvedClass]
    build_seconds: float
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A sampler in one line: means over epochs and seeds.

    Parameters
    ----------
    label : str
        The sampler, as it was asked for.
    steps : float
        Steps an epoch.
    least_batch, largest_batch : int
        Over all epochs.
    epoch_time : float
        Simulated seconds.
    relative_time : float, optional
        `epoch_time` over that of UGS on the same clients; None where no client takes any time.
    relative_bound : float, optional
        The least time possible with the same class targets, over that of UGS; None where it is not known.
    deviation, deviation_p95, deviation_weighted : float, optional
        Batch deviation of the steps: mean, 95th percentile, and mean weighted by examples.
    client_mix : float
        Mean L1 distance of a batch's client shares from the clients' shares of the data.
    participation : float
        Clients a step.
    build_seconds : float
        Real time to make a plan.
    """

    label: str
    steps: float
    least_batch: int
    largest_batch: int
    epoch_time: float
    relative_time: float | None
    relative_bound: float | None
    deviation: float | None
    deviation_p95: float | None
    deviation_weighted: float | None
    client_mix: float
    participation: float
    build_seconds: float


def plan_epoch(sampler: Sampler, population: Population, epoch: int, *, bound: bool = False) -> Epoch:
    """Make and measure the plan of one epoch.

    Parameters
    ----------
    sampler : Sampler
        Any.
    population : Population
        With delays; with label counts if deviations are wanted.
    epoch : int
        0-based.
    bound : bool
        Whether to compute the lower bound on the epoch's time, which may take longer than all the rest.

    Raises
    ------
    ConfigError
        If the sampler cannot plan for this population.
    """
    began = time.perf_counter()
    plan = sampler.plan(population, epoch)
    build_seconds = time.perf_counter() - began
    deviation, starved = None, list[StarvedClass]()
    if plan.population.label_counts is not None:
        rng = np.random.default_rng(np.random.SeedSequence([sampler.seed, epoch], spawn_key=(_CLASS_STREAM,)))
        counts = draw_class_counts(plan, rng)
        deviation = batch_deviation(counts, plan.population.label_counts.sum(axis=0))
        starved = starved_classes(counts)
    least = None
    if bound and deviation is not None and plan.class_quotas is not None:
        groups = _FINE_GROUPS if len(plan.population) <= _FINE_CLIENTS else _COARSE_GROUPS
        least = schedule_lower_bound(plan.population, counts, max_groups=groups)
    return Epoch(plan, step_times(plan), deviation, starved, build_seconds, least)


def summarize_epochs(label: str, epochs: Sequence[Epoch], reference_times: Sequence[float]) -> Summary:
    """Put a sampler's epochs in one line.

    Parameters
    ----------
    label : str
        What to call it.
    epochs : sequence of Epoch
        At least one.
    reference_times : sequence of float
        Epoch times of UGS on the clients of each epoch.
    """
    deviations = [
        summarize_deviation(epoch.deviation, epoch.plan.batch_sizes())
        for epoch in epochs
        if epoch.deviation is not None
    ]
    times = np.array([epoch.times.sum() for epoch in epochs])
    references = np.asarray(reference_times)
    bounds = [epoch.bound / time for epoch, time in zip(epochs, references, strict=True) if epoch.bound and time]
    batches = np.concatenate([epoch.plan.batch_sizes() for epoch in epochs])
    return Summary(
        label=label,
        steps=float(np.mean([len(epoch.plan) for epoch in epochs])),
        least_batch=int(batches.min()),
        largest_batch=int(batches.max()),
        epoch_time=float(times.mean()),
        relative_time=float((times / references).mean()) if references.all() else None,
        relative_bound=float(np.mean(bounds)) if bounds else None,
        deviation=float(np.mean([d.mean for d in deviations])) if deviations else None,
        deviation_p95=float(np.mean([d.p95 for d in deviations])) if deviations else None,
        deviation_weighted=float(np.mean([d.weighted_mean for d in deviations])) if deviations else None,
        client_mix=float(np.mean([client_mix_deviation(epoch.plan).mean() for epoch in epochs])),
        participation=float(np.mean([epoch.plan.active_clients().mean() for epoch in epochs])),
        build_seconds=float(np.mean([epoch.build_seconds for epoch in epochs])),
    )
