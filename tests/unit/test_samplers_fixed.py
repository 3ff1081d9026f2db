"""Fixed local and fixed proportional quotas, and how many steps they need on the severe split."""

import tracemalloc

import numpy as np
import pytest

from psl_flower.partition import extended_dirichlet_split
from psl_flower.samplers import FixedLocalSampler, FixedProportionalSampler, Population


def test_fixed_local_gives_the_same_until_the_data_is_used_up():
    plan = FixedLocalSampler(7).plan(Population([4, 7, 9], [5, 2, 3]))  # round(7 / 3) = 2 each
    assert plan.dense().tolist() == [[2, 2, 2], [2, 0, 1], [1, 0, 0]]


def test_fixed_proportional_gives_shares_until_the_data_is_used_up():
    plan = FixedProportionalSampler(10).plan(Population([4, 7, 9], [26, 12, 2]))  # rounds 6.5, 3, 0.5
    assert plan.dense().tolist() == [[6, 3, 1], [6, 3, 1], [6, 3, 0], [6, 3, 0], [2, 0, 0]]


@pytest.mark.parametrize(
    ("batch_size", "num_clients", "quota"), [(5, 2, 2), (7, 2, 4), (1, 3, 1), (3, 10, 1), (9, 1, 9)]
)
def test_fixed_local_rounds_halves_to_even_and_gives_at_least_one(batch_size, num_clients, quota):
    plan = FixedLocalSampler(batch_size).plan(Population(np.arange(num_clients), np.full(num_clients, 9)))
    assert plan[0].quotas.tolist() == [quota] * num_clients


def test_clients_without_data_do_not_count_in_the_quota():
    plan = FixedLocalSampler(8).plan(Population([0, 1, 2, 3], [0, 8, 8, 0]))
    assert plan.dense().tolist() == [[4, 4], [4, 4]]


@pytest.mark.parametrize("sampler", [FixedLocalSampler, FixedProportionalSampler])
def test_quotas_do_not_depend_on_seed_or_epoch(sampler):
    population = Population([0, 1, 2], [10, 3, 20])
    first = sampler(6, seed=1).plan(population, 0).dense()
    np.testing.assert_array_equal(sampler(6, seed=2).plan(population, 5).dense(), first)


@pytest.mark.parametrize("sampler", [FixedLocalSampler, FixedProportionalSampler])
def test_memory_is_of_the_data_not_of_steps_times_clients(sampler):
    num_clients, tail = 50_000, 100_000  # one client lasts 100,000 steps: a table would take 40 GB
    population = Population(np.arange(num_clients), np.r_[tail, np.ones(num_clients - 1, int)])
    tracemalloc.start()
    plan = sampler(1).plan(population)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == tail
    assert peak < 200 * population.num_examples


# docs/method.md, 3. The figures are means over a few splits. Over 200 splits the standard deviation of a step count is
# 10 to 13 % of the mean for FLS (its largest client decides) and 1.4 to 3 % for FPLS; over five splits the standard
# errors are 5 and 1 %, and the tolerances a little more.
@pytest.mark.parametrize(
    ("num_clients", "local_steps", "proportional_steps"), [(16, 637, 421), (64, 794, 579), (128, 929, 576)]
)
def test_step_counts_on_the_severe_split(num_clients, local_steps, proportional_steps):
    labels = np.repeat(np.arange(10), 5000)
    steps = []
    for seed in range(40):
        rows = extended_dirichlet_split(labels, num_clients, 2, 3.0, np.random.default_rng(seed))
        population = Population(np.arange(num_clients), [len(part) for part in rows])
        plans = [sampler(128).plan(population) for sampler in (FixedLocalSampler, FixedProportionalSampler)]
        steps.append([len(plan) for plan in plans])
    local, proportional = np.mean(steps, axis=0)
    assert local == pytest.approx(local_steps, rel=0.06)
    assert proportional == pytest.approx(proportional_steps, rel=0.015)
