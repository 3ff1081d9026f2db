"""Populations and delays: what they hold, and every error they raise."""

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.samplers import Delays, Population


class TestDelays:
    def test_holds_seconds(self):
        delays = Delays([1, 2], [0.5, 0])
        assert len(delays) == 2
        assert delays.latency.dtype == delays.per_sample.dtype == np.float64
        assert delays.take(np.array([1])).latency.tolist() == [2.0]

    @pytest.mark.parametrize(
        ("latency", "per_sample", "message"),
        [
            ([1, 2], [1], "must name the same clients, got 2 and 1"),
            ([-1.0], [1], r"latency must be finite and not negative \(seconds\), got -1.0"),
            ([1], [np.nan], "per_sample must be finite and not negative"),
            ([np.inf], [1], "latency must be finite"),
            ([[1.0]], [1], r"latency must be one number a client, got shape \(1, 1\)"),
            (["fast"], [1], r"latency must be one number a client \(seconds\)"),
        ],
    )
    def test_refuses(self, latency, per_sample, message):
        with pytest.raises(ConfigError, match=message):
            Delays(latency, per_sample)


class TestPopulation:
    def test_clients_come_in_ascending_id_with_all_that_is_theirs(self):
        population = Population([9, 3, 5], [2, 3, 2], [[1, 1], [2, 1], [0, 2]], Delays([9, 3, 5], [0.9, 0.3, 0.5]))
        assert population.client_ids.tolist() == [3, 5, 9]
        assert population.sizes.tolist() == [3, 2, 2]
        assert population.label_counts.tolist() == [[2, 1], [0, 2], [1, 1]]
        assert population.delays.latency.tolist() == [3, 5, 9]
        assert population.delays.per_sample.tolist() == [0.3, 0.5, 0.9]
        assert len(population) == 3
        assert population.num_examples == 7

    def test_arrays_are_read_only(self):
        population = Population([1], [2], [[2]], Delays([0], [0]))
        for array in (population.client_ids, population.sizes, population.label_counts, population.delays.latency):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0

    def test_with_data_leaves_out_clients_without(self):
        population = Population([1, 2, 3], [2, 0, 1], [[2], [0], [1]], Delays([1, 2, 3], [1, 2, 3])).with_data()
        assert population.client_ids.tolist() == [1, 3]
        assert population.sizes.tolist() == [2, 1]
        assert population.label_counts.tolist() == [[2], [1]]
        assert population.delays.latency.tolist() == [1, 3]

    def test_with_data_is_itself_where_all_have_some(self):
        population = Population([1, 2], [2, 1])
        assert population.with_data() is population

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([], []), "at least one client, got none"),
            (([1, 2], [1]), r"of one length, got \(2,\) and \(1,\)"),
            (([[1]], [[1]]), "must be 1-D"),
            (([1, -2], [1, 1]), "client_ids must not be negative, got -2"),
            (([4, 1, 4], [1, 1, 1]), "client_ids must be unique, got 4 more than once"),
            (([7, 8], [1, -5]), "sizes must not be negative, got -5 for client 8"),
            (([1, 2], [0, 0]), "at least one example, all sizes are 0"),
            (([1, 2], [2**62, 2**62]), "all sizes together must fit in 64 bits, got 9223372036854775808 examples"),
            (([1.5], [1]), "client_ids must be whole numbers, got 1.5"),
            (([1], [1.5]), "sizes must be whole numbers, got 1.5"),
            (([1, 2], [1, 1], [1, 1]), r"label_counts must have shape \(2, classes\), got \(2,\)"),
            (([1, 2], [1, 1], [[1]]), r"label_counts must have shape \(2, classes\), got \(1, 1\)"),
            (([1, 2], [1, 1], [[2, -1], [1, 0]]), "label_counts must not be negative, got -1"),
            (([8, 6], [1, 2], [[1, 0], [1, 0]]), "label_counts of client 6 add up to 1, its size is 2"),
            (([1], [1], [[]]), "add up to 0, its size is 1"),
            (([1, 2], [1, 1], None, Delays([1], [1])), "delays must name all 2 clients, got 1"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            Population(*arguments)
