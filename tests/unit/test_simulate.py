"""Drawing a plan's classes: exact totals, the hypergeometric distribution, and plans that decide classes themselves."""

import numpy as np
import pytest
from scipy import stats

from psl_flower.errors import ConfigError
from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.samplers import BatchPlan, Population, UniformGlobalSampler


def test_rows_add_up_to_batches_and_columns_to_the_population():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, (12, 5))
    plan = UniformGlobalSampler(17).plan(Population(np.arange(3, 15), counts.sum(axis=1), counts))
    drawn = draw_class_counts(plan, rng)
    assert drawn.shape == (len(plan), 5)
    assert (drawn.sum(axis=1) == plan.batch_sizes()).all()
    assert (drawn.sum(axis=0) == counts.sum(axis=0)).all()


def test_clients_of_one_class_leave_nothing_to_chance():
    population = Population([2, 5, 7], [3, 3, 2], [[3, 0], [0, 3], [2, 0]])
    plan = BatchPlan(population, [0, 2, 4, 5], [2, 5, 2, 7, 5], [2, 1, 1, 2, 2])
    assert draw_class_counts(plan, np.random.default_rng(0)).tolist() == [[2, 1], [3, 0], [0, 2]]


def test_every_step_of_a_client_is_hypergeometric():
    """One client, 4 of 10 examples of class 0: a step of 3 holds hypergeometric many of them, first step and last."""
    plan = BatchPlan(Population([0], [10], [[4, 6]]), [0, 1, 2, 3], [0, 0, 0], [3, 4, 3])
    rng = np.random.default_rng(1)
    drawn = np.array([draw_class_counts(plan, rng)[:, 0] for _ in range(4000)])
    for step in (0, 2):
        observed = np.bincount(drawn[:, step], minlength=4)
        expected = 4000 * stats.hypergeom(10, 4, 3).pmf(np.arange(4))
        assert stats.chisquare(observed, expected).pvalue > 1e-4
    # without replacement: what one step took, another lacks
    assert np.corrcoef(drawn[:, 0], drawn[:, 2])[0, 1] == pytest.approx(-3 / 7, abs=0.06)


def test_class_quotas_are_counted_not_drawn():
    population = Population([0, 1], [3, 2], [[2, 1], [1, 1]])
    plan = BatchPlan(population, [0, 2, 4], [0, 1, 0, 1], [2, 1, 1, 1], [[1, 1], [0, 1], [1, 0], [1, 0]])
    before = np.random.default_rng(0)
    assert draw_class_counts(plan, before).tolist() == [[1, 2], [2, 0]]
    assert before.random() == np.random.default_rng(0).random()


def test_refuses_a_population_without_labels():
    with pytest.raises(ConfigError, match="label_counts"):
        draw_class_counts(UniformGlobalSampler(1).plan(Population([0], [2])), np.random.default_rng(0))


def test_refuses_a_plan_of_a_part_of_the_data():
    plan = BatchPlan(Population([0], [4], [[2, 2]]), [0, 1], [0], [3])
    with pytest.raises(ConfigError, match="every example of its population once"):
        draw_class_counts(plan, np.random.default_rng(0))
