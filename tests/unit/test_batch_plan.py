"""Plans: what they hold, and every error they raise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower.errors import ConfigError
from psl_flower.samplers import BatchPlan, Delays, PlanStep, Population, UniformGlobalSampler
from psl_flower.samplers.registry import SAMPLERS


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


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), least=st.integers(1, 5))
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_steps_of_few_clients_are_joined_to_others(name, seed, least):
    """Every example stays in one step, by class too; steps are of enough clients, wherever there are so many."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, (6, 3)) * rng.integers(0, 2, (6, 1))
    counts[0, 0] += 1
    delays = Delays(rng.random(6) * rng.choice([1, 20], 6), rng.random(6) / 10)
    population = Population(np.arange(6), counts.sum(axis=1), counts, delays)
    plan = SAMPLERS[name](int(rng.integers(1, min(9, counts.sum() + 1))), seed=seed).plan(population)
    joined = plan.of_at_least(least)
    joined.validate()
    if least <= (counts.sum(axis=1) > 0).sum():
        assert joined.active_clients().min() >= least
    if plan.active_clients().min() >= least:
        assert joined is plan
    untouched = {(*step.clients, *step.quotas) for step in plan if len(step.clients) >= least}
    assert len(joined) >= len(untouched & {(*step.clients, *step.quotas) for step in joined})


def test_what_is_left_over_goes_to_the_smallest_steps():
    clients = [0, 1, 2, 0, 1, 2, 0, 0, 0]
    plan = BatchPlan(Population([0, 1, 2], [13, 3, 3]), [0, 3, 6, 7, 8, 9], clients, [2, 2, 2, 1, 1, 1, 4, 4, 2])
    joined = plan.of_at_least(2)
    assert joined.batch_sizes().tolist() == [10, 9]
    assert joined.dense().tolist() == [[6, 2, 2], [7, 1, 1]]
