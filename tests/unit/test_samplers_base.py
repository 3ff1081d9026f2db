"""Populations, delays, plans and the base of all samplers: what they hold, and every error they raise."""

import subprocess
import sys

import numpy as np
import pytest

from psl_flower.checks import as_int64
from psl_flower.errors import ConfigError
from psl_flower.samplers import (
    BatchPlan,
    Delays,
    FixedLocalSampler,
    FixedProportionalSampler,
    PlanStep,
    Population,
    Sampler,
    UniformGlobalSampler,
)
from psl_flower.samplers.base import epoch_rng


def make_plan(**changes):
    """Return a plan of three steps over clients 3, 5 (no 4) and 9, with classes; `changes` replace its fields."""
    fields = {
        "population": Population([3, 5, 9], [3, 2, 2], label_counts=[[2, 1], [0, 2], [1, 1]]),
        "offsets": [0, 2, 4, 5],
        "clients": [3, 5, 3, 9, 5],
        "quotas": [2, 1, 1, 2, 1],
        "class_quotas": [[2, 0], [0, 1], [0, 1], [1, 1], [0, 1]],
    }
    return BatchPlan(**{**fields, **changes})


class GreedySampler(Sampler):
    """Gives everything in one step; reports what the base class handed down."""

    def _plan(self, population, rng):
        self.seen, self.draw = population, int(rng.integers(2**32))
        return BatchPlan(population, [0, len(population)], population.client_ids, population.sizes)


class TestAsInt64:
    @pytest.mark.parametrize(
        "values", [[1, 2], [1.0, 2.0], np.array([1, 2], np.uint8), np.array([1, 2], np.float16), ()]
    )
    def test_whole_numbers_become_int64(self, values):
        result = as_int64(values, "x")
        assert result.dtype == np.int64
        assert result.tolist() == list(values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1, 2.5], "x must be whole numbers, got 2.5"),
            ([1, np.nan], "x must be whole numbers, got nan"),
            ([np.inf], "x must be whole numbers, got inf"),
            (["1"], "x must be whole numbers, got dtype <U1"),
            ([True], "x must be whole numbers, got dtype bool"),
            ([1j], "x must be whole numbers, got dtype complex128"),
            ([None], "x must be whole numbers, got dtype object"),
            ([2**70], "x must be whole numbers, got dtype object"),
            ([[1], [2, 3]], "x must be an array of whole numbers"),
            (np.array([2**63], np.uint64), "x must fit in 64 bits, got 9223372036854775808"),
            ([1e300], r"x must fit in 64 bits, got 1e\+300"),
            ([-1e19], r"x must fit in 64 bits, got -1e\+19"),
        ],
    )
    def test_anything_else_is_refused(self, values, message):
        with pytest.raises(ConfigError, match=message):
            as_int64(values, "x")

    def test_the_largest_that_fits(self):
        assert as_int64(np.array([2**63 - 1], np.uint64), "x").tolist() == [2**63 - 1]

    def test_result_is_a_read_only_copy(self):
        values = np.array([1, 2])
        result = as_int64(values, "x")
        values[0] = 7
        assert result.tolist() == [1, 2]
        with pytest.raises(ValueError, match="read-only"):
            result[0] = 3

    def test_a_view_leaves_its_source_writable(self):
        values = np.array([1, 2])
        result = as_int64(values, "x", copy=False)
        values[0] = 7
        assert result.tolist() == [7, 2]
        with pytest.raises(ValueError, match="read-only"):
            result[0] = 3


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


class TestBatchPlan:
    def test_reads_as_a_sequence_of_steps(self):
        plan = make_plan()
        assert len(plan) == 3
        step = plan[1]
        assert isinstance(step, PlanStep)
        assert step.clients.tolist() == [3, 9]
        assert step.quotas.tolist() == [1, 2]
        assert step.class_quotas.tolist() == [[0, 1], [1, 1]]
        assert step.batch_size == 3
        assert [s.clients.tolist() for s in plan] == [[3, 5], [3, 9], [5]]
        assert plan[-1].clients.tolist() == plan[np.int64(2)].clients.tolist() == [5]
        assert [s.clients.tolist() for s in plan[::-2]] == [[5], [3, 5]]
        assert plan[3:] == []

    @pytest.mark.parametrize("index", [3, -4])
    def test_there_are_no_more_steps(self, index):
        with pytest.raises(IndexError, match=f"step {index} of a plan of 3 steps"):
            make_plan()[index]

    def test_steps_without_classes_have_none(self):
        assert make_plan(class_quotas=None)[0].class_quotas is None

    def test_per_step_and_per_entry_views(self):
        plan = make_plan()
        assert plan.batch_sizes().tolist() == [3, 3, 1]
        assert plan.active_clients().tolist() == [2, 2, 1]
        assert plan.steps().tolist() == [0, 0, 1, 1, 2]
        assert plan.rows().tolist() == [0, 1, 0, 2, 1]
        assert plan.dense().tolist() == [[2, 1, 0], [1, 0, 2], [0, 1, 0]]
        assert repr(plan) == "BatchPlan(3 steps, 3 clients, batches of 1 to 3)"

    def test_rows_of_consecutive_ids(self):
        plan = BatchPlan(Population([4, 5, 6], [1, 1, 1]), [0, 2, 3], [4, 6, 5], [1, 1, 1])
        assert plan.rows().tolist() == [0, 2, 1]
        assert plan.rows().dtype == np.intp

    def test_a_plan_without_steps(self):
        plan = BatchPlan(Population([1], [1]), [0], [], [])
        assert len(plan) == 0
        assert list(plan) == []
        assert plan.batch_sizes().tolist() == []
        assert plan.dense().shape == (0, 1)
        assert len(plan.shuffled(np.random.default_rng(0))) == 0
        assert repr(plan) == "BatchPlan(0 steps, 1 clients, no batch)"

    def test_arrays_are_int64_and_read_only(self):
        plan = make_plan(clients=np.array([3, 5, 3, 9, 5], np.int32))
        for array in (plan.offsets, plan.clients, plan.quotas, plan.class_quotas, plan[0].quotas):
            assert array.dtype == np.int64
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0

    def test_shuffled_has_the_same_steps_in_another_order(self):
        sizes = np.arange(1, 30)
        plan = UniformGlobalSampler(7).plan(Population(np.arange(29) * 3, sizes))
        shuffled = plan.shuffled(np.random.default_rng(1))
        shuffled.validate()
        order = np.random.default_rng(1).permutation(len(plan))
        np.testing.assert_array_equal(shuffled.dense(), plan.dense()[order])
        assert not np.array_equal(order, np.arange(len(plan)))

    def test_shuffled_keeps_class_quotas_with_their_entries(self):
        for seed in range(5):
            shuffled = make_plan().shuffled(np.random.default_rng(seed))
            shuffled.validate()
            for step in shuffled:
                assert step.class_quotas.sum(axis=1).tolist() == step.quotas.tolist()

    def test_validate_accepts_a_plan_that_keeps_its_promises(self):
        make_plan().validate()
        make_plan(class_quotas=None).validate()
        make_plan(population=Population([3, 5, 9], [3, 2, 2])).validate()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"offsets": [0, 2, 4]}, r"offsets must be 1-D and lead from 0 to 5 entries, got \[0 2 4\]"),
            ({"offsets": [1, 2, 5]}, "offsets must be 1-D and lead from 0"),
            ({"offsets": []}, "offsets must be 1-D and lead from 0"),
            ({"offsets": [[0, 5]]}, "offsets must be 1-D"),
            ({"offsets": [0, 4, 2, 5]}, "offsets must not decrease"),
            ({"quotas": [2, 1, 1, 3]}, r"clients and quotas must be 1-D and of one length, got \(5,\) and \(4,\)"),
            ({"clients": [[3, 5, 3, 9, 5]]}, "clients and quotas must be 1-D"),
            ({"quotas": [2, 1, 1, 1.5, 1]}, "quotas must be whole numbers, got 1.5"),
            ({"class_quotas": [[2, 0]]}, r"class_quotas must have shape \(5, classes\), got \(1, 2\)"),
            ({"class_quotas": [2, 1, 1, 2, 1]}, r"class_quotas must have shape \(5, classes\), got \(5,\)"),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused_at_once(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            make_plan(**changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quotas": [3, 0, 0, 2, 2]}, "quotas must be at least 1, got 0"),
            ({"offsets": [0, 2, 2, 4, 5]}, "step 1 has no client"),
            ({"clients": [3, 4, 3, 9, 5]}, "names client 4, which is not in its population"),
            ({"clients": [3, 5, 3, 10, 5]}, "names client 10, which is not"),
            ({"clients": [3, 5, 3, -1, 5]}, "names client -1, which is not"),
            ({"clients": [5, 3, 3, 9, 5]}, "clients of step 0 are not unique and ascending"),
            ({"clients": [3, 5, 9, 9, 5]}, "clients of step 1 are not unique and ascending"),
            ({"quotas": [2, 1, 1, 2, 2]}, "client 5 holds 2 examples, 3 are used"),
            (
                {"offsets": [0], "clients": [], "quotas": [], "class_quotas": None},
                "client 3 holds 3 examples, 0 are used",
            ),
            ({"class_quotas": [[3, -1], [0, 1], [0, 1], [1, 1], [0, 1]]}, "class quotas must not be negative, got -1"),
            ({"class_quotas": [[2, 0], [0, 1], [0, 1], [1, 0], [0, 1]]}, "class quotas do not add up"),
            ({"class_quotas": [[2], [1], [1], [2], [1]]}, "class quotas are of 1 classes, label_counts of 2"),
            (
                {"class_quotas": [[2, 0], [0, 1], [1, 0], [1, 1], [0, 1]]},
                "client 3 holds 2 examples of class 0, 3 are used",
            ),
        ],
    )
    def test_validate_refuses(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            make_plan(**changes).validate()

    def test_validate_with_consecutive_ids_knows_the_unknown(self):
        for stranger in (3, 7):
            plan = BatchPlan(Population([4, 5, 6], [1, 1, 1]), [0, 3], sorted([4, 5, stranger]), [1, 1, 1])
            with pytest.raises(ConfigError, match=f"names client {stranger}, which is not"):
                plan.validate()


class TestSampler:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
            ({"batch_size": True}, "batch_size must be a whole number, got True"),
            ({"batch_size": 1, "seed": -1}, "seed must be at least 0, got -1"),
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


def test_numpy_parts_import_no_framework():
    code = (
        "import sys, psl_flower; before = set(sys.modules)\n"
        "import psl_flower.samplers, psl_flower.partition, psl_flower.metrics\n"
        "print(sorted({'datasets', 'flwr', 'torch'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
