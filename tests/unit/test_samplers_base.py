"""The base of all samplers: what it checks, and what it hands down."""

import subprocess
import sys

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.samplers import (
    BatchPlan,
    Delays,
    FixedLocalSampler,
    FixedProportionalSampler,
    LatentDirichletSampler,
    Population,
    Sampler,
    UniformGlobalSampler,
)
from psl_flower.samplers.base import epoch_rng


class GreedySampler(Sampler):
    """Gives everything in one step; reports what the base class handed down."""

    def _plan(self, population, rng):
        self.seen, self.draw = population, int(rng.integers(2**32))
        return BatchPlan(population, [0, len(population)], population.client_ids, population.sizes)


class TestSampler:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
            ({"batch_size": True}, "batch_size must be a whole number, got True"),
            ({"batch_size": 1, "seed": -1}, "seed must be at least 0, got -1"),
            ({"batch_size": 1, "seed": 2**63}, "seed must be at most 9223372036854775807, got 9223372036854775808"),
            ({"batch_size": 1, "seed": None}, "seed must be a whole number, got None"),
        ],
    )
    @pytest.mark.parametrize("sampler", [FixedLocalSampler, FixedProportionalSampler, UniformGlobalSampler])
    def test_arguments_are_checked_at_construction(self, sampler, arguments, message):
        with pytest.raises(ConfigError, match=message):
            sampler(**arguments)

    @pytest.mark.parametrize("epoch", [-1, 0.5])
    def test_epoch_is_checked(self, epoch):
        with pytest.raises(ConfigError, match="epoch must be"):
            GreedySampler(1).plan(Population([1], [1]), epoch)

    def test_batch_larger_than_the_data_is_refused(self):
        with pytest.raises(ConfigError, match="must not exceed the number of examples, got 8 for 7 examples: lower"):
            GreedySampler(8).plan(Population([1, 2], [3, 4]))
        GreedySampler(7).plan(Population([1, 2], [3, 4])).validate()

    @pytest.mark.parametrize("field", ["label_counts", "delays"])
    def test_what_a_sampler_needs_must_be_there(self, field):
        class Needy(GreedySampler):
            needs_label_counts = field == "label_counts"
            needs_delays = field == "delays"

        with pytest.raises(ConfigError, match=f"Needy needs the population's {field}, which are not given"):
            Needy(1).plan(Population([1], [1]))
        Needy(1).plan(Population([1], [1], [[1]], Delays([0], [0]))).validate()

    def test_hook_sees_only_clients_with_data(self):
        sampler = GreedySampler(2)
        plan = sampler.plan(Population([5, 1, 3], [2, 0, 4]))
        assert sampler.seen.client_ids.tolist() == [3, 5]
        assert plan.population is sampler.seen

    def test_stream_depends_on_seed_and_epoch_alone(self):
        draws = {}
        for seed in range(3):
            for epoch in range(3):
                sampler = GreedySampler(1, seed=seed)
                sampler.plan(Population([1], [1]), epoch)
                draws[seed, epoch] = sampler.draw
                sampler.plan(Population([2, 3], [4, 4]), epoch)
                assert sampler.draw == draws[seed, epoch]
        assert len(set(draws.values())) == 9

    def test_stream_is_none_of_the_clients(self):
        ours = epoch_rng(3, 4).integers(2**63, size=4).tolist()
        for client in range(100):
            assert np.random.default_rng([3, 4, client]).integers(2**63, size=4).tolist() != ours
        assert np.random.default_rng([3, 4]).integers(2**63, size=4).tolist() != ours

    def test_repr_can_be_read(self):
        assert repr(UniformGlobalSampler(128, seed=3)) == "UniformGlobalSampler(batch_size=128, seed=3)"
        assert repr(LatentDirichletSampler(9, c=2.0)) == (
            "LatentDirichletSampler(batch_size=9, seed=0, delta=1.0, c=2.0, sample_size=1000, tolerance=0.001, "
            "order='shuffled')"
        )


def test_numpy_parts_import_no_framework():
    code = (
        "import sys, psl_flower; before = set(sys.modules)\n"
        "import psl_flower.samplers, psl_flower.partition, psl_flower.metrics\n"
        "print(sorted({'datasets', 'flwr', 'torch'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
