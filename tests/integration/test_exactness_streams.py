"""The same comparison with centralised training, over streams within one process: all clients in one forward pass."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord
from support import (
    CUT,
    exactness_cases,
    exactness_params,
    largest_difference,
    load_partition,
    load_partition_64,
    tiny_resnet,
    tiny_resnet_64,
)

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitClient, split_client_app
from psl_flower.exchange.streams import StreamOptions


def train(case, num_clients, client_class=SplitClient, **options):
    double = case.dtype == torch.float64
    model_fn, data_fn = (tiny_resnet_64, load_partition_64) if double else (tiny_resnet, load_partition)
    app = split_client_app(model_fn, cut=CUT, data_fn=data_fn, client_class=client_class)
    model = tiny_resnet(case.dtype)
    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        sampler=case.sampler,
        optimizer=case.optimizer,
        delays=case.delays,
        min_available_nodes=1,
        transport="streams",
        stream_options=StreamOptions(**options),
    )
    grid = InProcessGrid(app, num_nodes=num_clients)
    return strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1).arrays.to_torch_state_dict()


@pytest.mark.parametrize(("name", "num_clients"), exactness_params([1, 16]))
def test_equals_centralised_training(name, num_clients):
    case = exactness_cases(num_clients)[name]
    assert largest_difference(train(case, num_clients), case.reference()) < case.tolerance


class OwnForward(SplitClient):
    def forward(self, half, inputs):
        return super().forward(half, inputs)


@pytest.mark.parametrize("sum_gradients", [True, False])
def test_one_client_at_a_time(sum_gradients, caplog):
    case = exactness_cases(16)["UniformGlobalSampler-sgd-64"]
    with caplog.at_level(logging.INFO, "flwr.psl_flower"):
        split = train(case, 16, OwnForward, sum_gradients=sum_gradients)
    assert largest_difference(split, case.reference()) < case.tolerance
    assert caplog.text.count("run one at a time: OwnForward has a forward pass of its own") == 1  # said once


def test_gradients_client_by_client():
    case = exactness_cases(16)["UniformGlobalSampler-sgd-64"]
    assert largest_difference(train(case, 16, sum_gradients=False), case.reference()) < case.tolerance


@pytest.mark.parametrize(
    ("wire_dtype", "least", "most"), [("float16", 1e-7, 1e-3), ("bfloat16", 1e-6, 1e-2), ("int8", 1e-6, 3e-2)]
)
def test_fewer_bits_change_the_weights_a_little(wire_dtype, least, most):
    case = exactness_cases(16)["UniformGlobalSampler-sgd-32"]
    difference = largest_difference(train(case, 16, wire_dtype=wire_dtype), case.reference())
    assert least < difference < most
