import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from psl_flower.app.images import draw_shifts
from psl_flower.client import SplitClient
from psl_flower.experiments.draws import _as_torch_does, draw_all
from psl_flower.experiments.schedule import client_turns, fill_plan
from psl_flower.samplers import Population
from psl_flower.samplers.registry import SAMPLERS, make_sampler
from psl_flower.seeds import step_seed
from psl_flower.stragglers import SlowFractionDelays
from psl_flower.strategy.orders import Cursors


@pytest.fixture
def shared_data():
    """Twelve clients, some without data, of 300 examples of five classes."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 5, 400)
    owners = np.sort(rng.integers(0, 12, 300))
    rows = rng.permutation(400)[:300]
    shares = [rows[owners == k] if k not in (2, 11) else rows[:0] for k in range(12)]
    counts = np.stack([np.bincount(labels[share], minlength=5) for share in shares])
    ids = np.arange(12)
    return Population(ids, counts.sum(axis=1), counts, SlowFractionDelays(fraction=0.2).delays(ids)), shares, labels


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_plan_is_filled_with_what_the_clients_draw(sampler, shared_data):
    population, shares, labels = shared_data
    plan = make_sampler(sampler, 16, 9).plan(population, 4)
    schedule = fill_plan(plan, shares, labels, seed=9, epoch=4)
    clients = [
        SplitClient(TensorDataset(torch.zeros(len(share), 1), torch.from_numpy(labels[share]))) for share in shares
    ]
    cursors, drawn, counts = Cursors(plan.population.client_ids, seed=9, epoch=4), [], []
    for i, step in enumerate(plan):
        drawn += [shares[o.client][clients[o.client].draw(o)] for o in cursors.orders(i, step, {}).each()]
        cursors.advance(step)
        counts.append(np.bincount(labels[np.concatenate(drawn[-len(step.clients) :])], minlength=5))
    np.testing.assert_array_equal(schedule.rows, np.concatenate(drawn))
    np.testing.assert_array_equal(schedule.class_counts(labels, 5), counts)
    assert schedule.bounds()[-1] == population.num_examples


def test_clients_in_turn_pass_over_their_data_as_often_as_asked(shared_data):
    population, shares, _ = shared_data
    schedule = client_turns(population, shares, [7, 2, 0], batch_size=10, local_epochs=2, seed=1, epoch=0)
    assert list(dict.fromkeys(schedule.plan.clients)) == [7, 0]  # client 2 holds nothing
    bounds = schedule.bounds()
    for k in (7, 0):
        steps = np.flatnonzero(schedule.plan.clients == k)
        sizes = schedule.plan.quotas[steps]
        assert sizes.max() <= 10
        assert sizes.max() - sizes.min() <= 1
        rows = schedule.rows[bounds[steps[0]] : bounds[steps[-1] + 1]]
        first, second = np.split(rows, 2)
        assert sorted(first) == sorted(second) == sorted(shares[k])
        assert first.tolist() != second.tolist()
        order = np.random.default_rng([1, 0, k]).permutation(len(shares[k]))
        assert first.tolist() == shares[k][order].tolist()


@pytest.mark.parametrize(
    ("seed", "epoch", "most"), [(0, 0, 1), (3, 17, 5), (2**32 - 1, 2, 75), (1, 2, 200), (2**40, 1, 3)]
)
def test_augmentation_is_drawn_as_each_client_draws_it(seed, epoch, most):
    rng = np.random.default_rng(most)
    steps, clients, counts = rng.integers(0, 50_000, 40), rng.integers(0, 100_000, 40), rng.integers(1, most + 1, 40)
    assert _as_torch_does()  # else the numbers are right, but each client's is drawn by itself
    together = draw_all(seed, epoch, steps, clients, counts)
    alone = []
    for step, client, count in zip(steps.tolist(), clients.tolist(), counts.tolist(), strict=True):
        torch.manual_seed(step_seed(seed, epoch, step, client))
        alone.append(draw_shifts(count))
    assert all(map(torch.equal, together, map(torch.cat, zip(*alone, strict=True))))
    assert len(together.top) == counts.sum()
    if counts.sum() > 50:
        assert set(together.top.tolist()) == set(together.left.tolist()) == {0, 1, 2}
        assert 0.2 < together.mirrored.float().mean() < 0.8
