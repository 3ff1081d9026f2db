"""Poisson sampling: what the server plans, what clients draw, and that together each example is drawn independently."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import TensorDataset

from psl_flower import SplitClient
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.population import Population
from psl_flower.privacy import Secret
from psl_flower.protocol import WorkOrder
from psl_flower.samplers import PoissonGlobalSampler, make_sampler

SIZES = np.array([3, 40, 0, 17])
N, B = 60, 12
RARE = 1e-6  # of what is asserted, by chance


def plans(count, repeatable):
    clients, sampler = Population([2, 5, 6, 9], SIZES), PoissonGlobalSampler(B, repeatable=repeatable)
    return [sampler.plan(clients, epoch) for epoch in range(count)]


@pytest.mark.parametrize("repeatable", [False, True])
def test_each_client_has_a_binomial_number_in_each_step(repeatable):
    drawn = np.concatenate([plan.dense() for plan in plans(400, repeatable)])  # of the clients that hold data
    assert drawn.shape == (400 * 5, 3)
    for numbers, size in zip(drawn.T, SIZES[SIZES > 0], strict=True):
        law = stats.binom(size, B / N)
        at = np.arange(size + 1)
        for k in at[law.pmf(at) > 1e-3]:
            low, high = stats.binom(len(drawn), law.pmf(k)).interval(1 - RARE)
            assert low <= (numbers == k).sum() <= high
    low, high = stats.binom(len(drawn) * N, B / N).interval(1 - RARE)
    assert low <= drawn.sum() <= high
    # of one step they are independent, and those of the next, too: 5 standard errors
    assert abs(np.corrcoef(drawn[:, 1], drawn[:, 2])[0, 1]) < 5 / np.sqrt(len(drawn))
    assert abs(np.corrcoef(drawn[1:, 1], drawn[:-1, 1])[0, 1]) < 5 / np.sqrt(len(drawn))


def test_only_a_repeatable_plan_is_one_of_the_seed():
    same, other = (PoissonGlobalSampler(B, seed=4, repeatable=r) for r in (True, False))
    clients = Population([0, 1], [30, 30])
    assert np.array_equal(same.plan(clients, 1).dense(), same.plan(clients, 1).dense())
    assert not np.array_equal(same.plan(clients, 1).dense(), same.plan(clients, 2).dense())
    assert not np.array_equal(other.plan(clients, 1).dense(), other.plan(clients, 1).dense())
    assert repr(same) == "PoissonGlobalSampler(batch_size=12, seed=4, repeatable=True)"


@pytest.mark.parametrize("repeatable", [False, True])
def test_a_rate_of_one_takes_everything(repeatable):
    plan = PoissonGlobalSampler(7, repeatable=repeatable).plan(Population([3, 8], [2, 5]))
    assert plan.dense().tolist() == [[2, 5]]


def test_steps_may_be_empty_and_remain_steps():
    plan = PoissonGlobalSampler(1, repeatable=True).plan(Population([0, 1], [100, 100]))
    assert len(plan) == len(plan.of_at_least(1)) == 200
    low, high = stats.binom(200, (1 - 1 / 200) ** 200).interval(1 - RARE)
    assert low <= (plan.batch_sizes() == 0).sum() <= high


def test_a_large_epoch_is_planned_without_a_table():
    sizes = np.full(2000, 500)
    plan = PoissonGlobalSampler(100).plan(Population(np.arange(2000), sizes))
    assert len(plan) == 10_000
    assert plan.batch_sizes().std() == pytest.approx(10, rel=0.1)


def test_it_has_a_name():
    assert type(make_sampler("poisson", 8)) is type(make_sampler("poisson-global", 8)) is PoissonGlobalSampler
    with pytest.raises(ConfigError, match="batch_size must not exceed the number of examples, got 8 for 7"):
        PoissonGlobalSampler(8).plan(Population([0], [7]))


# --- which examples --------------------------------------------------------------------------------------------------
def client(size, secret=None):
    made = SplitClient(TensorDataset(torch.zeros(size, 1), torch.zeros(size, dtype=torch.long)))
    secret = secret or Secret()
    made.secret = lambda: secret
    return made


def order(count, step=0, **options):
    return WorkOrder(client=0, seed=0, count=count, step=step, **{"epoch": 0, "start": 0, "drawing": 1, **options})


def test_every_choice_of_a_client_is_as_likely():
    some, found = client(5), np.zeros((5, 5), dtype=int)
    steps = 3000
    for step in range(steps):
        rows = some.draw(order(2, step))
        assert len(set(rows.tolist())) == 2
        found[rows[0], rows[1]] += 1
    pairs = found[np.triu_indices(5, 1)]
    assert pairs.sum() == steps
    assert stats.chisquare(pairs).pvalue > RARE


def test_each_example_is_in_a_step_independently_of_the_others():
    """What a client draws of what the server plans: the law of both together, for pairs of examples and of steps."""
    some, rate = client(6), 1 / 4
    sizes, steps = [6, 2], 0
    inside = []
    for epoch in range(1000):
        plan = PoissonGlobalSampler(2).plan(Population([0, 1], sizes), epoch)
        for quota in plan.dense()[:, 0]:
            row = np.zeros(6, dtype=int)
            if quota:
                row[some.draw(order(int(quota), steps, epoch=epoch))] = 1
            inside.append(row)
            steps += 1
    inside = np.array(inside)
    one, two = (stats.binom(len(inside), p).interval(1 - RARE) for p in (rate, rate**2))
    for i in range(6):
        assert one[0] <= inside[:, i].sum() <= one[1]
        for j in range(i):
            assert two[0] <= (inside[:, i] * inside[:, j]).sum() <= two[1]
        low, high = stats.binom(len(inside) - 1, rate**2).interval(1 - RARE)
        assert low <= (inside[1:, i] * inside[:-1, i]).sum() <= high


def test_an_order_repeated_draws_the_same_and_no_other_does():
    secret = Secret()
    first, again, other = client(50, secret), client(50, secret), client(50)
    rows = first.draw(order(20)).tolist()
    assert rows == again.draw(order(20)).tolist() == sorted(rows)
    different = [order(20, step=1), order(20, epoch=1), order(20, start=3), order(20, drawing=2)]
    assert all(rows != first.draw(each).tolist() for each in different)
    assert rows != other.draw(order(20)).tolist()


def test_what_cannot_be_read_is_not_drawn():
    rows = {int(r) for step in range(50) for r in client(6).draw(order(2, step, left_out=(1, 4)))}
    assert rows == {0, 2, 3, 5}


@pytest.mark.parametrize("count", [0, 7])
def test_orders_for_more_than_there_is_are_refused(count):
    with pytest.raises(ProtocolError, match=f"asked to draw {count} examples, of 6"):
        client(6).draw(order(count))
    lost = client(6)
    lost.secret = None
    with pytest.raises(ProtocolError, match="no secret to draw its examples by"):
        lost.draw(order(2))
