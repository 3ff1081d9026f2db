"""Processes that are killed or stopped in the middle of a step: the run goes on, and every example is used once."""

import functools
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from process_grid import ProcessGrid, freeze
from support import (
    CUT,
    ExactnessCase,
    largest_difference,
    load_partition_64,
    sgd,
    tiny_resnet,
    tiny_resnet_64,
)
from traps import Deadly, Trapped

from psl_flower import FaultPolicy, ParallelSplitLearning, UniformGlobalSampler, split_client_app
from psl_flower.errors import StepError
from psl_flower.exchange.streams import StreamCarrier, StreamOptions
from psl_flower.failures import Kind
from psl_flower.protocol import DESCRIBE, Request

CLIENTS = 6


def load(trap, context):
    return Deadly(load_partition_64(context), trap)


def make_app(trap):
    return split_client_app(tiny_resnet_64, cut=CUT, data_fn=functools.partial(load, trap))


def train(grid, trap, at, num_clients=CLIENTS):
    model = tiny_resnet(torch.float64)
    case = ExactnessCase(UniformGlobalSampler, num_clients, sgd, torch.float64, 1e-9)
    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        sampler=case.sampler,
        optimizer=lambda parameters: Trapped(parameters, trap, at),
        min_available_nodes=num_clients,
        transport="streams",
        device="cpu",
        faults=FaultPolicy(patience=0.0),
    )
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1, timeout=300)
    assert not trap.exists()  # it did go off
    assert largest_difference(result.arrays.to_torch_state_dict(), case.reference()) < case.tolerance


def test_surviving_processes_take_over_the_clients_of_a_dead_one(tmp_path, caplog):
    trap = Path(tmp_path / "trap")
    with ProcessGrid(functools.partial(make_app, trap), CLIENTS, num_processes=3) as grid:
        with caplog.at_level(logging.INFO, "flwr.psl_flower"):
            train(grid, trap, at=[5, 9])
        assert sum(each.process.is_alive() for each in grid.resident) == 1
    assert caplog.text.count("the others take them over") == 2
    assert f"{CLIENTS} clients are connected by 3 streams" in caplog.text


def test_without_a_survivor_the_run_ends_and_says_why(tmp_path):
    trap = Path(tmp_path / "trap")
    with (
        ProcessGrid(functools.partial(make_app, trap), CLIENTS, num_processes=1) as grid,
        pytest.raises(StepError, match=r"its process is gone .* and no other is left to take it over"),
    ):
        train(grid, trap, at=[3])


def test_in_a_deployment_the_client_is_attached_again(tmp_path):
    trap = Path(tmp_path / "trap")
    with ProcessGrid(functools.partial(make_app, trap), 3) as grid:
        train(grid, trap, at=[4], num_clients=3)
        assert len(grid.started) == 3 + 1
        for each in grid.started:  # goodbye ends the others
            each.process.join(120)
        assert not any(each.process.is_alive() for each in grid.started)


def question(num_nodes):
    return Request(stage=DESCRIBE, nodes=tuple(range(100, 100 + num_nodes)))


def processes(carrier, nodes):
    """Return the node ids of each process."""
    homes = {}
    for node in nodes:
        homes.setdefault(carrier._homes[node].connection, set()).add(node)
    return list(homes.values())


def test_a_stopped_process_costs_the_others_one_timeout_and_is_taken_over(tmp_path):
    ask = question(CLIENTS)
    with (
        ProcessGrid(functools.partial(make_app, tmp_path / "trap"), CLIENTS, num_processes=2) as grid,
        StreamCarrier(grid) as carrier,
    ):
        assert carrier.exchange(ask, 60).descriptions.keys() == set(ask.nodes)
        assert sorted(map(len, processes(carrier, ask.nodes))) == [3, 3]  # balanced
        stopped = grid.resident[0].process.pid
        freeze(stopped)
        reply = carrier.exchange(ask, 10)
        assert len(reply.failures) == len(reply.descriptions) == 3
        assert all("no reply within 10 s" in failure.detail for failure in reply.failures.values())
        assert {failure.kind for failure in reply.failures.values()} == {Kind.TIMEOUT}
        again = carrier.exchange(ask, 60)
        assert {n: d.partition_id for n, d in again.descriptions.items()} == {n: n - 100 for n in ask.nodes}
        os.kill(stopped, signal.SIGCONT)
        assert carrier.exchange(ask, 60).descriptions.keys() == set(ask.nodes)


def test_in_a_deployment_a_stopped_process_only_fails_itself(tmp_path):
    ask = question(2)
    with (
        ProcessGrid(functools.partial(make_app, tmp_path / "trap"), 2) as grid,
        StreamCarrier(grid, StreamOptions(attach_timeout=60)) as carrier,
    ):
        assert carrier.exchange(ask, 60).descriptions.keys() == {100, 101}
        stopped = next(each.process.pid for each in grid.started if each.node == 100)
        freeze(stopped)
        # more than wait in line: what is not read must not pile up
        replies = [carrier.exchange(ask, 0.25) for _ in range(20)]
        assert set().union(*(reply.descriptions for reply in replies)) == {101}
        os.kill(stopped, signal.SIGCONT)
        assert carrier.exchange(ask, 60).descriptions.keys() == {100, 101}
