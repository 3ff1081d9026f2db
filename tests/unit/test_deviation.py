"""Batch deviation by class and by client, and its summary."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psl_flower.errors import ConfigError
from psl_flower.metrics import DeviationSummary, batch_deviation, client_mix_deviation, summarize_deviation
from psl_flower.samplers import BatchPlan, FixedLocalSampler, Population, UniformGlobalSampler


class TestBatchDeviation:
    def test_is_the_l1_distance_of_class_shares(self):
        # shares of the population: 0.5, 0.25, 0.25
        batches = [[2, 1, 1], [4, 0, 0], [0, 2, 2], [1, 1, 0]]
        np.testing.assert_allclose(batch_deviation(batches, [10, 5, 5]), [0, 1, 1, 0.5], rtol=0, atol=1e-12)

    def test_nothing_in_common_is_two(self):
        assert batch_deviation([[0, 3]], [7, 0]).tolist() == [2.0]

    def test_scale_of_counts_does_not_matter(self):
        batches, population = np.array([[3, 1], [2, 5]]), np.array([4, 9])
        np.testing.assert_allclose(batch_deviation(batches * 10, population * 7), batch_deviation(batches, population))

    def test_no_step_has_no_deviation(self):
        assert batch_deviation(np.zeros((0, 3)), [1, 1, 1]).shape == (0,)

    def test_uniform_sampling_matches_the_figure_of_the_method(self):
        # docs/method.md, 3: mean deviation .21 at B = 128 with 10 balanced classes
        rng = np.random.default_rng(0)
        labels = rng.permutation(np.repeat(np.arange(10), 1280)).reshape(100, 128)
        counts = (labels[:, :, None] == np.arange(10)).sum(axis=1)
        assert batch_deviation(counts, np.full(10, 1280)).mean() == pytest.approx(0.21, abs=0.01)

    @pytest.mark.parametrize(
        ("batches", "population", "message"),
        [
            ([1, 2], [1, 2], r"must have shape \(steps, classes\) and .* got \(2,\) and \(2,\)"),
            ([[1, 2]], [1, 2, 3], r"got \(1, 2\) and \(3,\)"),
            ([[1, 2]], [[1, 2]], r"got \(1, 2\) and \(1, 2\)"),
            ([[1, 2], [0, 0]], [1, 2], "every batch needs an example, that of step 1 has none"),
            ([[1, 2]], [0, 0], "the population needs an example"),
            ([[1, -2]], [1, 2], "batch_counts must be finite and not negative, got -2"),
            ([[1, 2]], [1, np.nan], "population_counts must be finite and not negative, got nan"),
        ],
    )
    def test_refuses(self, batches, population, message):
        with pytest.raises(ConfigError, match=message):
            batch_deviation(batches, population)


class TestClientMixDeviation:
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 100), st.data())
    def test_is_that_of_the_dense_table(self, sizes, seed, data):
        sampler = data.draw(st.sampled_from([FixedLocalSampler, UniformGlobalSampler]))
        plan = sampler(data.draw(st.integers(1, sum(sizes))), seed=seed).plan(
            Population(np.arange(len(sizes)) * 3, sizes)
        )
        expected = batch_deviation(plan.dense(), plan.population.sizes)
        np.testing.assert_allclose(client_mix_deviation(plan), expected, rtol=0, atol=1e-12)

    def test_counts_clients_without_quota(self):
        plan = BatchPlan(Population([1, 2, 3], [2, 1, 1]), [0, 1, 3], [1, 2, 3], [2, 1, 1])
        assert client_mix_deviation(plan).tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("num_clients", range(1, 61))
    def test_is_never_negative(self, num_clients):  # 1 less a sum of shares may be, by an ulp
        plan = FixedLocalSampler(num_clients).plan(Population(np.arange(num_clients), np.full(num_clients, 7)))
        assert client_mix_deviation(plan).min() >= 0
        assert client_mix_deviation(plan).max() < 1e-12

    def test_memory_is_of_the_entries_not_of_steps_times_clients(self):
        plan = UniformGlobalSampler(2).plan(Population(np.arange(50_000), np.full(50_000, 4)))
        tracemalloc.start()
        deviation = client_mix_deviation(plan)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert deviation.shape == (100_000,)
        assert peak < 100 * len(plan.clients)  # a table would take 40 GB

    def test_refuses_an_empty_step(self):
        plan = BatchPlan(Population([1], [2]), [0, 1, 1], [1], [2])
        with pytest.raises(ConfigError, match="every batch needs an example, that of step 1 has none"):
            client_mix_deviation(plan)


class TestSummary:
    def test_weights_steps_by_examples(self):
        # a tail of ten one-example batches dominates the plain mean
        summary = summarize_deviation([0.2] * 10 + [1.8] * 10, [99] * 10 + [1] * 10)
        assert summary.mean == pytest.approx(1.0)
        assert summary.p95 == pytest.approx(1.8)
        assert summary.weighted_mean == pytest.approx(0.2 * 0.99 + 1.8 * 0.01)

    def test_percentile_interpolates(self):
        assert summarize_deviation(np.arange(101) / 100, np.ones(101, int)).p95 == pytest.approx(0.95)

    def test_holds_plain_floats(self):
        summary = summarize_deviation(np.array([0.5]), np.array([3]))
        assert summary == DeviationSummary(0.5, 0.5, 0.5)
        assert {type(value) for value in vars(summary).values()} == {float}

    @pytest.mark.parametrize(
        ("deviation", "sizes", "message"),
        [
            ([], [], r"of one length and not empty, got \(0,\) and \(0,\)"),
            ([0.1, 0.2], [1], r"got \(2,\) and \(1,\)"),
            ([[0.1]], [[1]], "must be 1-D"),
            ([0.1, 0.2], [1, 0], "batch_sizes must be at least 1, got 0 at step 1"),
        ],
    )
    def test_refuses(self, deviation, sizes, message):
        with pytest.raises(ConfigError, match=message):
            summarize_deviation(deviation, sizes)
