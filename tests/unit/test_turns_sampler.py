"""Batches of one client each."""

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.population import Population
from psl_flower.samplers.turns import TURNS, TurnsSampler

CLIENTS = Population(np.array([2, 5, 7, 9]), np.array([10, 0, 3, 8]))


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_every_client_makes_equal_batches_of_its_own(turns, batch_size):
    plan = TurnsSampler(batch_size, seed=1, turns=turns).plan(CLIENTS, 3)
    plan.validate()
    for client, size in zip([2, 7, 9], [10, 3, 8], strict=True):
        parts = np.array_split(np.arange(size), -(-size // batch_size))
        assert plan.quotas[plan.clients == client].tolist() == [len(part) for part in parts]


def test_turns():
    ascending, random, beside = (TurnsSampler(4, seed=1, turns=turns).plan(CLIENTS) for turns in TURNS)
    assert ascending.clients.tolist() == [2, 2, 2, 7, 9, 9]
    assert (ascending.active_clients() == 1).all()
    assert (random.active_clients() == 1).all()
    assert np.count_nonzero(np.diff(random.clients)) == 2  # each client's batches in a row
    assert [step.clients.tolist() for step in beside] == [[2, 7, 9], [2, 9], [2]]
    orders = {tuple(TurnsSampler(4, turns="random").plan(CLIENTS, epoch).clients) for epoch in range(20)}
    assert len(orders) == 6


def test_other_turns_are_refused():
    with pytest.raises(ConfigError, match="turns must be"):
        TurnsSampler(4, turns="descending")
