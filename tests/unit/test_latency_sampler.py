import numpy as np
import pytest
from schedules import NUM_CLASSES, best_time, class_table, severe_population, tiny_populations
from scipy.stats import chisquare, hypergeom
from support import population_of

from psl_flower.errors import ConfigError
from psl_flower.metrics.deviation import batch_deviation
from psl_flower.samplers import Delays, LatencyBudgetedSampler, Population, UniformGlobalSampler, make_sampler
from psl_flower.samplers import latency as module
from psl_flower.samplers.latency import flow_allocation, greedy_allocation
from psl_flower.samplers.rounding import spread_evenly
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.samplers.targets import class_targets, tilted_targets
from psl_flower.stragglers import step_times


# --- class targets ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["random", "stratified"])
def test_targets_use_every_example_in_batches_of_nearly_equal_size(kind):
    counts = [700, 0, 41, 300]
    targets = class_targets(kind, counts, 64, np.random.default_rng(0))
    assert len(targets) == -(-sum(counts) // 64)
    assert targets.sum(axis=0).tolist() == counts
    sizes = targets.sum(axis=1)
    assert sizes.max() <= 64
    assert sizes.max() - sizes.min() <= 1


def test_random_targets_are_a_draw_without_replacement():
    counts, batch, epochs = np.array([30, 50, 20]), 10, 3000
    rng = np.random.default_rng(5)
    drawn = np.array([class_targets("random", counts, batch, rng)[3, 0] for _ in range(epochs)])
    expected = hypergeom(100, 30, batch).pmf(np.arange(batch + 1)) * epochs
    observed = np.bincount(drawn, minlength=batch + 1)
    common = expected > 5
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (observed, expected))
    assert chisquare(observed, expected).pvalue > 1e-3


def test_stratified_targets_have_nearly_the_pooled_distribution():
    counts = np.full(NUM_CLASSES, 5000)
    rng = np.random.default_rng(0)
    stratified = batch_deviation(class_targets("stratified", counts, 128, rng), counts)
    random = batch_deviation(class_targets("random", counts, 128, rng), counts)
    assert 0.02 < stratified.mean() < 0.03
    assert 0.19 < random.mean() < 0.23
    table = class_targets("stratified", [997, 3], 10, rng)  # a rare class: once every 33 steps or so
    assert (np.diff(np.flatnonzero(table[:, 1])) > 20).all()


def test_leaned_targets_keep_sizes_and_classes_and_their_limit():
    rng = np.random.default_rng(0)
    targets = class_targets("stratified", np.full(5, 400), 50, rng)
    level = np.zeros(len(targets), dtype=np.intp)
    level[:8], level[8:12] = 2, 1
    tilt = np.array([[-40.0, 8, 12, 10, 10], [16, -4, -4, -4, -4], [24, -4, -8, -6, -6]])
    tilted = tilted_targets(targets, level, tilt, 3, rng)
    assert (tilted >= 0).all()
    assert (tilted.sum(axis=1) == targets.sum(axis=1)).all()
    assert (tilted.sum(axis=0) == targets.sum(axis=0)).all()
    exchanged = np.abs(tilted - targets).sum(axis=1) / 2
    assert exchanged[level > 0].max() <= 3
    assert (tilted - targets)[level == 2].sum(axis=0).tolist() == tilt[2].tolist()
    assert (tilted - targets)[level == 1].sum(axis=0)[0] == 12  # wants 16, may exchange 3 in each of 4 steps
    assert (tilted - targets)[level == 0].sum(axis=0)[0] == -36


def test_lean_takes_no_more_than_the_other_steps_have():
    targets = np.array([[1, 4], [5, 0], [0, 5]])
    level = np.array([1, 0, 0])
    tilted = tilted_targets(targets, level, np.array([[-9.0, 9], [9, -9]]), 5, np.random.default_rng(0))
    assert tilted[0].tolist() == [5, 0]
    assert tilted.sum(axis=0).tolist() == [6, 9]
    same = tilted_targets(targets, level, np.zeros((2, 2)), 5, np.random.default_rng(0))
    assert same.tolist() == targets.tolist()


# --- spreading evenly ------------------------------------------------------------------------------------------------
def test_spread_is_even_over_any_stretch_and_within_the_room():
    rng = np.random.default_rng(0)
    for _ in range(300):
        room = rng.integers(0, 5, rng.integers(1, 30))
        total = int(rng.integers(0, room.sum() + 1))
        spread = spread_evenly(room, total, rng)
        assert spread.sum() == total
        assert (spread >= 0).all()
        assert (spread <= room).all()
        share = total / max(room.sum(), 1)
        assert (np.abs(np.cumsum(spread - share * room)) < 1 + 1e-9).all()


def test_spread_begins_anywhere():
    starts = {int(np.argmax(spread_evenly(np.ones(6, dtype=int), 2, np.random.default_rng(s)))) for s in range(50)}
    assert starts == {0, 1, 2}


# --- greedy ----------------------------------------------------------------------------------------------------------
def quotas(plan):
    return {
        (t, int(k)): step.class_quotas[i].tolist() for t, step in enumerate(plan) for i, k in enumerate(step.clients)
    }


def greedy(population, targets, seed=0):
    suppliers = Suppliers.of(population)
    return greedy_allocation(suppliers, np.array(targets), np.random.default_rng(seed)).plan(population)


def flow(population, targets, seed=0):
    suppliers = Suppliers.of(population)
    return flow_allocation(suppliers, np.array(targets), np.random.default_rng(seed)).plan(population)


def test_greedy_gives_the_next_example_to_the_earliest_next_completion():
    # completions of client 0: 3, 4, 5, ...; of client 1: 2, 4, 6, ...; of client 2: 100
    population = population_of([[3], [2], [1]], [2, 0, 100], [1, 2, 0])
    plan = greedy(population, [[3], [2], [1]])
    assert plan.validate() is None
    assert quotas(plan)[0, 1] in ([1], [2])  # 2, 3, then 4 from either
    assert quotas(plan)[0, 0] == [3 - quotas(plan)[0, 1][0]]
    assert step_times(plan).tolist()[0] == 4
    assert quotas(plan)[2, 2] == [1]
    assert step_times(plan).tolist()[2] == 100


def test_greedy_breaks_ties_at_random():
    population = population_of([[20], [20]], [1, 1], [0, 0])
    first = [greedy(population, [[1]] * 40, seed)[0].clients[0] for seed in range(40)]
    assert 8 < sum(first) < 32


def test_greedy_puts_a_client_that_others_can_do_without_off_to_the_end():
    population = population_of([[10, 2], [0, 8]], [10, 1], [0, 0])
    plan = greedy(population, [[2, 0], [0, 4], [0, 4], [8, 2]])
    assert step_times(plan).tolist() == [10, 1, 1, 10]
    assert quotas(plan)[3, 0] == [8, 2]


# --- flow ------------------------------------------------------------------------------------------------------------
def test_flow_sees_that_a_client_is_needed_for_another_class():
    # only client 0 holds class 1, and it should not waste its time on class 0
    population = population_of([[4, 4], [4, 0]], [0, 0], [1, 1])
    targets = [[2, 2], [6, 2]]
    assert step_times(flow(population, targets))[0] == 2
    assert quotas(flow(population, targets)) == {(0, 0): [0, 2], (0, 1): [2, 0], (1, 0): [4, 2], (1, 1): [2, 0]}


def test_flow_uses_slow_clients_when_that_costs_no_time():
    # class 1 takes ten seconds whoever does the rest, so the slow client does it
    population = population_of([[4, 0], [4, 0], [0, 4]], [1, 9, 10], [0, 0, 0])
    plan = flow(population, [[4, 4], [4, 0]])
    assert step_times(plan).tolist() == [10, 1]


def test_every_flow_step_is_as_short_as_can_be():
    for population in tiny_populations(40, seed=3):
        targets = class_table(LatencyBudgetedSampler(min(4, population.num_examples), method="flow").plan(population))
        plan = flow(population.with_data(), targets)
        left = plan.population.label_counts.copy()
        for t, step in enumerate(plan):
            here = Population(plan.population.client_ids, left.sum(axis=1), left.copy(), plan.population.delays)
            assert step_times(plan)[t] == pytest.approx(best_time(here, targets[t : t + 1]))
            left[np.searchsorted(plan.population.client_ids, step.clients)] -= step.class_quotas


# --- the sampler -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["latency 10 %", "per-sample 10 %", "lognormal"])
@pytest.mark.parametrize("targets", ["random", "stratified"])
def test_methods_meet_the_same_targets_and_auto_keeps_the_faster(kind, targets):
    population = severe_population(24, kind, 0)
    plans = {
        method: LatencyBudgetedSampler(500, seed=4, method=method, targets=targets, order="natural").plan(population, 2)
        for method in ("greedy", "flow", "auto")
    }
    times = {method: step_times(plan).sum() for method, plan in plans.items()}
    assert times["auto"] == min(times["greedy"], times["flow"])
    for plan in plans.values():
        plan.validate()
        assert (class_table(plan) == class_table(plans["flow"])).all()


def test_auto_builds_no_flow_schedule_that_costs_more_than_it_can_save(monkeypatch):
    def refuse(*_):
        raise AssertionError("built")

    monkeypatch.setattr(module, "flow_allocation", refuse)
    population = severe_population(24, "per-sample 10 %", 0)
    sampler = LatencyBudgetedSampler(500, method="auto")
    with pytest.raises(AssertionError, match="built"):
        sampler.plan(population)
    delays = population.delays
    quick = Population(
        population.client_ids,
        population.sizes,
        population.label_counts,
        Delays(delays.latency * 1e-6, delays.per_sample * 1e-6),  # the whole epoch takes milliseconds
    )
    sampler.plan(quick).validate()


def test_shuffling_changes_the_order_of_steps_alone():
    population = severe_population(24, "latency 10 %", 0)
    natural = LatencyBudgetedSampler(500, seed=1, order="natural").plan(population)
    shuffled = LatencyBudgetedSampler(500, seed=1).plan(population)
    assert sorted(step_times(natural)) == sorted(step_times(shuffled))
    assert sorted(map(tuple, class_table(natural))) == sorted(map(tuple, class_table(shuffled)))
    assert (step_times(natural)[-10:] == 10).all()  # slow clients' data are put off
    assert 0.05 < (step_times(shuffled)[: len(shuffled) // 2] == 10).mean() < 0.6


def test_epochs_differ_and_repeat():
    population = severe_population(16, "lognormal", 0)
    sampler = LatencyBudgetedSampler(1000, seed=1, method="greedy")
    assert (sampler.plan(population, 0).dense() == sampler.plan(population, 0).dense()).all()
    assert (class_table(sampler.plan(population, 0)) != class_table(sampler.plan(population, 1))).any()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("latency 10 %", 0.25, 0.37), ("latency 20 %", 0.41, 0.52), ("per-sample 10 %", 0.7, 1.05)],
)
def test_time_relative_to_ugs_is_the_methods(kind, low, high):
    ratios = []
    for seed in range(3):
        population = severe_population(64, kind, seed)
        uniform = step_times(UniformGlobalSampler(128, seed=seed).plan(population)).sum()
        greedy = LatencyBudgetedSampler(128, seed=seed, method="greedy").plan(population)
        ratios.append(step_times(greedy).sum() / uniform)
        assert 0.19 < batch_deviation(class_table(greedy), population.label_counts.sum(axis=0)).mean() < 0.23
    assert low < np.mean(ratios) < high


def test_arguments_are_checked_at_construction():
    for arguments, message in [
        ({"method": "best"}, "method must be one of 'auto', 'flow', 'greedy', got 'best'"),
        ({"targets": "strat"}, "did you mean 'stratified'"),
        ({"order": "sorted"}, "order must be one of"),
        ({"seed": -1}, "seed must be at least 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            LatencyBudgetedSampler(8, **arguments)
    with pytest.raises(ConfigError, match="needs the population's label_counts"):
        LatencyBudgetedSampler(8).plan(Population([0], [8], delays=Delays([1], [0])))
    with pytest.raises(ConfigError, match="needs the population's delays"):
        LatencyBudgetedSampler(8).plan(Population([0], [8], [[8]]))


def test_it_has_a_name():
    sampler = make_sampler("lb", 64, seed=2, method="flow", targets="stratified")
    assert repr(sampler) == (
        "LatencyBudgetedSampler(batch_size=64, seed=2, method='flow', targets='stratified', order='shuffled')"
    )
    assert type(make_sampler("latency-budgeted", 64)) is LatencyBudgetedSampler
