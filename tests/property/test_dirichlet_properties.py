"""What every LDS plan promises, for any clients, labels, delays and options."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.samplers import Delays, LatentDirichletSampler, Population

seconds = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@st.composite
def cases(draw):
    """Return a population (with empty clients, gaps between ids, extreme delays) and a sampler for it."""
    ids = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True))
    num_classes = draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 12), min_size=num_classes, max_size=num_classes)
    counts = np.array(draw(st.lists(rows, min_size=len(ids), max_size=len(ids)).filter(lambda t: np.any(t))))
    delays = Delays(*(draw(st.lists(seconds, min_size=len(ids), max_size=len(ids))) for _ in range(2)))
    total = int(counts.sum())
    sampler = LatentDirichletSampler(
        draw(st.one_of(st.just(1), st.just(total), st.integers(1, total))),
        seed=draw(st.integers(0, 2**40)),
        delta=draw(st.one_of(st.just(0.0), st.floats(0, 100))),
        c=draw(st.floats(1e-3, 100)),
        sample_size=draw(st.integers(1, 2000)),
        tolerance=draw(st.floats(1e-9, 1)),
        order=draw(st.sampled_from(["shuffled", "natural"])),
    )
    return Population(ids, counts.sum(axis=1), counts, delays), sampler, draw(st.integers(0, 100))


@given(cases())
def test_every_example_is_used_once_in_nearly_equal_batches(case):
    population, sampler, epoch = case
    plan = sampler.plan(population, epoch)
    plan.validate()
    assert len(plan) == -(-population.num_examples // sampler.batch_size)
    sizes = plan.batch_sizes()
    assert sizes.max() <= sampler.batch_size
    assert sizes.max() - sizes.min() <= 1
    assert (plan.dense().sum(axis=0) == plan.population.sizes).all()


@given(cases())
def test_plan_is_a_function_of_seed_epoch_and_population_not_of_the_order_clients_are_given_in(case):
    population, sampler, epoch = case
    reverse = Population(
        population.client_ids[::-1],
        population.sizes[::-1],
        population.label_counts[::-1],
        population.delays.take(np.arange(len(population))[::-1]),
    )
    assert (sampler.plan(population, epoch).dense() == sampler.plan(reverse, epoch).dense()).all()


@given(cases(), st.integers(0, 2**32))
def test_drawn_classes_add_up_to_batches_and_to_the_population(case, seed):
    population, sampler, epoch = case
    plan = sampler.plan(population, epoch)
    counts = draw_class_counts(plan, np.random.default_rng(seed))
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == plan.batch_sizes()).all()
    assert (counts.sum(axis=0) == population.label_counts.sum(axis=0)).all()
