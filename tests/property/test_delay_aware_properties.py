"""What every LB and Aligned plan promises, for any clients, labels, delays and options."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import class_table

from psl_flower.metrics import schedule_lower_bound
from psl_flower.samplers import AlignedSampler, Delays, LatencyBudgetedSampler, Population
from psl_flower.samplers.base import epoch_rng
from psl_flower.samplers.targets import class_targets
from psl_flower.stragglers import step_times

seconds = st.one_of(st.sampled_from([0.0, 1.0, 10.0]), st.floats(1e-6, 1e6))


@st.composite
def populations(draw):
    """Return clients with gaps between ids, empty ones, one class, equal, no and extreme delays among them."""
    ids = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True))
    num_classes = draw(st.integers(1, 4))
    row = st.one_of(
        st.lists(st.integers(0, 12), min_size=num_classes, max_size=num_classes),
        st.sampled_from(np.eye(num_classes, dtype=int).tolist()),  # a single example
    )
    counts = np.array(draw(st.lists(row, min_size=len(ids), max_size=len(ids)).filter(lambda t: np.any(t))))
    columns = [
        draw(st.one_of(seconds.map(lambda s: [s] * len(ids)), st.lists(seconds, min_size=len(ids), max_size=len(ids))))
        for _ in range(2)
    ]
    return Population(ids, counts.sum(axis=1), counts, Delays(*columns))


@st.composite
def cases(draw):
    """Return a population, a sampler for it, and an epoch."""
    population = draw(populations())
    total = population.num_examples
    batch = draw(st.one_of(st.just(1), st.just(total), st.integers(1, total)))
    shared = {
        "seed": draw(st.integers(0, 2**40)),
        "targets": draw(st.sampled_from(["random", "stratified"])),
        "order": draw(st.sampled_from(["shuffled", "natural"])),
    }
    if draw(st.booleans()):
        sampler = LatencyBudgetedSampler(batch, method=draw(st.sampled_from(["greedy", "flow", "auto"])), **shared)
    else:
        tilt, durations = draw(st.sampled_from([0.0, 0.1, 0.5, 2.0])), draw(st.integers(2, 12))
        sampler = AlignedSampler(batch, tilt=tilt, max_durations=durations, **shared)
    return population, sampler, draw(st.integers(0, 100))


@settings(max_examples=30)
@given(cases())
def test_every_example_is_used_once_in_nearly_equal_batches_and_counted_by_class(case):
    population, sampler, epoch = case
    plan = sampler.plan(population, epoch)
    plan.validate()
    assert len(plan) == -(-population.num_examples // sampler.batch_size)
    sizes = plan.batch_sizes()
    assert sizes.max() <= sampler.batch_size
    assert sizes.max() - sizes.min() <= 1
    assert (plan.class_quotas >= 0).all()


@settings(max_examples=30)
@given(cases())
def test_class_targets_are_met_exactly(case):
    population, sampler, epoch = case
    sampler.order = "natural"
    table = class_table(sampler.plan(population, epoch))
    rng = epoch_rng(sampler.seed, epoch).spawn(4)[0]
    targets = class_targets(sampler.targets, population.label_counts.sum(axis=0), sampler.batch_size, rng)
    assert (table.sum(axis=1) == targets.sum(axis=1)).all()
    if not getattr(sampler, "tilt", 0):
        assert (table == targets).all()


@settings(max_examples=30)
@given(cases())
def test_no_plan_beats_the_bound_for_its_targets(case):
    population, sampler, epoch = case
    plan = sampler.plan(population, epoch)
    time = step_times(plan).sum()
    assert schedule_lower_bound(population, class_table(plan)) <= time * (1 + 1e-6) + 1e-9


@settings(max_examples=30)
@given(cases())
def test_plan_is_a_function_of_seed_epoch_and_population_not_of_the_order_clients_are_given_in(case):
    population, sampler, epoch = case
    reverse = Population(
        population.client_ids[::-1],
        population.sizes[::-1],
        population.label_counts[::-1],
        population.delays.take(np.arange(len(population))[::-1]),
    )
    first, second = sampler.plan(population, epoch), sampler.plan(reverse, epoch)
    assert (first.class_quotas == second.class_quotas).all()
    assert (first.clients == second.clients).all()


@settings(max_examples=30)
@given(populations(), st.integers(0, 2**32), st.sampled_from(["random", "stratified"]), st.data())
def test_aligned_takes_no_longer_than_greedy_lb_with_the_same_targets(population, seed, targets, data):
    batch = data.draw(st.integers(1, population.num_examples))
    tilt = data.draw(st.sampled_from([0.0, 0.3]))
    greedy = LatencyBudgetedSampler(batch, seed=seed, targets=targets, method="greedy").plan(population)
    aligned = AlignedSampler(batch, seed=seed, targets=targets, tilt=tilt).plan(population)
    assert step_times(aligned).sum() <= step_times(greedy).sum() * (1 + 1e-12)


@settings(max_examples=30)
@given(populations(), st.integers(0, 2**32), st.integers(-20, 20), st.data())
def test_the_unit_of_time_does_not_matter(population, seed, exponent, data):
    batch = data.draw(st.integers(1, population.num_examples))
    delays = Delays(population.delays.latency * 2.0**exponent, population.delays.per_sample * 2.0**exponent)
    scaled = Population(population.client_ids, population.sizes, population.label_counts, delays)
    for sampler in (
        AlignedSampler(batch, seed=seed),
        LatencyBudgetedSampler(batch, seed=seed, method="greedy"),
        LatencyBudgetedSampler(batch, seed=seed, method="flow"),
    ):
        assert (sampler.plan(population).class_quotas == sampler.plan(scaled).class_quotas).all()
