import numpy as np
import pytest
from schedules import best_time, class_table, severe_population, tiny_populations
from scipy.stats import hypergeom
from support import population_of

from psl_flower.errors import ConfigError
from psl_flower.linear_program import LinearProgram
from psl_flower.metrics import schedule_lower_bound, serfling_bound
from psl_flower.samplers import AlignedSampler, Delays, LatencyBudgetedSampler, Population, UniformGlobalSampler
from psl_flower.samplers.targets import class_targets
from psl_flower.samplers.tiers import merge_levels
from psl_flower.stragglers import step_times


# --- Serfling --------------------------------------------------------------------------------------------------------
def test_serfling_bound_of_the_method():
    assert round(serfling_bound(128, 50_000, 0.95), 4) == 0.1199


@pytest.mark.parametrize(("batch", "population", "share"), [(128, 50_000, 0.1), (64, 1_000, 0.5), (10, 20, 0.5)])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_serfling_bound_holds_for_exact_hypergeometric_batches(batch, population, share, confidence):
    eps = serfling_bound(batch, population, confidence)
    drawn = np.arange(batch + 1)
    off = np.abs(drawn / batch - share) >= eps
    assert hypergeom(population, int(population * share), batch).pmf(drawn)[off].sum() <= 1 - confidence


def test_serfling_bound_inverts_its_formula():
    for batch, population, confidence in [(1, 1, 0.3), (7, 9, 0.9), (100, 10**6, 0.999)]:
        eps = serfling_bound(batch, population, confidence)
        assert 2 * np.exp(-2 * batch * eps**2 / (1 - (batch - 1) / population)) == pytest.approx(1 - confidence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10), "batch must be at least 1, got 0"),
        ((11, 10), "batch must be at most the population of 10, got 11"),
        ((1, 0), "population must be at least 1"),
        ((1.5, 10), "batch must be a whole number"),
        ((1, 10, 0), "confidence must be greater than 0"),
        ((1, 10, 1), "confidence must be below 1, got 1"),
    ],
)
def test_serfling_bound_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        serfling_bound(*arguments)


# --- the bound on epoch time -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("population", "targets", "expected"),
    [
        # the slow client's two examples fit into one of the four steps
        (population_of([[6], [2]], [1, 10], [0, 0]), [[2]] * 4, 10 + 3 * 1),
        # but not if they are of a class that each step holds one of
        (population_of([[4, 2], [0, 2]], [1, 10], [0, 0]), [[1, 1]] * 4, 10 * 2 + 1 * 2),
        # one client: nothing to choose
        (population_of([[8]], [0.5], [1]), [[2]] * 4, 4 * 0.5 + 8),
        # whole steps do not matter to it: a step and a half of the slow client
        (population_of([[5], [3]], [1, 10], [0, 0]), [[2]] * 4, 10 * 1.5 + 1 * 2.5),
        # nobody takes time
        (population_of([[3], [3]], [0, 0], [0, 0]), [[2]] * 3, 0),
        # per-example times: the fast client has time to spare while the slow one works on
        (population_of([[6], [6]], [0, 0], [1, 3]), [[4]] * 3, 18),
        # a client without data does not count, whatever its delay
        (population_of([[4], [0]], [1, 100], [0, 100]), [[2]] * 2, 2),
    ],
)
def test_bound_of_small_cases_by_hand(population, targets, expected):
    assert schedule_lower_bound(population, targets) == pytest.approx(expected, abs=1e-6)


def test_no_schedule_beats_the_bound_and_aligned_is_near_the_best_one():
    gaps = []
    for population in tiny_populations(60):
        sampler = AlignedSampler(min(4, population.num_examples), seed=1)
        plan = sampler.plan(population)
        targets = class_table(plan)
        best = best_time(population.with_data(), targets)
        time = step_times(plan).sum()
        assert schedule_lower_bound(population, targets) <= best + 1e-6
        assert time >= best - 1e-9
        gaps.append((time + 1e-9) / (best + 1e-9))
    assert np.mean(np.array(gaps) < 1 + 1e-6) > 0.8  # most schedules are the best there is
    assert np.mean(gaps) < 1.03


@pytest.mark.parametrize("kind", ["latency 20 %", "lognormal"])
def test_fewer_groups_only_loosen_the_bound(kind):
    population = severe_population(16, kind, 0)
    targets = class_targets("stratified", population.label_counts.sum(axis=0), 1000, np.random.default_rng(0))
    bounds = [schedule_lower_bound(population, targets, max_groups=groups) for groups in (1, 4, 16)]
    assert bounds[0] <= bounds[1] * (1 + 1e-6)
    assert bounds[1] <= bounds[2] * (1 + 1e-6)
    assert bounds[0] < bounds[2]


def test_bound_does_not_depend_on_the_order_of_clients_and_steps_and_scales_with_time():
    population = severe_population(12, "lognormal", 3)
    targets = class_targets("random", population.label_counts.sum(axis=0), 500, np.random.default_rng(0))
    bound = schedule_lower_bound(population, targets)
    delays = population.delays
    slower = Population(
        population.client_ids[::-1],
        population.sizes[::-1],
        population.label_counts[::-1],
        Delays(delays.latency[::-1] * 1e6, delays.per_sample[::-1] * 1e6),
    )
    assert schedule_lower_bound(slower, targets[::-1]) == pytest.approx(bound * 1e6, rel=1e-6)


def test_bound_refuses_what_it_cannot_use():
    population = population_of([[6], [2]], [1, 10], [0, 0])
    for targets, message in [
        ([[2]] * 3, "class 0 has 8 examples, 6 are asked for"),
        ([2, 2, 4], r"targets must have shape \(steps, 1\)"),
        ([[9], [-1]], "targets must not be negative, got -1"),
        ([[2.5], [5.5]], "targets must be whole numbers"),
    ]:
        with pytest.raises(ConfigError, match=message):
            schedule_lower_bound(population, targets)
    with pytest.raises(ConfigError, match="max_groups must be at least 1"):
        schedule_lower_bound(population, [[2]] * 4, max_groups=0)
    bare = Population([0], [8])
    with pytest.raises(ConfigError, match="label_counts"):
        schedule_lower_bound(bare, [[2]] * 4)
    with pytest.raises(ConfigError, match="delays"):
        schedule_lower_bound(Population([0], [8], [[8]]), [[2]] * 4)


@pytest.mark.parametrize(
    ("kind", "num_clients"), [("latency 10 %", 128), ("latency 20 %", 64), ("per-sample 10 %", 64)]
)
def test_aligned_is_within_three_percent_of_the_bound_where_lb_and_ugs_are_not(kind, num_clients):
    population = severe_population(num_clients, kind, seed=2)
    plan = AlignedSampler(128, seed=2).plan(population)
    bound = schedule_lower_bound(population, class_table(plan))
    assert bound <= step_times(plan).sum() <= 1.03 * bound
    greedy = LatencyBudgetedSampler(128, seed=2, method="greedy").plan(population)
    assert step_times(greedy).sum() > 1.1 * bound
    assert step_times(UniformGlobalSampler(128, seed=2).plan(population)).sum() > 1.1 * bound


def test_aligned_is_near_the_bound_where_all_clients_differ():
    population = severe_population(64, "lognormal", seed=2)
    plan = AlignedSampler(128, seed=2).plan(population)
    bound = schedule_lower_bound(population, class_table(plan))
    assert bound <= step_times(plan).sum() <= 1.08 * bound  # the bound knows no whole examples: it is loose here


# --- what it is built on ---------------------------------------------------------------------------------------------
def test_linear_program_finds_the_least_value_and_what_a_unit_is_worth():
    program = LinearProgram()
    x, y = program.variables(2, cost=[2.0, 3.0])
    total = program.equal.new(10.0)
    program.equal.put(total, [x, y], 1.0)
    most = program.at_most.new([4.0])
    program.at_most.put(most, x, 1.0)
    solution = program.solve()
    assert solution.value == pytest.approx(4 * 2 + 6 * 3)
    assert solution.point == pytest.approx([4, 6])
    assert solution.duals == pytest.approx([3])


def test_linear_program_without_a_solution_says_so():
    program = LinearProgram()
    x = program.variables(1)
    rows = program.equal.new([1.0, 2.0])
    program.equal.put(rows, x, 1.0)
    with pytest.raises(RuntimeError, match="no solution"):
        program.solve()


@pytest.mark.parametrize(
    ("up", "most", "kept"),
    [
        (True, 3, [1, 2, 3]),  # up: five steps, one second longer each; a level further on it would be twenty
        (True, 1, [3]),
        (False, 3, [0, 1, 2]),  # down: a single step, one second shorter
        (False, 1, [0]),
        (True, 9, [0, 1, 2, 3]),
    ],
)
def test_levels_are_merged_where_it_costs_least(up, most, kept):
    assert merge_levels([1, 2, 9, 10], [5, 20, 20, 1], most, up=up).tolist() == kept
