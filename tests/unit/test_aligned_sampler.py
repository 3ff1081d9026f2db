import logging

import numpy as np
import pytest
from schedules import class_table, severe_population

from psl_flower.errors import ConfigError
from psl_flower.metrics.deviation import batch_deviation
from psl_flower.metrics.starvation import starved_classes
from psl_flower.samplers import (
    AlignedSampler,
    Delays,
    LatencyBudgetedSampler,
    Population,
    UniformGlobalSampler,
    make_sampler,
)
from psl_flower.samplers.aligned import durations, relaxation
from psl_flower.samplers.aligned import sampler as module
from psl_flower.samplers.aligned.durations import Durations, cover
from psl_flower.samplers.aligned.local_search import local_search
from psl_flower.samplers.aligned.slowest_first import slowest_first_allocation
from psl_flower.samplers.allocation import Allocation
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.samplers.targets import class_targets
from psl_flower.stragglers import step_times


def epoch_time(sampler, population):
    return step_times(sampler.plan(population)).sum()


def suppliers_of(counts, latency, per_sample):
    return Suppliers(np.array(counts), np.array(latency, dtype=float), np.array(per_sample, dtype=float))


# --- schedules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["latency 10 %", "per-sample 10 %", "lognormal"])
@pytest.mark.parametrize("targets", ["random", "stratified"])
def test_targets_are_those_of_lb_met_exactly_and_never_in_more_time(kind, targets):
    population = severe_population(32, kind, 1)
    plan = AlignedSampler(256, seed=3, targets=targets, order="natural").plan(population, 1)
    greedy = LatencyBudgetedSampler(256, seed=3, targets=targets, order="natural", method="greedy").plan(population, 1)
    plan.validate()
    assert (class_table(plan) == class_table(greedy)).all()
    assert step_times(plan).sum() < step_times(greedy).sum()


def test_slow_clients_share_as_few_steps_as_their_classes_allow():
    # two slow clients with 4 examples of different classes; each step holds 2 of each class
    population = Population([0, 1, 2], [8, 4, 4], [[4, 4], [4, 0], [0, 4]], Delays([1, 10, 10], [0, 0, 0]))
    plan = AlignedSampler(4, targets="stratified", seed=1).plan(population)
    assert sorted(step_times(plan)) == [1, 1, 10, 10]
    slow = [step for step in plan if len(step.clients) > 1]
    assert all(set(step.clients) <= {1, 2} for step in slow)


@pytest.mark.parametrize(
    ("options", "low", "high", "deviation"),
    [
        ({}, 0.21, 0.29, (0.20, 0.225)),
        ({"targets": "stratified"}, 0.26, 0.35, (0.02, 0.03)),
        ({"targets": "stratified", "tilt": 0.1}, 0.20, 0.28, (0.03, 0.05)),
    ],
)
def test_time_and_deviation_are_the_methods(options, low, high, deviation):
    times, deviations = [], []
    for seed in range(3):
        population = severe_population(64, "latency 10 %", seed)
        plan = AlignedSampler(128, seed=seed, **options).plan(population)
        uniform = UniformGlobalSampler(128, seed=seed).plan(population)
        times.append(step_times(plan).sum() / step_times(uniform).sum())
        deviations.append(batch_deviation(class_table(plan), population.label_counts.sum(axis=0)).mean())
    assert low < np.mean(times) < high
    assert deviation[0] < np.mean(deviations) < deviation[1]


def test_stratified_with_a_little_tilt_is_as_fast_as_random():
    population = severe_population(128, "latency 10 %", 0)
    random = epoch_time(AlignedSampler(128), population)
    tilted = epoch_time(AlignedSampler(128, targets="stratified", tilt=0.1), population)
    plain = epoch_time(AlignedSampler(128, targets="stratified"), population)
    assert tilted < 1.02 * random < plain


@pytest.mark.parametrize("kind", ["latency 20 %", "lognormal"])
def test_long_steps_lean_by_no_more_than_the_tilt(kind):
    population = severe_population(32, kind, 0)
    arguments = {"seed": 5, "targets": "stratified", "order": "natural"}
    plain = AlignedSampler(256, **arguments).plan(population)
    tilted = AlignedSampler(256, tilt=0.1, **arguments).plan(population)
    tilted.validate()
    assert (tilted.batch_sizes() == plain.batch_sizes()).all()
    lean = np.abs(class_table(tilted) - class_table(plain)).sum(axis=1) / plain.batch_sizes()
    times = step_times(tilted)
    assert lean.max() > 0
    assert lean[times > np.median(times)].max() <= 0.1 + 1e-12
    assert times.sum() < step_times(plain).sum()


def stragglers_hold_two_classes(seed, num_clients=64):
    """The worst case: the slow clients are all the holders of classes 0 and 1."""
    population = severe_population(num_clients, "latency 10 %", seed)
    slow = population.label_counts[:, :2].any(axis=1)
    delays = Delays(np.where(slow, 10.0, 1.0), np.zeros(num_clients))
    return Population(population.client_ids, population.sizes, population.label_counts, delays)


def test_by_default_no_class_starves_even_if_stragglers_hold_all_of_it():
    population = stragglers_hold_two_classes(0)
    plan = AlignedSampler(128).plan(population)
    assert starved_classes(class_table(plan)) == []
    assert batch_deviation(class_table(plan), population.label_counts.sum(axis=0)).mean() < 0.225
    uniform = epoch_time(UniformGlobalSampler(128), population)
    assert step_times(plan).sum() == uniform  # every batch needs them: nothing to save
    times = {}
    for tilt in (0.1, 0.3):
        plan = AlignedSampler(128, targets="stratified", tilt=tilt).plan(population)
        times[tilt] = step_times(plan).sum() / uniform
        starved = {s.label for s in starved_classes(class_table(plan))}
        assert starved <= {0, 1}
    assert 0.75 < times[0.1] < 0.9
    assert 0.55 < times[0.3] < 0.7
    assert starved == {0, 1}  # and the planner says so


def test_shuffling_does_not_bunch_long_steps():
    population = severe_population(64, "latency 10 %", 0)
    for order in ("shuffled", "natural"):
        times = step_times(AlignedSampler(128, order=order).plan(population))
        quarters = [(part == 10).mean() for part in np.array_split(times, 4)]
        assert max(quarters) < 2 * min(quarters)


# --- large populations and long epochs -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["latency 10 %", "lognormal"])  # lognormal has both
def test_a_sample_of_steps_and_pooled_clients_cost_little(kind, monkeypatch):
    population = severe_population(40, kind, 0)
    whole = epoch_time(AlignedSampler(100, seed=1), population)
    monkeypatch.setattr(durations, "_MOST_PLACES", 0)  # 64 of 500 steps
    monkeypatch.setattr(relaxation, "_MOST_PAIRS", 40)  # of 80: two clients each
    plan = AlignedSampler(100, seed=1).plan(population)
    plan.validate()
    greedy = epoch_time(LatencyBudgetedSampler(100, seed=1, method="greedy"), population)
    assert step_times(plan).sum() < min(1.06 * whole, 0.97 * greedy)


def test_many_classes():
    labels = np.repeat(np.arange(60), 100)
    population = severe_population(48, "latency 20 %", 0, classes_per_client=6, labels=labels)
    plan = AlignedSampler(64).plan(population)
    plan.validate()
    greedy = epoch_time(LatencyBudgetedSampler(64, method="greedy"), population)
    assert step_times(plan).sum() < 0.9 * greedy


# --- its parts -------------------------------------------------------------------------------------------------------
def test_cover_swaps_before_it_adds_a_long_step():
    suppliers = suppliers_of([[4, 0], [2, 6]], [10, 1], [0, 0])
    targets = np.array([[1, 2], [2, 1], [2, 1], [1, 2]])
    level = np.array([1, 1, 0, 0])  # the slow client needs 4 places of class 0: 1 + 2 do not do, 2 + 2 do
    covered = cover(suppliers, targets, np.array([1.0, 10.0]), level)
    assert covered.tolist() == [0, 1, 1, 0]
    covered = cover(suppliers, targets, np.array([1.0, 10.0]), np.array([1, 0, 0, 0]))
    assert covered.sum() == 2
    assert targets[covered == 1, 0].sum() == 4
    assert cover(suppliers, targets, np.array([1.0, 10.0]), np.ones(4, dtype=int)).tolist() == [1, 1, 1, 1]


def test_slowest_first_gives_long_steps_to_slow_clients_and_spreads_evenly():
    suppliers = suppliers_of([[12], [20]], [10, 1], [0, 0])
    targets = np.full((8, 1), 4)
    steps = Durations(np.array([1.0, 10.0]), np.array([0, 1, 1, 0, 0, 1, 1, 0]), np.zeros((2, 2)), np.zeros((2, 1)))
    made = slowest_first_allocation(suppliers, targets, steps, np.random.default_rng(0))
    slow = np.bincount(made.steps[made.rows == 0], made.counts[made.rows == 0], 8)
    assert slow.tolist() == [0, 3, 3, 0, 0, 3, 3, 0]
    totals = np.bincount(made.steps, made.counts, 8)
    assert totals.tolist() == [4] * 8


def test_slowest_first_follows_the_relaxation():
    suppliers = suppliers_of([[6], [6]], [5, 5], [0, 0])
    work = np.array([[6.0, 0.0], [0.0, 6.0]])  # though both could work anywhere
    steps = Durations(np.array([5.0, 10.0]), np.array([0, 1, 0, 1]), work, np.zeros((2, 1)))
    made = slowest_first_allocation(suppliers, np.full((4, 1), 3), steps, np.random.default_rng(0))
    assert set(made.steps[made.rows == 0]) == {0, 2}
    assert set(made.steps[made.rows == 1]) == {1, 3}


def test_slowest_first_prolongs_as_little_as_it_can():
    # nobody can meet a duration of one second a step: three slow examples go where they cost seven seconds once
    suppliers = suppliers_of([[3], [9]], [8, 1], [0, 0])
    steps = Durations(np.array([1.0]), np.zeros(4, dtype=int), np.zeros((1, 2)), np.zeros((1, 1)))
    made = slowest_first_allocation(suppliers, np.full((4, 1), 3), steps, np.random.default_rng(0))
    assert len(set(made.steps[made.rows == 0])) == 1


def schedule_seconds(suppliers, allocation, num_steps):
    loads = np.zeros((num_steps, len(suppliers.sizes)), dtype=int)
    np.add.at(loads, (allocation.steps, allocation.rows), allocation.counts)
    return suppliers.reply(loads).max(axis=1)


def test_local_search_swaps_an_example_to_where_there_is_time():
    # clients 0 and 1 have class 0; client 2, with class 1, takes 7 seconds in step 1 anyway
    suppliers = suppliers_of([[4, 0], [4, 0], [0, 1]], [0, 0, 7], [3, 1, 0])
    before = Allocation(*map(np.array, ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2], [0, 0, 0, 0, 1], [3, 1, 1, 3, 1])))
    after = local_search(suppliers, before, 2)
    assert schedule_seconds(suppliers, before, 2).tolist() == [9, 7]
    assert schedule_seconds(suppliers, after, 2).tolist() == [6, 7]
    assert np.bincount(after.steps, after.counts).tolist() == [4, 5]


@pytest.mark.parametrize("kind", ["per-sample 10 %", "lognormal"])
def test_local_search_keeps_targets_and_examples_and_prolongs_no_step(kind):
    population = severe_population(24, kind, 0)
    suppliers = Suppliers.of(population)
    targets = class_targets("random", population.label_counts.sum(axis=0), 1000, np.random.default_rng(0))
    one_level = Durations(
        np.array([0.0]), np.zeros(len(targets), dtype=int), np.zeros((1, len(suppliers.pairs[0]))), np.zeros((1, 10))
    )
    before = slowest_first_allocation(suppliers, targets, one_level, np.random.default_rng(0))
    after = local_search(suppliers, before, len(targets))
    plan = after.plan(population)
    plan.validate()
    assert (class_table(plan) == targets).all()
    seconds = schedule_seconds(suppliers, after, len(targets)), schedule_seconds(suppliers, before, len(targets))
    assert (seconds[0] <= seconds[1] * (1 + 1e-8)).all()
    assert seconds[0].sum() < 0.99 * seconds[1].sum()


def test_local_search_leaves_latencies_alone():
    suppliers = suppliers_of([[1], [1]], [3, 1], [0, 0])
    schedule = Allocation(*(np.array(x) for x in ([0, 1], [0, 1], [0, 0], [1, 1])))
    assert local_search(suppliers, schedule, 2) is schedule


def test_capacity_is_what_fits_in_spite_of_rounding():
    suppliers = suppliers_of([[9]] * 4, [0.1, 1e6, 0, 2], [0.1, 1e-12, 0, 5])
    assert suppliers.capacity(np.array([0.4, 1e6, 7.0, 1.9]), 9).tolist() == [
        [3, 0, 9, 0],
        [9, 9, 9, 9],
        [9, 0, 9, 1],
        [9, 0, 9, 0],
    ]
    assert suppliers.capacity(np.array(0.0), 9).tolist() == [0, 0, 9, 0]


# --- the sampler -----------------------------------------------------------------------------------------------------
def test_a_solver_that_fails_costs_no_epoch(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("numerical trouble")

    monkeypatch.setattr(module, "choose_durations", fail)
    population = severe_population(16, "latency 10 %", 0)
    with caplog.at_level(logging.WARNING):
        plan = AlignedSampler(1000, seed=2).plan(population)
    assert "numerical trouble" in caplog.text
    greedy = LatencyBudgetedSampler(1000, seed=2, method="greedy").plan(population)
    assert step_times(plan).sum() == step_times(greedy).sum()


def test_epochs_differ_and_repeat():
    population = severe_population(16, "lognormal", 0)
    sampler = AlignedSampler(1000, seed=1, tilt=0.05)
    assert (sampler.plan(population, 0).class_quotas == sampler.plan(population, 0).class_quotas).all()
    assert (class_table(sampler.plan(population, 0)) != class_table(sampler.plan(population, 1))).any()


def test_arguments_are_checked_at_construction():
    for arguments, message in [
        ({"targets": "uniform"}, "targets must be one of 'random', 'stratified', got 'uniform'"),
        ({"tilt": -0.1}, "tilt must be at least 0, got -0.1"),
        ({"tilt": 2.5}, "tilt must be at most 2.*got 2.5"),
        ({"order": "reverse"}, "order must be one of"),
        ({"max_durations": 1}, "max_durations must be at least 2, got 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            AlignedSampler(8, **arguments)
    with pytest.raises(ConfigError, match="AlignedSampler needs the population's delays"):
        AlignedSampler(8).plan(Population([0], [8], [[8]]))


def test_it_has_a_name():
    sampler = make_sampler("aligned", 64, seed=2, targets="stratified", tilt=0.1)
    assert repr(sampler) == (
        "AlignedSampler(batch_size=64, seed=2, targets='stratified', tilt=0.1, order='shuffled', max_durations=12)"
    )
