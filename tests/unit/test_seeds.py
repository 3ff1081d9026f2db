"""Seeds of many clients at once: those that numpy makes for each."""

import numpy as np
import pytest
import torch

from psl_flower.data import Seeds
from psl_flower.devices import seeded
from psl_flower.orders import Orders
from psl_flower.seeds import step_seed, step_seeds

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(
    ("seed", "epoch", "most"),
    [(0, 0, 2**31), (2**32 - 1, 7, 2**31), (2**32, 7, 100), (2**60, 2**40, 100), (5, 0, 2**40)],
    ids=["plain", "largest word", "long seed", "long epoch", "long ids"],
)
def test_they_are_those_of_each(seed, epoch, most):
    steps, clients = RNG.integers(0, most, 50), RNG.integers(0, most, 50)
    each = [step_seed(seed, epoch, step, client) for step, client in zip(steps.tolist(), clients.tolist(), strict=True)]
    assert step_seeds(seed, epoch, steps, clients).tolist() == each
    assert max(each) > 2**62


@pytest.mark.parametrize("test", [False, True])
def test_orders_have_those_of_their_clients(test):
    orders = Orders(clients=np.arange(5), starts=np.zeros(5, int), counts=np.ones(5, int), seed=3, step=2, test=test)
    assert orders.step_seeds() == [order.step_seed() for order in orders.each()]


def test_a_generator_draws_what_torchs_own_would():
    values = step_seeds(1, 2, np.zeros(3, int), np.arange(3)).tolist()
    seeds = Seeds(values)
    for i in range(3):
        found = torch.rand(4, generator=seeds.generator(i))
        with seeded(0, torch.device("cpu")):
            seeds(i)
            assert torch.equal(found, torch.rand(4))
