"""Whatever is lost and whoever is absent: what steps used and what is owed add up, with every sampler."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower.samplers import Delays, Population
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.strategy.agenda import Agenda, part, saved_population

K, C = 5, 3


def population(rng):
    counts = rng.integers(0, 9, (K, C))
    counts[rng.integers(K)] = 0
    counts[0, 0] += 5
    delays = Delays(rng.random(K) * rng.choice([1, 10], K), rng.random(K) / 10)
    ids = np.sort(rng.choice(20, K, replace=False))
    return Population(ids, counts.sum(axis=1), counts, delays)


def labels_of(rng, client_labels, step, cursors):
    """Return the labels a client's examples have, in an order of its own."""
    result = {}
    for i, client in enumerate(step.clients.tolist()):
        if step.class_quotas is not None:
            result[client] = np.repeat(np.arange(C), step.class_quotas[i])
        else:
            start = cursors[client]
            result[client] = client_labels[client][start : start + step.quotas[i]]
    return result


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), loss=st.floats(0, 0.6), restore=st.booleans())
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_example_is_used_once(name, seed, loss, restore):
    rng = np.random.default_rng(seed)
    people = population(rng)
    sampler = SAMPLERS[name](int(rng.integers(1, 8)), seed=seed)
    agenda = Agenda(sampler, people, epoch=2)
    client_labels = {
        int(k): rng.permutation(np.repeat(np.arange(C), row))
        for k, row in zip(people.client_ids, people.label_counts, strict=True)
    }
    cursors = dict.fromkeys(client_labels, 0)
    used = {client: [] for client in client_labels}
    used_classes = {client: np.zeros(C, dtype=int) for client in client_labels}
    for _ in range(2000):
        owing = agenda.owing()
        if not len(owing):
            break
        if restore and rng.random() < 0.2:
            state = agenda.state()
            saved = replace(saved_population(state, people), delays=people.delays)
            agenda = Agenda.restored(sampler, saved, 2, state)
        here = rng.permutation(owing)[: max(1, int(np.ceil(len(owing) * (1 - rng.random() * loss))))]
        step = agenda.step(np.sort(here))
        assert set(step.clients) <= set(here)
        assert step.batch_size >= 1
        if name in ("ugs", "lds", "lb", "aligned"):
            assert step.batch_size <= sampler.batch_size
        orders = agenda.orders(7, step)
        arrived = {int(k): None for k in step.clients if rng.random() >= loss}
        if not arrived:
            continue
        came = part(step, arrived)
        labels = labels_of(rng, client_labels, came, cursors)
        agenda.done(came, labels)
        for order in (o for o in orders if o.client in arrived):
            assert order.start == cursors[order.client]
            used[order.client] += range(order.start, order.start + order.count)
            cursors[order.client] += order.count
            used_classes[order.client] += np.bincount(labels[order.client], minlength=C)
            if order.class_counts is not None:
                assert (order.class_starts + order.class_counts == used_classes[order.client]).all()
    assert not len(agenda.owing())
    for client, size, counts in zip(people.client_ids, people.sizes, people.label_counts, strict=True):
        assert used[int(client)] == list(range(size))
        assert (used_classes[int(client)] == counts).all()


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_plans_made_anew_are_a_function_of_what_is_owed_and_of_their_number(name):
    people = population(np.random.default_rng(3))
    sampler = SAMPLERS[name](4, seed=1)
    plans = [sampler.plan(people, 0, replan=i) for i in (0, 1, 1, 2)]
    for plan in plans:
        plan.validate()
    same = [np.array_equal(a.quotas, b.quotas) and np.array_equal(a.clients, b.clients) for a, b in pairwise(plans)]
    assert same[1]
    if name not in ("fls", "fpls"):  # whose quotas are not drawn
        assert not same[0]
        assert not same[2]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_rest_may_be_less_than_a_batch(name):
    sampler = SAMPLERS[name](64, seed=1)
    people = population(np.random.default_rng(3))
    plan = sampler.plan(people, 0, replan=1)
    plan.validate()
    assert plan.batch_sizes().max() <= people.num_examples
    assert sampler.batch_size == 64
    one = Population([4], [1], np.array([[0, 1, 0]]), Delays([1.0], [0.1]))
    assert sampler.plan(one, 0, replan=2).batch_sizes().tolist() == [1]


def test_labels_that_are_not_what_was_reported_are_made_up_for():
    """Soft labels, say: the rest of a client's classes is planned as it was."""
    people = Population([0, 1], [6, 6], np.array([[6, 0], [3, 3]]))
    agenda = Agenda(SAMPLERS["lds"](4, seed=0, delta=0.0), people, 0)
    while len(owing := agenda.owing()):
        step = part(agenda.step(owing), {int(k): None for k in agenda.step(owing).clients[:1]})
        agenda.done(step, {int(k): np.ones((int(n), 2)) for k, n in zip(step.clients, step.quotas, strict=True)})
    assert agenda.owed.tolist() == [0, 0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["ugs", "lds", "lb", "aligned"])
def test_what_lost_clients_owe_is_collected_in_whole_batches_and_planned_seldom(name, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 20, (8, C))
    people = Population(np.arange(8), counts.sum(axis=1), counts, Delays(rng.random(8), rng.random(8) / 10))
    sampler = SAMPLERS[name](12, seed=seed)
    agenda = Agenda(sampler, people, epoch=0)
    labels = {k: np.repeat(np.arange(C), row) for k, row in enumerate(counts)}
    cursors = dict.fromkeys(labels, 0)
    sizes, lost, first_steps = [], 0, agenda.steps_left() - 2
    while len(owing := agenda.owing()):
        step = agenda.step(owing)
        sizes.append(step.batch_size)
        fails = len(sizes) <= first_steps and rng.random() < 0.5
        missing = int(rng.choice(step.clients)) if fails and len(step.clients) > 1 else None
        came = part(step, {int(k): None for k in step.clients if k != missing})
        lost += step.batch_size - came.batch_size
        agenda.done(came, labels_of(rng, labels, came, cursors))
        for client, quota in zip(came.clients.tolist(), came.quotas.tolist(), strict=True):
            cursors[client] += quota
    assert min(sizes) >= sampler.batch_size // 2  # the rest, too: it is collected with the last step
    assert max(sizes) <= sampler.batch_size
    assert agenda.replans <= lost // sampler.batch_size + (lost > 0)
    assert len(sizes) <= first_steps + 2 + lost // sampler.batch_size + agenda.replans


@pytest.mark.parametrize("name", ["ugs", "lds", "lb", "aligned"])
def test_a_step_that_nothing_came_of_is_tried_again_as_it_was(name):
    people = population(np.random.default_rng(3))
    agenda = Agenda(SAMPLERS[name](4, seed=1), people, 0)
    first, again = agenda.step(agenda.owing()), agenda.step(agenda.owing())
    assert np.array_equal(first.clients, again.clients)
    assert agenda.replans == 0
    others = agenda.owing()[agenda.owing() != first.clients[0]]
    assert first.clients[0] not in agenda.step(others).clients
    assert agenda.replans == 1
