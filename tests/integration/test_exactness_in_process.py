"""Parallel split learning equals centralised training on the same examples, parameter by parameter."""

import pytest
import torch
from flwr.app import ArrayRecord
from support import (
    CUT,
    adam,
    exactness_cases,
    exactness_params,
    largest_difference,
    load_partition,
    load_partition_64,
    planned_batches,
    population,
    sgd,
    tiny_resnet,
    tiny_resnet_64,
    train_centralised,
)

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app


def train_split(sampler, optimizer, num_clients, dtype, num_rounds=1, delays=None):
    double = dtype == torch.float64
    model_fn, data_fn = (tiny_resnet_64, load_partition_64) if double else (tiny_resnet, load_partition)
    grid = InProcessGrid(split_client_app(model_fn, cut=CUT, data_fn=data_fn), num_nodes=num_clients)
    model = tiny_resnet(dtype)
    strategy = ParallelSplitLearning(
        model, cut=CUT, sampler=sampler, optimizer=optimizer, delays=delays, min_available_nodes=1
    )
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=num_rounds)
    return result.arrays.to_torch_state_dict()


@pytest.mark.parametrize(("name", "num_clients"), exactness_params([1, 2, 5]))
def test_equals_centralised_training(name, num_clients):
    case = exactness_cases(num_clients)[name]
    split = train_split(case.sampler, case.optimizer, num_clients, case.dtype, delays=case.delays)
    assert largest_difference(split, case.reference()) < case.tolerance
    assert largest_difference(split, tiny_resnet(case.dtype).state_dict()) > 1e-2  # it did train


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_optimizer_state_and_orders_carry_over_epochs(optimizer):
    sampler, num_clients = UniformGlobalSampler(32, seed=3), 4
    batches = [
        batch
        for epoch in range(3)
        for batch in planned_batches(
            sampler.plan(population(num_clients), epoch), num_clients, seed=3, epoch=epoch, dtype=torch.float64
        )
    ]
    reference = train_centralised(tiny_resnet(torch.float64), batches, optimizer)
    split = train_split(sampler, optimizer, num_clients, torch.float64, num_rounds=3)
    assert largest_difference(split, reference) < 1e-9


def test_another_seed_gives_other_weights():
    results = [train_split(UniformGlobalSampler(32, seed=seed), sgd, 2, torch.float64) for seed in (3, 3, 4)]
    assert largest_difference(results[0], results[1]) == 0
    assert largest_difference(results[0], results[2]) > 1e-4


def test_the_comparison_is_sensitive():
    """Dropping one example of one batch must show: else the comparisons above prove nothing."""
    plan = UniformGlobalSampler(32, seed=3).plan(population(2), 0)
    batches = list(planned_batches(plan, 2, seed=3, epoch=0, dtype=torch.float64))
    whole = train_centralised(tiny_resnet(torch.float64), batches, sgd)
    batches[1] = tuple(t[:-1] for t in batches[1])
    assert largest_difference(whole, train_centralised(tiny_resnet(torch.float64), batches, sgd)) > 1e-6
