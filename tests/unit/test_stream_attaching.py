"""Many clients of Flower's simulation are attached by few messages, of which it keeps none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitModel, UniformGlobalSampler, split_client_app
from psl_flower.exchange.streams import StreamCarrier
from psl_flower.protocol import ATTACH

K = 200


def model():
    torch.manual_seed(0)
    return SplitModel(client=nn.Linear(2, 3), server=nn.Linear(3, 2))


def load(context):
    client = context.node_config["partition-id"]
    return TensorDataset(torch.full((1, 2), float(client)), torch.tensor([client % 2]))


class InMemoryGrid(InProcessGrid):
    """What the simulation's grid looks like, and what is left in its store."""

    def __init__(self, order=lambda ids: ids):
        super().__init__(split_client_app(model, data_fn=load), num_nodes=K)
        self.attached = 0
        infos = [SimpleNamespace(node_id=node) for node in order(list(self.get_node_ids()))]
        self.state = SimpleNamespace(get_node_info=lambda: infos)
        self.kept = set()

    def push_messages(self, messages):
        messages = list(messages)
        self.attached += sum(message.metadata.message_type == ATTACH for message in messages)
        ids = super().push_messages(messages)
        self.kept |= set(ids)
        return ids

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        self.kept -= {reply.metadata.reply_to_message_id for reply in replies}
        return replies


def train(grid):
    strategy = ParallelSplitLearning(model(), sampler=UniformGlobalSampler(50), transport="streams")
    result = strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=1)
    return result.arrays.to_torch_state_dict()


def different(state, other):
    return [name for name, tensor in state.items() if not torch.equal(tensor, other[name])]


def shuffled(ids):
    return np.random.default_rng(0).permutation(ids).tolist()


def test_a_group_is_invited_and_its_processes_take_over_the_rest():
    grid = InMemoryGrid()
    state = train(grid)
    assert grid.attached == 64
    assert not grid.kept
    plain = InProcessGrid(split_client_app(model, data_fn=load), num_nodes=K)
    assert not different(state, train(plain))


def test_all_are_invited_where_the_store_has_another_order():
    grid = InMemoryGrid(shuffled)
    state = train(grid)
    assert grid.attached == K
    assert not grid.kept
    assert not different(state, train(InMemoryGrid()))


@pytest.mark.parametrize("state", [None, SimpleNamespace(get_node_info=None), SimpleNamespace(get_node_info=lambda: 1)])
def test_all_are_invited_where_the_store_does_not_tell(state):
    grid = InMemoryGrid()
    grid.state = state
    with StreamCarrier(grid) as carrier:
        assert carrier.attach(grid.get_node_ids(), 60) == {}
        assert set(carrier._homes) == set(grid.get_node_ids())
    assert grid.attached == K
    assert not grid.kept


def test_clients_that_were_not_invited_are_who_they_would_be():
    grid = InMemoryGrid()
    with StreamCarrier(grid) as carrier:
        assert carrier.attach(grid.get_node_ids(), 60) == {}
        configs = {node: home.node_config for node, home in carrier._homes.items()}
    assert configs == {n: {"partition-id": i, "num-partitions": K} for i, n in enumerate(grid.get_node_ids())}
