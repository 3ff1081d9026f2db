"""What every plan of the basic samplers promises, for any population, batch size, seed and epoch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from psl_flower.samplers import (
    Delays,
    FixedLocalSampler,
    FixedProportionalSampler,
    Population,
    UniformGlobalSampler,
)

SAMPLERS = (FixedLocalSampler, FixedProportionalSampler, UniformGlobalSampler)


@st.composite
def cases(draw):
    """Return a population (with empty clients and gaps between ids, or one client), batch size, seed and epoch."""
    ids = draw(st.lists(st.integers(0, 50), min_size=1, max_size=10, unique=True))
    sizes = draw(st.lists(st.integers(0, 40), min_size=len(ids), max_size=len(ids)).filter(any))
    batch_size = draw(st.one_of(st.just(1), st.just(sum(sizes)), st.integers(1, sum(sizes))))
    return Population(ids, sizes), batch_size, draw(st.integers(0, 2**40)), draw(st.integers(0, 1000))


@given(cases(), st.sampled_from(SAMPLERS))
def test_every_example_is_used_once_and_clients_without_data_never(case, sampler):
    population, batch_size, seed, epoch = case
    plan = sampler(batch_size, seed=seed).plan(population, epoch)
    plan.validate()
    used = dict(zip(plan.population.client_ids.tolist(), plan.dense().sum(axis=0).tolist(), strict=True))
    held = dict(zip(population.client_ids.tolist(), population.sizes.tolist(), strict=True))
    assert used == {client: size for client, size in held.items() if size}


@given(cases(), st.sampled_from(SAMPLERS))
def test_plan_is_a_function_of_seed_epoch_and_population(case, sampler):
    population, batch_size, seed, epoch = case
    one, other = (sampler(batch_size, seed=seed).plan(population, epoch) for _ in range(2))
    assert_same_plan(one, other)


@given(cases(), st.sampled_from(SAMPLERS), st.randoms(use_true_random=False))
def test_order_and_extras_of_the_input_do_not_matter(case, sampler, random):
    population, batch_size, seed, epoch = case
    order = list(range(len(population)))
    random.shuffle(order)
    permuted = Population(
        population.client_ids[order],
        population.sizes[order],
        label_counts=population.sizes[order][:, None],
        delays=Delays(np.ones(len(order)), np.ones(len(order))),
    )
    plan = sampler(batch_size, seed=seed).plan(population, epoch)
    assert_same_plan(plan, sampler(batch_size, seed=seed).plan(permuted, epoch))
    # clients without data add nothing
    added = Population([*population.client_ids, 99], [*population.sizes, 0])
    assert_same_plan(plan, sampler(batch_size, seed=seed).plan(added, epoch))


@given(cases())
def test_uniform_batches_are_nearly_equal_and_as_few_as_can_be(case):
    population, batch_size, seed, epoch = case
    sizes = UniformGlobalSampler(batch_size, seed=seed).plan(population, epoch).batch_sizes()
    assert len(sizes) == -(-population.num_examples // batch_size)
    assert sizes.max() <= batch_size
    assert sizes.max() - sizes.min() <= 1


@given(cases(), st.booleans())
def test_fixed_quotas_are_those_of_the_definition(case, proportional):
    population, batch_size, seed, epoch = case
    sampler = FixedProportionalSampler if proportional else FixedLocalSampler
    plan = sampler(batch_size, seed=seed).plan(population, epoch)
    left = {k: n for k, n in zip(population.client_ids.tolist(), population.sizes.tolist(), strict=True) if n}
    shares = {k: n / population.num_examples if proportional else 1 / len(left) for k, n in left.items()}
    expected = []
    while left:
        step = {k: min(n, max(1, round(batch_size * shares[k]))) for k, n in left.items()}
        left = {k: n - step[k] for k, n in left.items() if n > step[k]}
        expected.append(step)
    assert [dict(zip(s.clients.tolist(), s.quotas.tolist(), strict=True)) for s in plan] == expected


def assert_same_plan(one, other):
    for field in ("offsets", "clients", "quotas"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
