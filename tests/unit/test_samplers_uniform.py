"""Uniform global sampling has the distribution of centralised sampling without replacement, and stays sparse."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from psl_flower.samplers import Population, UniformGlobalSampler

# Seeds are fixed, so these tests are deterministic: sound samplers pass, at a level that one in ten thousand sound
# samplers would miss, and an impostor must fail by a wide margin.
LEVEL, IMPOSTOR_LEVEL = 1e-4, 1e-9
IDS, SIZES, BATCH_SIZE, NUM_PLANS = np.array([2, 3, 5, 11]), np.array([30, 20, 9, 1]), 20, 3000


def uniform_tables(sizes=SIZES, batch_size=BATCH_SIZE, num_plans=NUM_PLANS):
    """Return the (plans, T, K) quotas of many plans, over seeds and epochs."""
    population = Population(IDS[: len(sizes)], sizes)
    samplers = [UniformGlobalSampler(batch_size, seed=seed) for seed in range(num_plans // 2)]
    return np.array([sampler.plan(population, epoch).dense() for sampler in samplers for epoch in range(2)])


def impostor_tables(sizes=SIZES, batch_size=BATCH_SIZE, num_plans=NUM_PLANS):
    """Return the quotas of multinomial sampling: each batch drawn with replacement."""
    shape = (num_plans, sizes.sum() // batch_size)
    return np.random.default_rng(0).multinomial(batch_size, sizes / sizes.sum(), size=shape)


def chi_square_p_value(counts, distribution):
    """Return the p-value of draws `counts` of a discrete distribution; values expected less than 5 times are pooled."""
    values = np.arange(max(counts.max(), distribution.support()[1]) + 1)
    expected = len(counts) * distribution.pmf(values)
    observed = np.bincount(counts, minlength=len(values))
    if observed[expected == 0].any():
        return 0.0
    rare = expected < 5
    if rare.any():
        rare[np.where(rare, np.inf, expected).argmin()] = True  # so that the pool is itself not rare
        observed, expected = np.r_[observed[~rare], observed[rare].sum()], np.r_[expected[~rare], expected[rare].sum()]
    if len(expected) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected).pvalue)


def client_p_values(tables):
    """Return the p-value of each client's quota in each step against the hypergeometric distribution, (T, K)."""
    return np.array(
        [
            [
                chi_square_p_value(tables[:, t, k], stats.hypergeom(SIZES.sum(), size, BATCH_SIZE))
                for k, size in enumerate(SIZES)
            ]
            for t in range(tables.shape[1])
        ]
    )


def class_tables(tables, orders):
    """Return the (plans, T, C) class counts of batches, given each client's order of its labels, plan by plan."""
    result = np.zeros((*tables.shape[:2], 3), dtype=int)
    for plan, table in enumerate(tables):
        for k in range(len(SIZES)):
            steps = np.repeat(np.arange(len(table)), table[:, k])
            np.add.at(result[plan], (steps, orders(plan, k)[: len(steps)]), 1)
    return result


class TestDistribution:
    def test_quotas_of_a_step_are_hypergeometric(self):
        assert client_p_values(uniform_tables()).min() > LEVEL

    def test_the_same_test_rejects_sampling_with_replacement(self):
        assert client_p_values(impostor_tables()).max() < IMPOSTOR_LEVEL

    def test_whole_plans_have_the_probabilities_of_shuffled_data(self):
        # not only each quota on its own: how often every possible plan of six examples comes up
        sizes = np.array([3, 2, 1])
        shuffles = np.array(list(itertools.permutations(np.repeat(np.arange(3), sizes))))
        exact = Counter(map(np.ndarray.tobytes, np.eye(3, dtype=int)[shuffles.reshape(-1, 3, 2)].sum(axis=2)))
        expected = np.array(list(exact.values())) / len(shuffles) * NUM_PLANS

        seen = Counter(map(np.ndarray.tobytes, uniform_tables(sizes, 2)))
        assert set(seen) == set(exact)
        assert stats.chisquare([seen[table] for table in exact], expected).pvalue > LEVEL
        # batches drawn with replacement do not use every example once
        assert set(map(np.ndarray.tobytes, impostor_tables(sizes, 2))) > set(exact)

    def test_class_counts_of_a_batch_are_hypergeometric(self):
        # clients hold different classes, and take their examples in the order that their own seed gives
        labels = [np.arange(30) % 2, np.full(20, 2), np.r_[np.zeros(8, int), 1], np.array([1])]
        sizes = np.bincount(np.concatenate(labels))
        tables = uniform_tables()

        def shuffled(plan, k):
            return labels[k][np.random.default_rng([plan // 2, plan % 2, IDS[k]]).permutation(SIZES[k])]

        def sorted_(_, k):
            return np.sort(labels[k])

        distributions = [stats.hypergeom(SIZES.sum(), size, BATCH_SIZE) for size in sizes]
        for orders, sound in ((shuffled, True), (sorted_, False)):
            counts = class_tables(tables, orders)
            assert (counts.sum(axis=2) == BATCH_SIZE).all()
            p_values = [
                chi_square_p_value(counts[:, t, c], distributions[c]) for t in range(counts.shape[1]) for c in range(3)
            ]
            assert min(p_values) > LEVEL if sound else min(p_values) < IMPOSTOR_LEVEL


class TestPlan:
    @pytest.mark.parametrize(
        ("num_examples", "batch_size", "batches"),
        [
            (10, 3, [3, 3, 2, 2]),
            (10, 5, [5, 5]),
            (10, 10, [10]),
            (4, 1, [1, 1, 1, 1]),
            (129, 128, [65, 64]),
            (1, 1, [1]),
        ],
    )
    def test_parts_are_nearly_equal(self, num_examples, batch_size, batches):
        plan = UniformGlobalSampler(batch_size).plan(Population([0], [num_examples]))
        assert plan.batch_sizes().tolist() == batches

    def test_epochs_and_seeds_differ(self):
        population = Population(np.arange(10), np.full(10, 10))
        plans = {
            UniformGlobalSampler(10, seed=seed).plan(population, epoch).dense().tobytes()
            for seed in range(5)
            for epoch in range(5)
        }
        assert len(plans) == 25

    @pytest.mark.parametrize("num_clients", [255, 256, 257, 65_535, 65_536, 65_537])
    def test_every_number_of_clients_has_a_wide_enough_owner(self, num_clients):
        UniformGlobalSampler(100).plan(Population(np.arange(num_clients), np.ones(num_clients, int))).validate()

    def test_memory_is_of_the_data_not_of_steps_times_clients(self):
        num_clients = 50_000  # 100,000 steps: a table would take 40 GB
        population = Population(np.arange(num_clients), np.full(num_clients, 4))
        tracemalloc.start()
        plan = UniformGlobalSampler(2).plan(population)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(plan) == 100_000
        assert peak < 100 * population.num_examples
