"""Whatever is lost and whoever is absent: what steps used and what remains add up, with every sampler."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower.metrics.deviation import batch_deviation
from psl_flower.samplers import Delays, Population
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.strategy import ledger as ledger_module
from psl_flower.strategy.ledger import EpochLedger, part, saved_population

K, C = 5, 3


def make_population(rng):
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


def same(a, b):
    pairs = [(a.clients, b.clients), (a.quotas, b.quotas), (a.class_quotas, b.class_quotas)]
    return all(np.array_equal(x, y) if x is not None else y is None for x, y in pairs)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), loss=st.floats(0, 0.6), restore=st.booleans(), last_steps=st.sampled_from([1, 8]))
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_example_is_used_once(name, seed, loss, restore, last_steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "_LAST_STEPS", last_steps)  # epochs here have few
        _check_an_epoch(name, seed, loss, restore)


def _check_an_epoch(name, seed, loss, restore):
    rng = np.random.default_rng(seed)
    population = make_population(rng)
    sampler = SAMPLERS[name](int(rng.integers(1, 8)), seed=seed)
    ledger, twin = EpochLedger(sampler, population, epoch=2), EpochLedger(sampler, population, epoch=2)
    client_labels = {
        int(k): rng.permutation(np.repeat(np.arange(C), row))
        for k, row in zip(population.client_ids, population.label_counts, strict=True)
    }
    cursors = dict.fromkeys(client_labels, 0)
    used = {client: [] for client in client_labels}
    used_classes = {client: np.zeros(C, dtype=int) for client in client_labels}
    for _ in range(2000):
        unfinished = ledger.unfinished()
        if not len(unfinished):
            break
        if restore and rng.random() < 0.2:
            state = ledger.state_dict()
            saved = replace(saved_population(state, population), delays=population.delays)
            ledger = EpochLedger(sampler, saved, 2, state)
        available = rng.permutation(unfinished)[: max(1, int(np.ceil(len(unfinished) * (1 - rng.random() * loss))))]
        step = ledger.step(np.sort(available))
        assert same(step, twin.step(np.sort(available)))  # which is never restored
        assert set(step.clients) <= set(available)
        assert step.batch_size >= 1
        if name not in ("fls", "fpls"):  # whose batches shrink
            assert step.batch_size <= sampler.batch_size
            left = ledger.remaining[np.isin(population.client_ids, available)].sum()
            assert 2 * step.batch_size >= sampler.batch_size or step.batch_size == left
        orders = ledger.orders(7, step)
        arrived = {int(k): None for k in step.clients if rng.random() >= loss}
        if not arrived:
            continue
        came = part(step, arrived)
        labels = labels_of(rng, client_labels, came, cursors)
        ledger.done(came, labels)
        twin.done(came, labels)
        for order in (o for o in orders.each() if o.client in arrived):
            assert order.start == cursors[order.client]
            used[order.client] += range(order.start, order.start + order.count)
            cursors[order.client] += order.count
            used_classes[order.client] += np.bincount(labels[order.client], minlength=C)
            if order.class_counts is not None:
                assert (order.class_starts + order.class_counts == used_classes[order.client]).all()
    assert not len(ledger.unfinished())
    for client, size, counts in zip(population.client_ids, population.sizes, population.label_counts, strict=True):
        assert used[int(client)] == list(range(size))
        assert (used_classes[int(client)] == counts).all()


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_plans_made_anew_are_a_function_of_what_remains_and_of_their_number(name):
    population = make_population(np.random.default_rng(3))
    sampler = SAMPLERS[name](4, seed=1)
    plans = [sampler.plan(population, 0, replan=i) for i in (0, 1, 1, 2)]
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
    population = make_population(np.random.default_rng(3))
    plan = sampler.plan(population, 0, replan=1)
    plan.validate()
    assert plan.batch_sizes().max() <= population.num_examples
    assert sampler.batch_size == 64
    one = Population([4], [1], np.array([[0, 1, 0]]), Delays([1.0], [0.1]))
    assert sampler.plan(one, 0, replan=2).batch_sizes().tolist() == [1]


def test_labels_that_are_not_what_was_reported_are_made_up_for():
    """Soft labels, say: the rest of a client's classes is planned as it was."""
    population = Population([0, 1], [6, 6], np.array([[6, 0], [3, 3]]))
    ledger = EpochLedger(SAMPLERS["lds"](4, seed=0, delta=0.0), population, 0)
    while len(unfinished := ledger.unfinished()):
        step = part(ledger.step(unfinished), {int(k): None for k in ledger.step(unfinished).clients[:1]})
        ledger.done(step, {int(k): np.ones((int(n), 2)) for k, n in zip(step.clients, step.quotas, strict=True)})
    assert ledger.remaining.tolist() == [0, 0]


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["ugs", "lds", "lb", "aligned"])
def test_what_remains_of_lost_clients_is_collected_in_whole_batches(name, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 20, (8, C))
    population = Population(np.arange(8), counts.sum(axis=1), counts, Delays(rng.random(8), rng.random(8) / 10))
    sampler = SAMPLERS[name](12, seed=seed)
    ledger = EpochLedger(sampler, population, epoch=0)
    labels = {k: np.repeat(np.arange(C), row) for k, row in enumerate(counts)}
    cursors = dict.fromkeys(labels, 0)
    sizes, lost, first_steps = [], 0, ledger.steps_left() - 2
    while len(unfinished := ledger.unfinished()):
        step = ledger.step(unfinished)
        sizes.append(step.batch_size)
        fails = len(sizes) <= first_steps and rng.random() < 0.5
        missing = int(rng.choice(step.clients)) if fails and len(step.clients) > 1 else None
        came = part(step, {int(k): None for k in step.clients if k != missing})
        lost += step.batch_size - came.batch_size
        ledger.done(came, labels_of(rng, labels, came, cursors))
        for client, quota in zip(came.clients.tolist(), came.quotas.tolist(), strict=True):
            cursors[client] += quota
    assert min(sizes) >= sampler.batch_size // 2  # the rest, too: it is collected with the last step
    assert max(sizes) <= sampler.batch_size
    assert len(sizes) <= first_steps + 2 + lost // sampler.batch_size + ledger.replans


@pytest.mark.parametrize("name", ["ugs", "lds", "lb", "aligned"])
def test_a_step_that_nothing_came_of_is_tried_again_as_it_was(name):
    population = make_population(np.random.default_rng(3))
    ledger = EpochLedger(SAMPLERS[name](4, seed=1), population, 0)
    first, again = ledger.step(ledger.unfinished()), ledger.step(ledger.unfinished())
    assert np.array_equal(first.clients, again.clients)
    assert ledger.replans == 0
    others = ledger.unfinished()[ledger.unfinished() != first.clients[0]]
    assert first.clients[0] not in ledger.step(others).clients


# --- when the rest is planned anew -----------------------------------------------------------------------------------
def many_clients():
    rng = np.random.default_rng(1)
    counts = np.zeros((60, 5), dtype=np.int64)
    for row in counts:
        row[rng.choice(5, 2, replace=False)] = rng.integers(10, 40, 2)
    return Population(np.arange(60), counts.sum(axis=1), counts, Delays(rng.random(60), rng.random(60) / 10))


def labels_by_quota(step):
    return {int(k): np.repeat(np.arange(5), row) for k, row in zip(step.clients, step.class_quotas, strict=True)}


def go_through(ledger, lose):
    """Finish the epoch; return the class counts of the steps as they were planned."""
    planned = []
    while len(unfinished := ledger.unfinished()):
        step = ledger.step(unfinished)
        planned.append(step.class_quotas.sum(axis=0))
        came = part(step, dict.fromkeys(set(step.clients.tolist()) - lose(step)))
        if len(came.clients):
            ledger.done(came, labels_by_quota(came))
    return np.array(planned)


def test_losing_a_client_now_and_then_costs_few_plans_and_no_balance():
    population = many_clients()
    pooled = population.label_counts.sum(axis=0)
    sampler = SAMPLERS["aligned"](16, seed=2, targets="stratified")
    rng, losses = np.random.default_rng(4), 0

    def lose(step):
        nonlocal losses
        lost = rng.random() < 0.3
        losses += lost
        return {int(rng.choice(step.clients))} if lost else set()

    undisturbed = batch_deviation(go_through(EpochLedger(sampler, population, 0), lambda step: set()), pooled)
    ledger = EpochLedger(sampler, population, 0)
    disturbed = batch_deviation(go_through(ledger, lose), pooled)
    assert losses > 40
    assert ledger.replans < losses / 3
    assert disturbed.mean() < 1.5 * undisturbed.mean()


def test_much_that_remains_beyond_the_plan_is_not_put_off():
    """A third of the clients is back after five steps: they are planned for long before the plan's end."""
    ledger = EpochLedger(SAMPLERS["ugs"](16, seed=2), many_clients(), 0)
    available = np.arange(40)
    for index in range(60):
        step = ledger.step(ledger.unfinished() if index >= 5 else available)
        if step.clients.max() >= 40 and index >= 5:
            break
        ledger.done(step, {int(k): np.zeros(n, dtype=int) for k, n in zip(step.clients, step.quotas, strict=True)})
    assert 5 <= index < 20


def test_steps_without_those_who_are_left_out_come_first():
    population = many_clients()
    sampler = SAMPLERS["lb"](16, seed=2)
    plan = sampler.plan(population, 0)
    ledger, absent = EpochLedger(sampler, population, 0), plan[0].clients[:1]
    others = np.setdiff1d(population.client_ids, absent)
    free = [step for step in plan if not np.isin(absent, step.clients)]
    assert 0 < len(free) < len(plan)
    for expected in free:
        step = ledger.step(others)
        assert same(step, expected)
        ledger.done(step, labels_by_quota(step))
    assert ledger.replans == 0
    assert same(ledger.step(population.client_ids), plan[0])  # it is back
    step = ledger.step(others)
    assert ledger.replans == 1
    assert not np.isin(absent, step.clients)
    assert step.batch_size >= 8


def test_what_the_last_step_loses_is_mixed_in_if_it_can_be():
    ledger = EpochLedger(SAMPLERS["ugs"](16, seed=2), many_clients(), 0)
    sizes = []
    while len(unfinished := ledger.unfinished()):
        step = ledger.step(unfinished)
        came = part(step, dict.fromkeys(step.clients[:-1].tolist())) if ledger.steps_left() == 2 else step
        sizes.append(step.batch_size)
        ledger.done(came, {int(k): np.zeros(n, dtype=int) for k, n in zip(came.clients, came.quotas, strict=True)})
    assert ledger.replans > 0
    assert min(sizes) >= 8
